"""Shapes of known models, and the memory that they need: `python download.py --plan NAME`.

Nothing is loaded for it: a model on the meta device has shapes, and no memory.
"""

import os

import torch

from flops import alive_per_layer
from model import auto_dtype, family
from sdtp import PruneHead, paper_schedule

TIED = {"tie_word_embeddings": True}
EXPERTS = {"num_local_experts": 32, "num_experts_per_tok": 4, "head_dim": 64, "sliding_window": 128}
EXPERTS |= {"quantization_config": {"quant_method": "mxfp4"}}
SHAPES = {  # family, vocabulary, hidden and intermediate size, layers, heads, KV heads, others
    "10m": ("llama", 8192, 256, 768, 10, 4, 2, TIED),
    "135m": ("llama", 49152, 576, 1536, 30, 9, 3, TIED),  # SmolLM2's
    "360m": ("llama", 49152, 960, 2560, 32, 15, 5, TIED),
    "1b": ("llama", 128256, 2048, 8192, 16, 32, 8, TIED),  # Llama 3.2's
    "qwen3-0.6b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, {"head_dim": 128, **TIED}),
    "llama2-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, {}),
    "mistral-7b": ("mistral", 32000, 4096, 14336, 32, 32, 8, {"sliding_window": None}),  # v0.2
    "qwen2-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, {}),
    "gemma-7b": ("gemma", 256000, 3072, 24576, 28, 16, 16, {"head_dim": 256}),
    "bloom-7b": ("bloom", 250880, 4096, 16384, 30, 32, 32, TIED),
    "gpt-oss-20b": ("gpt_oss", 201088, 2880, 2880, 24, 64, 8, EXPERTS),
}


def shape_fields(name, layers=0, positions=1):
    """The config.json fields of a shape; layers: 0 for its own. ValueError names the flag."""
    if name not in SHAPES:
        raise ValueError(f"--shape {name}: choose {', '.join(SHAPES)}")
    family, vocab, hidden, intermediate, own, heads, kv_heads, more = SHAPES[name]
    return {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers or own,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        **more,
    }


def empty_model(raw):
    """The model of a config.json's dict on the meta device; ValueError for one that is refused."""
    cls = family(raw)
    with torch.device("meta"):
        return cls(cls.Config.from_dict(raw))


def must_recompute(model, tokens):
    """Whether a backward pass over so many tokens must compute its blocks twice, to save memory.

    All blocks together keep about 12 vectors of the hidden size and 4 of the MLP's for each token.
    That should be less than half of a GPU's free memory, or a quarter of a computer's memory.
    """
    c, weight = model.config, model.norm.weight
    width = 12 * c.hidden_size + 4 * c.intermediate_size * getattr(c, "num_experts_per_tok", 1)
    needed = tokens * c.num_hidden_layers * width * weight.itemsize
    if weight.is_cuda:
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return needed > (torch.cuda.mem_get_info(weight.device)[0] + cached) / 2
    if not hasattr(os, "sysconf"):  # Windows does not say
        return False
    return needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4


def weight_bytes(model):
    """Bytes of a model's weights, each counted once."""
    return sum(t.nbytes for t in model.state_dict().values())


PROMPT, RESPONSE = 512, 128  # tokens, for labels and training
HOLES = 60e6  # bytes that malloc keeps between tensors: measured on a CPU, a process as a whole


def peak_bytes(model, job, n=PROMPT, schedule=None):
    """Bytes of memory that a job needs, about: weights, other tensors alive at once, and HOLES.

    model: on the meta device, in the dtype to run in; job: "prefill" of n tokens by a schedule,
    "labels" or "training" at the schedule's stages, of n tokens and RESPONSE more.

    prefill: the keys and values of all layers so far, and for each token of one block three hidden
    states, queries, keys, values and attention's output, or four hidden states beside the MLP's
    products of the rows that it takes at a time.
    labels, training: for each block from the first stage on what autograd holds: two hidden states
    in float32, queries, keys, values and output (training: for each query head, and what a token
    sees), three products of the MLP; where must_recompute says so the blocks' inputs, and this and
    two gradients in its MLP for one of them. The response's logits and three more of their size, in
    float32, of which two are left when blocks are computed again. Training: L_rank's pairs, and the
    heads with gradients and AdamW's two moments.
    Not counted: libraries (0.4 GB), and what the backward of one block holds for a moment.
    """
    c, e = model.config, next(model.parameters()).itemsize
    d, layers = c.hidden_size, c.num_hidden_layers
    f = c.intermediate_size * getattr(c, "num_experts_per_tok", 1)
    products = c.mlp_weights() // d  # numbers that a token's MLP makes: three, BLOOM's two vectors
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = weight_bytes(model)
    if job == "prefill":
        cache = peak = 0
        for rows in alive_per_layer(schedule, n, layers):
            cache += e * rows * 2 * kv
            attention = rows * (3 * d + 2 * q + 2 * kv)
            mlp = rows * 4 * d + min(rows, 2048) * (2 * d + products)  # see model.in_chunks
            peak = max(peak, cache + e * max(attention, mlp))
        return weights + peak + HOLES
    tokens, training, logits = n + RESPONSE, job == "training", 4 * RESPONSE * c.vocab_size
    held = 2 * d * 4 + e * (products + (4 * q if training else 2 * q + 2 * kv)) + training * tokens
    blocks = tokens * (layers - min(schedule))
    if must_recompute(model, tokens):
        alive = blocks * d * e + max(4 * logits, tokens * (held + 2 * f * e) + 2 * logits)
    else:
        alive = blocks * held + 4 * logits
    if training:
        head = sum(w.numel() for w in PruneHead(d).parameters())
        alive += len(schedule) * (16 * head + 12 * n**2)
    return weights + alive + HOLES


def print_needs(raw):
    """What jobs on the model of a config.json's dict need, in the dtype that scripts would run."""
    dtype = auto_dtype("cuda" if torch.cuda.is_available() else "cpu")
    model = empty_model(raw).to(dtype)
    stages = paper_schedule(len(model.layers))
    print(f"GB of memory in {str(dtype).removeprefix('torch.')}: dense, by the paper's stages")
    print(f"{weight_bytes(model) / 1e9:9.1f}           weights")
    for job in ("labels", "training"):
        needed = peak_bytes(model, job, PROMPT, stages) / 1e9
        print(f"{needed:9.1f}           {job}, {PROMPT} + {RESPONSE} tokens")
    for n in (4096, 32768):
        dense, pruned = (peak_bytes(model, "prefill", n, s) / 1e9 for s in ({}, stages))
        print(f"{dense:9.1f} {pruned:9.1f} prefill of {n:,} tokens")
