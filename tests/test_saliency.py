"""saliency.py against float64 finite differences and transformers' eager attention."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import saliency
from model import Transformer
from saliency import label

ROOT = Path(__file__).parent.parent
T = 9


def loss_from(model, layer, x, ids, start):
    """Nats of the tokens from `start` on, when block `layer` reads x: the later blocks, run again."""
    for block in model.layers[layer:]:
        x = block(x, torch.arange(len(ids)), [len(ids)])
    logits = model.lm_head(model.norm(x))
    return sum(torch.logsumexp(logits[i - 1], 0) - logits[i - 1, ids[i]] for i in range(start, len(ids))).item()


def finite_differences(model, layer, ids, start, eps=1e-5):
    """(T, hidden_size): input of block `layer`, and the loss's central differences by each of its numbers."""
    x = model.embed(ids)
    for block in model.layers[:layer]:
        x = block(x, torch.arange(len(ids)), [len(ids)])
    slopes = torch.zeros_like(x)
    for i in range(x.shape[0]):
        for d in range(x.shape[1]):
            at = []
            for sign in (1, -1):
                moved = x.clone()
                moved[i, d] += sign * eps
                at.append(loss_from(model, layer, moved, ids, start))
            slopes[i, d] = (at[0] - at[1]) / (2 * eps)
    return x, slopes


@pytest.mark.parametrize("layer, start", [(0, 1), (2, 6)], ids=["layer 0, all tokens", "layer 2, response"])
def test_gradient_teachers_equal_finite_differences(layer, start):
    """grad_x_input is |sum_d dT/dx_d x_d| and grad_norm the L2 norm, of T over all or over the response."""
    model, ids = tiny.build(), tiny.ids(T)
    x, slopes = finite_differences(model, layer, ids, start)
    prompt_lens = None if start == 1 else [start]
    for teacher, expected in (
        ("grad_x_input", [abs(sum(g * v for g, v in zip(*row))) for row in zip(slopes.tolist(), x.tolist())]),
        ("grad_norm", [math.sqrt(sum(g * g for g in row)) for row in slopes.tolist()]),
    ):
        got = label(model, ids, [0, 1, 2], teacher, prompt_lens=prompt_lens)[layer]
        assert got.shape == (T,) and (got >= 0).all()
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
        assert got.max() > 1e-2


@pytest.mark.parametrize("teacher", saliency.TEACHERS)
@pytest.mark.parametrize("response", [True, False])
def test_packed_equals_single(teacher, response):
    """Packed sequences get the labels of each by itself, windows included; no parameter gets a gradient."""
    model = tiny.build(model_type="mistral", sliding_window=5)
    seqlens, prompt_lens = [9, 17, 6], [5, 12, 4]
    parts = [tiny.ids(n, seed=n) for n in seqlens]
    packed = label(model, torch.cat(parts), [1, 2], teacher, seqlens, prompt_lens if response else None)
    assert list(packed) == [1, 2]
    for i, ids in enumerate(parts):
        alone = label(model, ids, [1, 2], teacher, prompt_lens=[prompt_lens[i]] if response else None)
        for layer in (1, 2):
            torch.testing.assert_close(packed[layer].split(seqlens)[i], alone[layer], rtol=1e-5, atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@tiny.on_cuda
@pytest.mark.parametrize("teacher", saliency.TEACHERS)
def test_cuda_equals_cpu(teacher):
    """Labels of packed sequences on CUDA are the CPU's, blocks recomputed as there by default."""
    model, seqlens, prompt_lens = tiny.build(), [9, 17, 6], [5, 12, 4]
    ids = torch.cat([tiny.ids(n, seed=n) for n in seqlens])
    expected = label(model, ids, [1, 2], teacher, seqlens, prompt_lens)
    got = label(model.cuda(), ids.cuda(), [1, 2], teacher, seqlens, prompt_lens, checkpoint_blocks=True)
    for layer in (1, 2):
        torch.testing.assert_close(got[layer].cpu(), expected[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"model_type": "mistral", "sliding_window": 5}], ids=["llama", "window"])
