"""bench.py: FLOPs against torch's own counter, the paper's table and loops."""

import json
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import cli
import scorers
from bench import executed_flops, pairs, paper_flops
from model import attention_weights
from sdtp import PruneHead, Schedule, prefill, select


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_pairs_equal_a_loop(window):
    """(query, key) pairs of causal and windowed attention over what is alive, by original position."""
    positions = torch.tensor([0, 1, 2, 3, 6, 7, 12, 13, 14, 20])
    expected = sum(0 <= i - j < (window or 10**9) for i in positions.tolist() for j in positions.tolist())
    assert pairs(positions, window) == expected


def plain_attend(q, k, v, positions, k_positions, seqlens, k_seqlens, window=None):
    """Attention as two products over the full square, which FlopCounterMode sees."""
    weights = attention_weights(q, k, positions, k_positions, window)
    return (weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    "stages", [{}, {1: 0.6, 3: 0.3}, {0: 0.7, 2: 0.4}], ids=["dense", "two stages", "from layer 0"]
)
def test_executed_flops_equal_torchs_counter(stages):
    """Linear and head FLOPs are exactly what torch counts; its attention is the full square of the same formula."""
    model, n = tiny.build(torch.float32, num_hidden_layers=4, head_dim=8), 40
    schedule = Schedule(4, stages) if stages else None
    heads = {layer: PruneHead(32) for layer in stages}
    _, cache = prefill(model, tiny.ids(n), heads, schedule)
    alive, prompt = [lengths[0] for lengths in cache.seqlens()], n
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x, positions = model.embed(tiny.ids(n)), torch.arange(n)
        for layer, block in enumerate(model.layers):
            if layer in stages:
                keep, _ = select(heads[layer](x), positions, stages[layer], [len(x)], [prompt])
                x, positions = x[keep], positions[keep]
            x = block(x, positions, [len(x)], None, plain_attend)
        model.logits(x[-1:])
    counted = counter.get_flop_counts()["Global"]
    products = sum(v for op, v in counted.items() if "bmm" in str(op))
    linear, attention, head = executed_flops(model.config, cache, schedule)
    assert linear + head == sum(counted.values()) - products
    assert products == sum(4 * 8 * 4 * m * m for m in alive)
    assert attention == sum(4 * 8 * 4 * m * (m + 1) // 2 for m in alive)
    assert (head > 0) == bool(stages) and alive[-1] < n or not stages


def test_windowed_flops():
    """Attention FLOPs of a model with windows on some layers are those of the pairs each layer sees."""
    model, n = tiny.build(model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1), 30
    schedule = Schedule(3, {1: 0.5})
    _, cache = prefill(model, tiny.ids(n), {1: scorers.random(torch.Generator().manual_seed(0))}, schedule)
    kept = cache[1].rows()[2].tolist()
    expected = n * (n + 1) // 2 + 2 * sum(0 <= i - j < 7 for i in kept for j in kept)
    assert executed_flops(model.config, cache, schedule)[1] == 4 * 8 * 4 * expected


def test_paper_flops_reproduce_table_2():
    """Mistral-7B's sizes give the dense column of the paper's table 2 (TFLOPs) within 0.1 %."""
    mistral = SimpleNamespace(hidden_size=4096, intermediate_size=14336, vocab_size=32000)
    table = {4: 72.51, 8: 158.22, 16: 369.22, 32: 949.54, 64: 2743.46, 128: 8864.49}
    for thousands, published in table.items():
        assert paper_flops(mistral, [thousands * 1024] * 32) / 1e12 == pytest.approx(published, rel=1e-3)


def test_timed_interleaves(monkeypatch):
    """Variants run in turn; the first round is a warm-up and is not counted."""
    calls, ticks = [], iter([0, 0, 1, 2, 1, 4, 5, 10, 20, 21])  # a warm-up reads the clock once
    monkeypatch.setattr(bench, "clock", lambda model: next(ticks))
    seconds = bench.timed(None, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == list("ababab")
    assert seconds == {"a": [1, 5], "b": [3, 1]}


def test_script(tmp_path, monkeypatch, capsys):
    """bench.py times dense, pruned and transformers in one run and writes a row of each."""
    folder = tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=8)
    flags = f"--ckpt {folder} --lengths 20,40 --repeats 2 --keep 0.6 --transformers --json {tmp_path}/r.json --dtype float32 --seed 2"
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    cli.run(bench.main)
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(r["length"], r["method"]) for r in rows] == [
        (n, m) for n in (20, 40) for m in ("dense", "sdtp", "transformers")
    ]
    dense, pruned, reference = rows[3:]
    assert (
        dense["speedup"] == dense["flops_ratio"] == dense["mean_alive"] == 1
        and reference["prefill_flops"] == dense["prefill_flops"]
    )
    assert pruned["mean_alive"] == pytest.approx((4 * 40 + 3 * 24 + 14) / 8 / 40) and pruned["flops_ratio"] > 1
    assert pruned["reached"] == pytest.approx(pruned["speedup"] / pruned["flops_ratio"])
    assert {"commit", "command", "versions", "machine"} <= dense.keys() and dense["seed"] == 2
