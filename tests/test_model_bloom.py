"""model_bloom.py against transformers."""

import json

import pytest
import safetensors.torch
import tiny
import torch
from test_model import logits_of

from model import Transformer, attend, attention_weights, family
from model_bloom import alibi_slopes


def reference(folder, heads, layers=3):
    """A random BLOOM of transformers, written to `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=61, hidden_size=8 * heads, n_layer=layers, n_head=heads)
    how = dict(attn_implementation="eager", dtype=torch.float32)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes), **how).eval()
    tiny.randomise(hf).save_pretrained(folder)
    return hf


@pytest.mark.parametrize("heads", [4, 6, 12, 16])
def test_logits_equal_transformers(heads, tmp_path):
    """fp32 logits beyond 256 positions, with and without prefixed names, old and new spelling."""
    expected = logits_of(reference(tmp_path, heads), tiny.ids(300))
    m = Transformer.from_pretrained(tmp_path, torch.float32)
    # 6e-5 is seen; the other form of GELU would give 3e-3
    assert (m(tiny.ids(300)) - expected).abs().max() <= 1e-5 * expected.std().clamp(min=10)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    prefixed = all(name.startswith("transformer.") for name in tensors if name != "lm_head.weight")
    renamed = {}
    for name, tensor in tensors.items():
        renamed[name.removeprefix("transformer.") if prefixed else f"transformer.{name}"] = tensor
    safetensors.torch.save_file(renamed, path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["n_embed"] = config.pop("hidden_size")
    config.update(num_attention_heads=config["n_head"], n_head=1)  # the first counts
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = Transformer.from_pretrained(tmp_path, torch.float32)
    assert torch.equal(again(tiny.ids(300)), m(tiny.ids(300)))
    attention, x, at = m.layers[0].self_attn, m.embed(tiny.ids(10)), torch.tensor([0, 3, 4, 9])
    for some, whole in zip(attention.kv(x[at], at), attention.kv(x, torch.arange(10))):
        assert (some - whole[at]).abs().max() <= 1e-5  # keys carry their position, not their row


def test_positions_in_bfloat16():
    """Positions far out are as exact as any: attention weights and outputs of SDPA."""
    m, n = tiny.build(**tiny.BLOOM, num_attention_heads=12, hidden_size=96), 1200
    attention, positions = m.to(torch.bfloat16).layers[0].self_attn, torch.arange(n)
    x = torch.randn(n, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, (k, v) = attention.q(x, positions), attention.kv(x, positions)
    wide = q[..., :8].double() * (8 / 16) ** 0.5, k[..., :8].double()
    scores = torch.einsum("qhd,khd->hqk", *wide) / 8**0.5
    scores += alibi_slopes(12)[:, None, None] * positions
    seen = positions[:, None] >= positions
    exact = scores.masked_fill(~seen, -torch.inf).softmax(-1)  # of the rounded q and k
    got = attention_weights(q, k, positions, positions)
    assert (got - exact).abs().sum(-1).max() / 2 < 0.05  # 0.3 without a row's constant
    out = attend(q, k, v, positions, positions, [n], [n])
    expected = torch.einsum("hqk,khd->qhd", exact, v.double())
    assert (out - expected).abs().max() < 0.05


@pytest.mark.parametrize("name", ["slow_but_exact", "apply_residual_connection_post_layernorm"])
def test_refused_config(name):
    raw = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}
    cls = family(raw).Config
    assert cls.from_dict(raw).max_position_embeddings == 2048
    assert cls.from_dict({**raw, "seq_length": 512}).max_position_embeddings == 512
    with pytest.raises(ValueError, match=name):
        cls.from_dict({**raw, name: True})
    with pytest.raises(ValueError, match="hidden_size: a positive whole number"):
        cls.from_dict({**raw, "hidden_size": None})
