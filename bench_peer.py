"""One peer of bench.py --peers, in a virtual environment of its own: llama.cpp, or kvpress's SnapKV on transformers.

    echo '{"ids": [1, 2, 3], "new_tokens": 8}' |
    peers/llama.cpp/bin/python bench_peer.py llama.cpp checkpoints/smollm2-135m-q4 --gguf peers/smollm2.gguf

One JSON line per request on stdin, one per answer on stdout, until stdin ends: {"first_s": seconds to the first token,
"per_token_s": to each later one, "total_s":, "kv_bytes": keys and values of the prompt, "rss_bytes": the highest
resident size meanwhile, "first_token":}. Greedy. Nothing of this project is imported, torch for kvpress only.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from time import perf_counter


def read_safetensors(folder):
    """(name, float32 or float16 array) of every tensor in the folder; numpy's safetensors has no bfloat16."""
    import numpy as np

    for file in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(file, np.uint8, "r")
        data = 8 + int(raw[:8].view("<u8")[0])
        for name, entry in json.loads(bytes(raw[8:data])).items():
            if name == "__metadata__" or name.endswith("inv_freq"):  # a buffer of old checkpoints
                continue
            begin, end = entry["data_offsets"]
            tensor = raw[data + begin : data + end].view({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]])
            if entry["dtype"] == "BF16":
                tensor = (tensor.astype("<u4") << 16).view("<f4")
            yield name, tensor.reshape(entry["shape"])


def write_gguf(folder, path, dtype):
    """The checkpoint as llama.cpp reads it: matrices in dtype, norms in float32, no tokenizer (ids go in and come out)."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {**config, **(config.get("rope_scaling") or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if config["model_type"] != "llama" or scaling != "default":
        sys.exit(f"only a plain Llama is written as GGUF here, not model_type {config['model_type']}, rope {scaling}")
    layers, heads, width = (config[f] for f in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, "llama", use_temp_file=True)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    kinds = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float16": gguf.GGMLQuantizationType.F16}
    for name, weight in read_safetensors(folder):
        if config.get("tie_word_embeddings") and name == "lm_head.weight":
            continue
        for part, count in (("q_proj.weight", heads), ("k_proj.weight", kv_heads)):
            if name.endswith(part):  # llama.cpp rotates neighbouring rows (download.unpermute)
                weight = weight.reshape(count, 2, head_dim // 2, width).swapaxes(1, 2).reshape(weight.shape)
        if not (new_name := names.get_name(name, try_suffixes=(".weight",))):
            sys.exit(f"{name} has no place in the GGUF of a plain Llama")
        kind = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else kinds[dtype]
        writer.add_tensor(new_name, gguf.quantize(weight.astype("<f4", order="C"), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)
    return path


def llama_cpp(args):
    """(generate(ids, new_tokens), kv_bytes(ids)) of llama.cpp; keys and values are float16, its default.

    The defaults are its fastest here (0.3.36, AVX-512 bf16, one thread, seconds of CPU per prefill, ms per token):
    bfloat16 1.8 and 15 at 1,024 tokens, 14.2 and 22 at 4,096; float16 2.6 and 24, 17.6 and 23; bfloat16 with
    flash attention 1.8 and 16, 18.8 and 30 (at 1,024 its prefill is 4 to 13 % faster, its tokens 6 to 17 % slower).
    """
    import llama_cpp
    import numpy as np

    path = args.gguf.with_name(f"{args.gguf.stem}-{args.dtype}.gguf")
    if not path.is_file():
        write_gguf(args.model, path, args.dtype)
    model = llama_cpp.Llama(
        str(path), n_ctx=args.positions, n_batch=args.positions, n_threads=args.threads, n_threads_batch=args.threads,
        flash_attn=args.flash_attn, verbose=False,
    )  # fmt: skip
    meta = {key.removeprefix("llama."): value for key, value in model.metadata.items()}
    width = int(meta["attention.head_count_kv"]) * int(meta["attention.key_length"])

    def generate(ids, new_tokens, **_):
        model.reset()  # eval() then drops all of the cache
        for _ in range(new_tokens):
            model.eval(ids)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
            ids = [int(logits.argmax())]
            yield ids[0]

    return generate, lambda ids: 2 * 2 * width * int(meta["block_count"]) * len(ids)


def kvpress(args):
    """(generate(ids, new_tokens, compression_ratio), kv_bytes(ids)) of transformers' model under SnapKVPress."""
    import torch
    from kvpress import SnapKVPress
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(args.threads)
    dtype, cache = getattr(torch, args.dtype), None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def generate(ids, new_tokens, compression_ratio=0.0):
        nonlocal cache
        cache = DynamicCache()
        with SnapKVPress(compression_ratio)(model):
            out = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        for step in range(new_tokens):
            token = out.logits[:, -1].argmax(-1)
            yield int(token)
            if step + 1 < new_tokens:  # positions are passed, as the cache is shorter than the text (kvpress.pipeline)
                position = torch.tensor([[len(ids) + step]])
                out = model(token[None], past_key_values=cache, position_ids=position, logits_to_keep=1)

    return generate, lambda _: sum(t.untyped_storage().nbytes() for c in cache.layers for t in (c.keys, c.values))


def resident(reset=False):
    """Highest resident size since the last reset, as bench.rss_bytes(); None where there is no Linux /proc."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except OSError:
        return None


def answer(generate, kv_bytes, ids, new_tokens, **more):
    resident(reset=True)
    ticks, tokens = [perf_counter()], []
    for token in generate(ids, new_tokens, **more):
        ticks.append(perf_counter())
        tokens.append(token)
    start, first, last = ticks[0], ticks[1], ticks[-1]
    return {
        "first_s": first - start, "per_token_s": (last - first) / max(1, new_tokens - 1), "total_s": last - start,
        "kv_bytes": kv_bytes(ids), "rss_bytes": resident(), "first_token": tokens[0], "tokens": tokens,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["llama.cpp", "kvpress"])
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or (kvpress) float32")
    parser.add_argument("--positions", type=int, default=4096, help="llama.cpp: room for prompt and new tokens")
    parser.add_argument("--gguf", type=Path, default=Path("model.gguf"), help="llama.cpp: its copy, NAME-DTYPE.gguf")
    parser.add_argument("--flash_attn", action=argparse.BooleanOptionalAction, default=False, help="llama.cpp")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    peer = {"llama.cpp": llama_cpp, "kvpress": kvpress}[args.peer](args)
    for line in sys.stdin:
        print(json.dumps(answer(*peer, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