def test_entropy_equals_transformers(fields, tmp_path):
    """attention_entropy is 1 - mean entropy / log(visible tokens) of transformers' eager attention weights."""
    from transformers import AutoModelForCausalLM

    tiny.write(tmp_path, **fields)
    ids = tiny.ids(23)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64)
    maps = hf(ids[None], output_attentions=True).attentions
    model = Transformer.from_pretrained(tmp_path, torch.float64)
    labels = label(model, ids, [0, 2], "attention_entropy")
    blocks, _ = saliency.entropy_labels(model, ids, [0, 2], [23], block=7)  # the last one short
    for layer, got in labels.items():
        assert torch.allclose(got, blocks[layer], rtol=0, atol=1e-6)
        expected = []
        for i in range(len(ids)):
            seen = min(i + 1, fields.get("sliding_window", i + 1))
            entropies = [-sum(p * math.log(p) for p in row if p > 0) for row in maps[layer][0, :, i].tolist()]
            expected.append(1 - sum(entropies) / len(entropies) / math.log(seen) if seen > 1 else 1.0)
        torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
        assert 0.05 < got.min() < 0.9 and got[0] == 1


@pytest.mark.parametrize("fields", [{}, {"model_type": "mistral", "sliding_window": 5}], ids=["llama", "window"])
@pytest.mark.parametrize("starts", [None, [15, 5, 8]])
def test_response_attention_equals_transformers(fields, starts, tmp_path):
    """What the rows that predict scored tokens read of each token: transformers' weights, summed over these rows, times its
    value's norm, the largest head's, mean over the layers 2 to 4 of 6 from there on, of layer 5 its own; in a ragged batch, by
    blocks of rows."""
    from transformers import AutoModelForCausalLM

    tiny.write(tmp_path, num_hidden_layers=6, **fields)
    seqlens = [23, 6, 14]
    parts = [tiny.ids(n) for n in seqlens]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64)
    model = Transformer.from_pretrained(tmp_path, torch.float64)
    labels, states = saliency.mark(model, torch.cat(parts), [0, 3, 5], "response_attention", seqlens, starts)
    blocks, _ = saliency.response_labels(model, torch.cat(parts), [0, 3, 5], seqlens, starts, block=3)
    assert [round(30 * depth) for depth in saliency.READING] == [10, 25]
    values = {}  # {layer: (n, key heads * head_dim)}
    for layer, block in enumerate(hf.model.layers):
        block.self_attn.v_proj.register_forward_hook(lambda _, x, v, layer=layer: values.update({layer: v[0]}))
    for i, (ids, n) in enumerate(zip(parts, seqlens)):
        out = hf(ids[None], output_attentions=True, output_hidden_states=True)
        rows = range((starts[i] if starts else 1) - 1, n - 1)
        best = []  # per layer and token
        for layer, maps in enumerate(out.attentions):
            size = values[layer].unflatten(-1, (2, -1)).norm(dim=-1).tolist()  # of tokens' key heads, each of two heads
            heads = [[sum(maps[0, h, q, k].item() for q in rows) * size[k][h // 2] for k in range(n)] for h in range(4)]
            best.append([max(head[k] for head in heads) for k in range(n)])
        for layer, later in ((0, best[2:5]), (3, best[3:5]), (5, best[5:])):
            expected = torch.tensor([sum(b[k] for b in later) / len(later) for k in range(n)], dtype=torch.float64)
            for got in (labels, blocks):
                torch.testing.assert_close(got[layer].split(seqlens)[i].double(), expected, rtol=0, atol=2e-5)
            torch.testing.assert_close(states[layer].split(seqlens)[i], out.hidden_states[layer][0], rtol=0, atol=1e-4)
            assert expected[-1] == 0 and expected.std() > 0.02  # nothing reads the last token


def test_unknown_teacher():
    """An unknown teacher is an error that names it."""
    with pytest.raises(ValueError, match="'magic'"):
        label(tiny.build(), tiny.ids(5), [1], "magic")


def test_graph_starts_at_the_first_stage(monkeypatch):
    """Blocks before the first stage keep nothing for a backward pass."""
    model, seen = tiny.build(), []
    for layer, block in enumerate(model.layers):
        monkeypatch.setattr(
            block,
            "forward",
            lambda x, *a, f=block.forward, i=layer, **k: seen.append((i, x.requires_grad)) or f(x, *a, **k),
        )
    label(model, tiny.ids(6), [1], "grad_norm")
    assert seen == [(0, False), (1, True), (2, True)]


@pytest.mark.parametrize("window", [None, 7])
def test_attend_by_weights(window):
    """The teacher's attention gives attend()'s outputs and gradients in float64, ragged and with missing positions."""
    g, seqlens = torch.Generator().manual_seed(0), [30, 1, 12]
    shapes = [(sum(seqlens), heads, 8) for heads in (6, 2, 2)]
    q, k, v = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes)
    positions = torch.cat([torch.randperm(2 * n, generator=g)[:n].sort().values for n in seqlens])
    target = torch.randn(q.shape, generator=g, dtype=torch.float64)
    results = []
    for longest in (1024, 0):  # 0: all of it goes to attend()
        out = saliency.attend_by_weights(q, k, v, positions, positions, seqlens, seqlens, window, longest)
        results.append((out, *torch.autograd.grad((out * target).sum(), (q, k, v))))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*results))


