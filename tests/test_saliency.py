"""saliency.py against float64 finite differences and transformers' eager attention."""

import json
import math
import os
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch

import memory
import saliency
from data import Example
from model import Transformer
from saliency import label, stored_label
from sdtp import is_protected

WINDOW = {"model_type": "mistral", "sliding_window": 3}
N, T = 5, 7  # tokens of the prompt, and with the response


def finite_differences(model, layer, ids, first, eps=1e-5):
    """(T, hidden_size) twice: input of a block, and central differences of the loss from there."""
    x, positions = model.embed(ids), torch.arange(T)
    for block in model.layers[:layer]:
        x = block(x, positions, [T])
    steps = eps * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    moved = torch.cat((x + steps, x - steps)).flatten(0, 1)  # packed sequences
    count = len(moved) // T
    for block in model.layers[layer:]:
        moved = block(moved, positions.repeat(count), [T] * count)
    log_probs = model.logits(moved).log_softmax(-1).unflatten(0, (count, T))
    nats = -sum(log_probs[:, i - 1, ids[i]] for i in range(first, T))
    up, down = nats.view(2, *x.shape)
    return x, (up - down) / (2 * eps)


CASES = [(1, "all", {}), (2, "response", WINDOW), (1, "all", tiny.QWEN3)]
CASES += [(1, "response", tiny.BLOOM), (1, "response", tiny.GPT_OSS)]


@pytest.mark.parametrize("layer, over, fields", CASES)
def test_gradient_teachers_equal_finite_differences(layer, over, fields):
    """grad_x_input is |sum_d dT/dx_d x_d| and grad_norm its L2 norm, over the prompt's tokens."""
    model, ids = tiny.build(**fields), tiny.ids(T)
    x, slopes = finite_differences(model, layer, ids, N if over == "response" else 1)
    expected = {"grad_x_input": (slopes * x).sum(-1).abs(), "grad_norm": slopes.norm(dim=-1)}
    for teacher, values in expected.items():
        got = label(model, ids, N, [0, layer], teacher, over)
        assert got.keys() == {0, layer} and got[layer].dtype == torch.float32
        torch.testing.assert_close(got[layer], values[:N].float(), rtol=1e-4, atol=1e-5)
        assert got[layer].max() > 0.1 and got[layer].std() > 0.01
        if (teacher, over) == ("grad_x_input", "response"):  # the paper's, so the default
            assert torch.equal(got[layer], label(model, ids, N, [0, layer])[layer])
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("fields", [{}, WINDOW], ids=["llama", "window"])
def test_entropy_equals_transformers(fields, tmp_path):
    """attention_entropy is 1 - mean entropy / log(visible tokens) of transformers' weights."""
    from transformers import AutoModelForCausalLM

    tiny.write(tmp_path, **fields)
    ids, n, how = tiny.ids(23), 20, {"attn_implementation": "eager", "dtype": torch.float64}
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    maps = hf(ids[None], output_attentions=True).attentions
    model = Transformer.from_pretrained(tmp_path, torch.float64)
    labels = label(model, ids, n, [0, 2], "attention_entropy")
    in_blocks = saliency.entropy_label(model, ids, n, [0, 2], rows=7)  # the last one is short
    for layer, got in labels.items():
        expected = []
        for i in range(n):
            seen = min(i + 1, fields.get("sliding_window", i + 1))
            rows = maps[layer][0, :, i].tolist()
            entropies = [-sum(p * math.log(p) for p in row if p > 0) for row in rows]
            mean = sum(entropies) / len(entropies)
            expected.append(1 - mean / math.log(seen) if seen > 1 else 1.0)
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-5)
        torch.testing.assert_close(in_blocks[layer], got, rtol=0, atol=1e-6)
        assert 0.05 < got.min() < 0.9 and got[0] == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_that_are_recomputed(recompute, monkeypatch):
    """The labels are the same; no block before the first stage is in the graph, or runs again."""
    model, ids, calls = tiny.build(), tiny.ids(T), []
    expected = label(model, ids, N, [1, 2])
    for layer, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda _, args, at=layer: calls.append((at, args[0])))
    monkeypatch.setattr(memory, "must_recompute", lambda model, tokens: recompute)
    got = label(model, ids, N, [1, 2])
    assert all(torch.equal(got[layer], expected[layer]) for layer in (1, 2))
    wanted = [(0, False), *[(1, True)] * (1 + recompute), *[(2, True)] * (1 + recompute)]
    assert sorted((layer, x.requires_grad) for layer, x in calls) == wanted


