"""bench.py: FLOPs against flops.py and the paper's table, memory against known tensors."""

import json
import sys

import pytest
import tiny
import torch
from test_sdtp import checkpoint_with_heads

import bench
import cli
import flops
from bench import cpu_peak_bytes, interleaved, work
from memory import SHAPES, empty_model, shape_fields
from model import Transformer
from sdtp import PruneHead, dense, generate, prefill, pruned

QUICK = "--new_tokens 3 --repeats 1 --dtype float32 --device cpu"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run bench.py with these flags, in an empty folder; returns the rows of --json."""
    monkeypatch.chdir(tmp_path)

    def script(flags):
        monkeypatch.setattr(sys, "argv", ["bench.py", *f"{flags} --json r.json".split()])
        cli.run(bench.main)
        return json.loads((tmp_path / "r.json").read_text())

    return script


@pytest.fixture
def tiny_model(tmp_path):
    folders = dict.fromkeys(("heads/tiny", "heads/other"), {2: 0.8, 5: 0.5})
    return checkpoint_with_heads(tmp_path, folders, num_hidden_layers=8)


def test_paper_table(run, capsys):
    """The paper's 12 figures within 0.01 % (dense) and 2.5 % (pruned); no checkpoint is read."""
    rows = run("--paper_table")
    assert [r["length"] for r in rows] == 2 * [4096, 8192, 16384, 32768, 65536, 131072]
    assert [rows[0]["paper_tflops"], rows[-1]["paper_tflops"]] == [72.51, 4678.81]
    for r in rows:
        close = 1e-4 if r["method"] == "dense" else 0.025
        assert r["our_tflops"] == pytest.approx(r["paper_tflops"], rel=close)
        assert r["difference"] == pytest.approx(r["our_tflops"] / r["paper_tflops"] - 1)
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["sdtp", "131,072", "4678.81", "4565.58", "-2.420%"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("window", [None, 9])
def test_work(window, size):
    """Of a batch; which pairs a window leaves goes by the positions of those alive."""
    model = tiny.build(torch.float32, model_type="mistral", sliding_window=window)
    heads, lens = {1: PruneHead(32).requires_grad_(False)}, [50] * size
    row = work(model, tiny.ids(50).repeat(size), lens, pruned(heads, {1: 0.6}), heads)
    cache = prefill(model, tiny.ids(50), heads, {1: 0.6})[1]
    positions = [layer.rows()[2] for layer in cache.layers]
    parts = flops.executed_flops(model.config, 50, positions, heads)
    assert row["prefill_flops"] == size * sum(parts) and row["heads_flops"] == size * parts[2] > 0
    assert row["alive"] == [50, 30, 30] and row["mean_alive"] == 110 / 150
    assert row["kv_bytes"] == size * 110 * 2 * 2 * 8 * 4  # k, v, 2 heads of 8, float32


def test_cpu_peak_bytes():
    """What is freed leaves, what was there before does not count, temporaries do."""
    before = [torch.empty(3_000_000)]

    def call():
        a, b = torch.empty(1_000_000), torch.empty(2_000_000)  # 4 MB + 8 MB
        del a
        before.clear()
        return torch.empty(500_000), b  # 2 MB + 8 MB

    assert cpu_peak_bytes(call) == 12_000_000
    x = torch.randn(1000, 1000)
    # a copy in float64 inside, and the result
    assert cpu_peak_bytes(lambda: x.softmax(-1, dtype=torch.float64)) == 16_000_000


def test_interleaved():
    """Methods run in turn, repeat by repeat; the first round warms up and leaves nothing."""
    calls = []
    run = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert interleaved(run, 2) == {"a": [3, 5], "b": [4, 6]} and calls == list("ababab")


def test_token_seconds(monkeypatch):
    """To the first token, for each later one, to the last."""
    ticks = iter([100, 102, 102.5, 103, 103.5])
    monkeypatch.setattr(bench, "clock", lambda model: next(ticks))
    call = lambda count, on_token: [on_token([0]) for _ in range(count)]  # noqa: E731
    assert bench.token_seconds(None, 4, call) == (2, 0.5, 3.5)


def test_speed():
    """Times are medians, spreads ranges; speedups are medians of ratios, not ratios of medians."""
    row = bench.speed([(1, 1, 1), (8, 1, 2), (2, 1, 3)], [(6, 1, 3), (8, 2, 8), (4, 4, 3)])
    assert (row["prefill_s"], row["decode_s"], row["total_s"]) == (2, 1, 2)
    assert (row["prefill_spread"], row["decode_spread"]) == (3.5, 0)
    speedups = [row[f"{name}_speedup"] for name in ("prefill", "decode", "total")]
    assert speedups == [2, 2, 3]


PUBLISHED = {  # millions of parameters, from the model cards; 10m is ours
    "10m": 9.97,
    "135m": 134.5,
    "360m": 361.8,
    "1b": 1235.8,
    "qwen3-0.6b": 596.0,
    "llama2-7b": 6738.4,
    "mistral-7b": 7241.7,
    "qwen2-7b": 7615.6,
    "gemma-7b": 8537.7,
    "bloom-7b": 7069.0,
    "gpt-oss-20b": 20914.8,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    """Each shape has the parameters of the model that it is named after, and windows if it does."""
    model = empty_model({**shape_fields(name), "quantization_config": None})
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED[name], rel=2e-3)
    assert model.config.window(0) == (128 if name == "gpt-oss-20b" else None)


def test_transformers_generate(tmp_path):
    """transformers' loop gives our tokens, each step's to on_token, for two prompts at once."""
    pytest.importorskip("transformers")
    folder = tiny.write(tmp_path / "tiny")
    model, ids, seen = Transformer.from_pretrained(folder, torch.float32), tiny.ids(60), []
    reference = bench.transformers_model(None, model, folder)
    cache = bench.transformers_generate(reference, ids.view(2, 30), 9, on_token=seen.append)
    expected = generate(model, ids, 9, dense, seqlens=[30, 30])
    assert [list(tokens) for tokens in zip(*seen)] == expected
    assert cache.layers[0].keys.shape == (2, 2, 30 + 8, 8)


def test_script(run, tiny_model):
    """Without --keep the heads' own schedule, with it budgets at each length; a row's fields."""
    rows = run(f"--ckpt tiny --lengths 64 --seed 2 {QUICK}")  # all positions, and decodes
    assert rows[1]["alive"] == [64] * 2 + [51] * 3 + [32] * 3
    assert {"commit", "command", "versions", "machine"} <= rows[0].keys() and rows[0]["seed"] == 2
    rows = run(f"--ckpt tiny --heads heads/tiny --lengths 30,60 --keep 0.9,0.6 {QUICK}")
    variants = [(n, *v) for n in (30, 60) for v in (("dense", 0.0), ("sdtp", 0.9), ("sdtp", 0.6))]
    assert [(r["length"], r["method"], r["keep"]) for r in rows] == variants
    config, weights = tiny_model.config, 4 * sum(p.numel() for p in tiny_model.parameters())
    for first, r in zip([rows[0]] * 3 + [rows[3]] * 3, rows):
        n, schedule = r["length"], {}
        if r["keep"]:
            schedule = flops.at_keep(config, {2: 0.8, 5: 0.5}, r["keep"], n)
        assert r["alive"] == flops.alive_per_layer(schedule, n, 8)
        assert r["flops_speedup"] == first["prefill_flops"] / r["prefill_flops"]
        assert r["peak_bytes"] > r["kv_bytes"] and r["total_s"] > r["prefill_s"] > 0 < r["decode_s"]
        assert r["tokens_s"] == 3 / r["total_s"] and r["prefill_spread"] == 0  # one repeat
        peaks = weights + r["peak_bytes"], weights + first["peak_bytes"]
        assert r["memory_diff"] == pytest.approx(peaks[0] / peaks[1] - 1)
    assert rows[3]["prefill_speedup"] == rows[3]["total_speedup"] == 1


def test_methods(run, tiny_model, tmp_path):
    """Two folders of heads, each scorer at the stages of each; KV compression; transformers."""
    pytest.importorskip("transformers")
    flags = "--heads heads/tiny,heads/other --methods random,sdtp+h2o,dense+h2o,transformers"
    rows = {r["method"]: r for r in run(f"--ckpt tiny {flags} --lengths 60 {QUICK}")}
    names = "random:tiny sdtp+h2o:tiny dense+h2o random:other sdtp+h2o:other transformers"
    assert list(rows) == ["dense", *names.split()]
    dense, h2o = rows["dense"], rows["dense+h2o"]
    assert rows["random:tiny"]["alive"] == rows["sdtp+h2o:tiny"]["alive"] != dense["alive"]
    assert h2o["alive"] == dense["alive"] and h2o["kv_bytes"] == dense["kv_bytes"] * 24 / 60  # 40 %
    more = h2o["prefill_flops"] - dense["prefill_flops"]
    assert more == 8 * 2 * 32 * (60 * 61 // 2)  # products of queries and keys once more
    assert rows["transformers"]["kv_bytes"] == dense["kv_bytes"]
    assert rows["transformers"]["prefill_flops"] == dense["prefill_flops"]
    tiny.checkpoint(tmp_path / "window", model_type="mistral", sliding_window=16)
    rows = run(f"--ckpt window --lengths 50 --methods transformers {QUICK}")
    assert [r["method"] for r in rows] == ["dense", "transformers"]  # which needs no stage
    assert rows[1]["kv_bytes"] < rows[0]["kv_bytes"]  # it holds the window alone


def test_shape_and_batches(run):
    """Untrained heads at the paper's stages; prompts at once, of which random has one draw each."""
    flags = "--shape 10m --layers 6 --lengths 40 --methods random,sdtp+snapkv --batches 1,3"
    rows = run(f"{flags} {QUICK}")
    assert rows[0]["ckpt"] == "10m, 6 layers, random weights"
    assert [r["method"] for r in rows] == ["dense", "random", "sdtp+snapkv"] * 2
    for r, r3 in zip(rows[:3], rows[3:]):
        assert (r["batch_size"], r3["batch_size"]) == (1, 3)
        assert r3["alive"] == r["alive"] and r3["kv_bytes"] == 3 * r["kv_bytes"]
        assert r3["prefill_flops"] == 3 * r["prefill_flops"] and r3["tokens_s"] == 9 / r3["total_s"]
    assert rows[2]["alive"] == [40] * 4 + [36] * 2


def test_marking(run, monkeypatch):
    """The labels of the paper's stages, for a response of 64 tokens, as a multiple of a prefill."""
    calls, label = [], bench.saliency.label
    monkeypatch.setattr(bench.saliency, "label", lambda *a: calls.append(a[2:]) or label(*a))
    ticks = iter(t for _ in range(3) for t in (0, 2, 10, 15))  # a prefill takes 2 s, labels 5
    monkeypatch.setattr(bench, "clock", lambda model: next(ticks))
    rows = run("--marking --shape 10m --layers 9 --lengths 100 --repeats 2 --dtype float32")
    found = [(r["method"], r["length"], r["seconds"], r["multiple"]) for r in rows]
    assert found == [("prefill", 100, 2, 1), ("labels", 100, 5, 2.5)]
    assert calls == [(36, [4, 7])] * 4  # warm-up, two repeats, memory
    assert rows[1]["peak_bytes"] > rows[0]["peak_bytes"] > 0
