"""model_gpt_oss.py against transformers."""

import pytest
import tiny
import torch
from test_model import logits_of

import cli
from model import Transformer, family
from model_gpt_oss import unpack

SIZES = tiny.SIZES | dict(hidden_size=64, intermediate_size=32, head_dim=16)
SIZES |= dict(max_position_embeddings=512, sliding_window=7)
YARN = dict(rope_type="yarn", rope_theta=150.0, factor=8.0, original_max_position_embeddings=32)
PLAIN = dict(rope_type="default", rope_theta=150.0)
FULL = ["full_attention"] * 3
CASES = {
    "two experts": dict(num_local_experts=2, num_experts_per_tok=1, rope_parameters=YARN),
    "32 experts, not truncated": dict(
        num_local_experts=32, rope_parameters=dict(YARN, truncate=False)
    ),
    "no window, plain rope": dict(num_local_experts=4, layer_types=FULL, rope_parameters=PLAIN),
}


def reference(folder, **fields):
    """A random gpt-oss of transformers, written to `folder`; gates and ups reach the limit of 7."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt_oss", **{**SIZES, **fields})
    how = dict(attn_implementation="eager", dtype=torch.float32)
    hf = tiny.randomise(AutoModelForCausalLM.from_config(config, **how).eval())
    with torch.no_grad():
        for block in hf.model.layers:
            block.mlp.experts.gate_up_proj *= 2
    hf.save_pretrained(folder)
    return hf


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    """fp32 logits: experts, sinks, windows of the right layers, YaRN."""
    expected = logits_of(reference(tmp_path, **CASES[case]), tiny.ids(100))
    m = Transformer.from_pretrained(tmp_path, torch.float32)
    assert (m(tiny.ids(100)) - expected).abs().max() <= 1e-4


def test_mxfp4_equals_transformers(tmp_path, capsys):
    """Unpacked weights are transformers' bit for bit, and so the logits are its."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    fields = dict(num_local_experts=16, rope_scaling=YARN, model_type="gpt_oss")
    tiny.write(tmp_path, **SIZES, **fields, quantization_config={"quant_method": "mxfp4"})
    how = dict(quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **how).eval()
    m = Transformer.from_pretrained(tmp_path, torch.bfloat16)
    for ours, theirs in zip(m.layers, hf.model.layers):
        ours, theirs = ours.mlp.experts, theirs.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            blocks, scales = getattr(ours, f"{name}_blocks"), getattr(ours, f"{name}_scales")
            for e in range(16):
                weight = unpack(blocks[e], scales[e], torch.bfloat16)
                assert torch.equal(weight.T, getattr(theirs, name)[e])
    cli.describe(m, "", "")
    assert f"{hf.num_parameters() / 1e6:.1f}M parameters" in capsys.readouterr().out
    expected = logits_of(hf.float(), tiny.ids(40))
    assert (m.float()(tiny.ids(40)) - expected).abs().max() <= 1e-4


def test_gradient_through_experts():
    """Experts made twice in the backward pass give the gradient of finite differences."""
    m = tiny.build(model_type="gpt_oss", num_local_experts=4)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m.layers[0].mlp, x)


def test_configs():
    """Windows in turn; widths that MXFP4 cannot have, other formats, and too few experts."""
    raw = dict(SIZES, model_type="gpt_oss", num_experts_per_tok=2)
    config = family(raw).Config.from_dict(raw)
    assert config.num_experts_per_tok == 2 and config.window(0) == 7 and config.window(1) is None
    assert config.mlp_weights() == 64 * 128 + 2 * 3 * 64 * 32
    for method, size, error in (("gptq", 64, "quantization_config"), ("mxfp4", 40, "MXFP4")):
        changes = dict(quantization_config={"quant_method": method}, intermediate_size=size)
        with pytest.raises(ValueError, match=error):
            family(raw).Config.from_dict({**raw, **changes})
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        family(raw).Config.from_dict({**raw, "num_local_experts": 1})