def test_must_recompute(monkeypatch):
    """Where a prompt's states would take more than a quarter of the memory, and only there."""
    kept = 3 * (12 * 32 + 4 * 48) * 4  # bytes of a token: layers, widths, float32
    sizes = {"SC_PHYS_PAGES": 4 * 100, "SC_PAGE_SIZE": kept}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    found = [memory.must_recompute(tiny.build(torch.float32), n) for n in (99, 100, 101)]
    assert found == [False, False, True]


@pytest.mark.parametrize("teacher", saliency.TEACHERS)
def test_stored_label(teacher, tmp_path, monkeypatch):
    """label() over its largest droppable value; computed once; each prompt has its own file."""
    model, calls = tiny.build(torch.float32), []
    config = SimpleNamespace(teacher=teacher, over="all")
    monkeypatch.setattr(saliency, "label", lambda *args: calls.append(args) or label(*args))
    stored = partial(stored_label, model, config=config, folder=tmp_path / "labels")
    ids, free = tiny.ids(36), ~is_protected(torch.arange(30), 30)
    example = Example(ids[:30].tolist(), ids[30:].tolist())
    plain = label(model, ids, 30, [0, 2], teacher, "all")
    first, again = stored(example, [0, 2]), stored(example, {0: "head", 2: "head"})
    for layer in (0, 2):
        torch.testing.assert_close(first[layer], plain[layer] / plain[layer][free].max())
        assert torch.equal(first[layer], again[layer])
    assert len(calls) == 1
    stored(Example(example.prompt, [1, 2]), [0, 2])
    assert len(calls) == 2
    for path in (tmp_path / "labels").iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"labels/\w+.safetensors is damaged .*delete it"):
        stored(example, [0, 2])
    monkeypatch.setattr(saliency, "label", lambda *args: {1: torch.zeros(30)})
    assert not stored(Example([5] * 30, [6]), [1])[1].any()  # and not NaN
    monkeypatch.setattr(saliency, "label", lambda *args: {1: torch.full((30,), torch.nan)})
    with pytest.raises(ValueError, match="layer 1: labels are not finite"):
        stored(Example([7] * 30, [6]), [1])


def test_sparsity():  # a tenth of the largest is not above it
    assert saliency.sparsity(torch.tensor([10.0, 1.0, 1.1, 0.0])) == 0.5


def test_script(tmp_path, monkeypatch, capsys):
    """python saliency.py prints the share of each layer and writes both figures and the rows."""
    flags = f"--ckpt {tiny.checkpoint(tmp_path / 'tiny')} --dtype float32 --out_dir {tmp_path}/out"
    argv = ["saliency.py", *flags.split(), "--json", f"{tmp_path}/rows.json"]
    monkeypatch.setattr(sys, "argv", [*argv, "--prompt", "price: $5 and _10_ ^ more\n" * 2])
    saliency.main()
    assert sorted(p.name for p in tmp_path.glob("out/*")) == ["heat_map.png", "sparsity.png"]
    rows, printed = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    assert [row["layer"] for row in rows] == [0, 1, 2] and {"commit", "command"} <= rows[0].keys()
    for row in rows:
        assert re.search(rf"^{row['layer']} +{row['share']:.1%}$", printed, re.M)