@pytest.mark.parametrize("teacher", ["grad_norm", "grad_x_input"])
def test_checkpointed_blocks(teacher, monkeypatch):
    """Recomputing blocks gives the same labels, and runs each block from the first stage on twice."""
    model, calls = tiny.build(), []
    expected = label(model, tiny.ids(20), [1, 2], teacher, [12, 8], [5, 4])
    for layer, block in enumerate(model.layers):
        monkeypatch.setattr(block, "forward", lambda *a, f=block.forward, i=layer, **k: calls.append(i) or f(*a, **k))
    got = label(model, tiny.ids(20), [1, 2], teacher, [12, 8], [5, 4], checkpoint_blocks=True)
    assert all(torch.equal(got[layer], expected[layer]) for layer in (1, 2))
    assert sorted(calls) == [0, 1, 1, 2, 2]


def test_response_attention_runs_what_it_reads(monkeypatch):
    """Blocks behind those whose reading counts do not run, unless a stage is there; labels and states are the same."""
    model, calls = tiny.build(num_hidden_layers=6), []
    expected = saliency.mark(model, tiny.ids(20), [0, 3, 5], "response_attention", [12, 8], [5, 4])
    for layer, block in enumerate(model.layers):
        monkeypatch.setattr(block, "forward", lambda *a, f=block.forward, i=layer, **k: calls.append(i) or f(*a, **k))
    for layers, depth in (([0, 3], 5), ([5], 6)):
        got = saliency.mark(model, tiny.ids(20), layers, "response_attention", [12, 8], [5, 4])
        assert all(torch.equal(g[layer], e[layer]) for g, e in zip(got, expected) for layer in layers)
        assert calls == list(range(depth)), calls
        calls.clear()


def test_sparsity():
    """Figure 2 counts tokens above a tenth of the layer's own maximum."""
    labels = {0: torch.tensor([10.0, 1.0, 1.1, 0.0]), 3: torch.tensor([0.1, 0.1, 0.1, 0.1])}
    assert saliency.sparsity(labels) == [0.5, 1.0]


def test_script(tmp_path):
    """python saliency.py writes both figures, and rows with their origin."""
    folder = tiny.checkpoint(tmp_path / "tiny")
    (tmp_path / "text").write_text("price: $5 and _10_ ^ more\n" * 2)
    flags = f"--ckpt {folder} --prompt_file {tmp_path}/text --out_dir {tmp_path}/out --json {tmp_path}/rows.json --dtype float32"
    done = subprocess.run(
        [sys.executable, ROOT / "saliency.py", *flags.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr
    for name in ("heat_map.png", "sparsity.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["layer"] for r in rows] == [0, 1, 2] and {"commit", "command", "versions", "machine", "seed"} <= rows[
        0
    ].keys()


@pytest.mark.parametrize("teacher", saliency.TEACHERS)
def test_noisy_copies(teacher):
    """Labels are the mean over passes on noisy embeddings, states the clean ones; the same each time; no noise, no change."""
    model, ids = tiny.build(), tiny.ids(40)
    how = (teacher, [25, 15], [20, 9])
    labels, states = saliency.mark(model, ids, [1, 2], *how, noisy_copies=3)
    clean, clean_states = saliency.mark(model, ids, [1, 2], *how)
    embed, generator, parts = model.embed, torch.Generator().manual_seed(0), []
    for _ in range(3):
        x = embed(ids)
        noisy = x + saliency.NOISE * x.std() * torch.randn(x.shape, generator=generator).double()
        model.embed = lambda ids, noisy=noisy: noisy
        parts.append(saliency.mark(model, ids, [1, 2], *how)[0])
    for layer in (1, 2):
        assert torch.allclose(labels[layer], sum(p[layer] for p in parts) / 3, rtol=1e-6)
        assert not torch.allclose(labels[layer], clean[layer], rtol=1e-3)
        assert torch.allclose(states[layer], clean_states[layer], rtol=1e-9)
