"""Tiny random models whose logits have a standard deviation of 1 or more.

Tiny logits let wrong code pass.
"""

import json
import random

import pytest
import safetensors.torch
import torch

from model import family

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


QWEN3 = dict(model_type="qwen3", head_dim=12)
BLOOM = dict(model_type="bloom")
GPT_OSS = dict(model_type="gpt_oss", num_local_experts=4, sliding_window=7)


def on_cuda(test):
    """Marks a test that needs a GPU: `pytest -m cuda` runs it."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
    return pytest.mark.cuda(skip(test))


def randomise(model, gemma=False, seed=0):
    """Weights large enough for sharp attention, biases and norms that matter.

    They depend on the names alone, which are the same here and in transformers.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            if p.dtype == torch.uint8:  # MXFP4: any bytes are valid, scales are 2^(byte - 127)
                bytes = torch.randint(256, p.shape, generator=generator)
                noise = bytes % 3 + 123 if "scales" in name else bytes
            elif name.endswith("bias") or name.endswith("sinks"):
                noise = 0.5 * noise
            elif p.dim() == 1:  # of a norm
                noise = 0.3 * noise + (0 if gemma else 1)
            elif "embed" not in name:
                noise = 1.5 * noise / p.shape[1] ** 0.5
            p.copy_(noise)
    return model


def build(dtype=torch.float64, model_type="llama", **fields):
    """A random Transformer of SIZES, changed by `fields` of a config.json."""
    raw = {**SIZES, "model_type": model_type, **fields}
    model = family(raw)(family(raw).Config.from_dict(raw))
    model = randomise(model, model_type == "gemma").to(dtype)
    assert model(ids(40)).std() >= 1
    return model


def ids(n, seed=0):
    """n random token ids."""
    generator = torch.Generator().manual_seed(1000 * seed + n)
    return torch.randint(SIZES["vocab_size"], (n,), generator=generator)


def write(folder, **fields):
    """A checkpoint folder as on the hub, of a random Llama: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**SIZES, "model_type": "llama", **fields}
    (folder / "config.json").write_text(json.dumps(raw))
    model = family(raw)(family(raw).Config.from_dict(raw))
    tensors = {}
    for name, tensor in randomise(model, raw["model_type"] == "gemma").state_dict().items():
        tensors[name if name.startswith("lm_head") else model.prefix + name] = tensor
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


ALPHABET = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;?!'-()#<|>"]


def checkpoint(folder, chat_template=None, **fields):
    """write(), and a tokenizer.json of single characters that begins a text with <s>."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    write(folder, bos_token_id=1, eos_token_id=2, **fields)
    vocabulary = {c: i for i, c in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(ALPHABET[:3])
    tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def rows(path, count, length=120):
    """Write a .jsonl file of rows whose contexts are of `length` tokens of checkpoint()."""
    draw, lines = random.Random(0), []
    for _ in range(count):
        texts = ["".join(draw.choices(ALPHABET[3:30], k=n)) for n in (8, length, 6)]
        lines.append(json.dumps(dict(zip(("instruction", "context", "response"), texts))))
    path.write_text("\n".join(lines))
