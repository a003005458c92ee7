"""bench.py: FLOPs against torch's counter and the paper's table, memory against known tensors."""

import json
import sys
from functools import partial

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import cli
import flops
from bench import cpu_peak_bytes, interleaved, random_model, work
from model import FAMILIES, KVCache, Transformer, visible
from sdtp import PruneHead, dense, generate, paper_schedule, prefill, pruned, save_heads
from shapes import SHAPES, empty_model, shape_fields

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
    """A checkpoint of 8 layers, tmp_path/tiny, and heads for it at layers 2 and 5, heads/tiny."""
    tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=8)
    model = Transformer.from_pretrained(tmp_path / "tiny", torch.float32)
    schedule = {2: 0.8, 5: 0.5}
    heads = {layer: PruneHead(32) for layer in schedule}
    for name in ("tiny", "other"):
        save_heads(tmp_path / "heads" / name, heads, model, schedule)
    return model


# ---------------------------------------------------------------------------- FLOPs


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
@pytest.mark.parametrize("schedule", [{}, {1: 0.7, 2: 0.4}], ids=["dense", "pruned"])
def test_flops_are_those_that_torch_counts(schedule, size):
    """torch counts the products that run, the full square where we count the triangle."""
    model, n = tiny.build(torch.float32, num_hidden_layers=4), 40
    heads = {layer: PruneHead(32).requires_grad_(False) for layer in schedule}
    method, ids = pruned(heads, schedule), tiny.ids(n * size)
    row = work(model, ids, [n] * size, method, heads)
    # the other kernels of a CPU are not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method(model, ids, [n] * size, KVCache(4))
    upper = sum(4 * 8 * 4 * (a * a - a * (a + 1) // 2) for a in row["alive"])  # 4 heads of 8
    assert row["prefill_flops"] + size * upper == counter.get_total_flops()
    assert row["alive"] == ([40, 28, 16, 16] if schedule else [40] * 4)
    assert row["mean_alive"] == sum(row["alive"]) / 160
    assert row["heads_flops"] == size * 2 * (32 * 8 + 8 * 2) * (40 + 28) * bool(schedule)
    assert (
        row["kv_bytes"] == size * sum(row["alive"]) * 2 * 2 * 8 * 4
    )  # k, v, 2 heads of 8, float32


def test_flops_of_a_window_go_by_position():
    """Which pairs a window leaves depends on the tokens alive: the mask over the cache's rows."""
    model = tiny.build(torch.float32, model_type="mistral", sliding_window=9)
    schedule = {1: 0.6}
    heads, ids = {1: PruneHead(32).requires_grad_(False)}, tiny.ids(50)
    row = work(model, ids, [50], pruned(heads, schedule), heads)
    cache, pairs = prefill(model, ids, heads, schedule)[1], 0
    for layer in cache.layers:
        positions = layer.positions[0, : layer.seqlens[0]]
        pairs += visible(positions, positions, 9).sum().item()
    linear, _, head = flops.executed_flops(model.config, 50, row["alive"], heads)
    assert row["prefill_flops"] == linear + head + 4 * 8 * 4 * pairs


# ---------------------------------------------------------------------------- memory and time


def test_cpu_peak_bytes():
    """What is freed leaves, what was there before does not count, temporaries do."""
    before = [torch.empty(3_000_000)]

    def call():
        a, b = torch.empty(1_000_000), torch.empty(2_000_000)  # 4 MB + 8 MB
        del a
        before.clear()
        c = torch.empty(500_000)  # 8 MB + 2 MB
        del b, c
        return torch.empty(2_500_000)  # 10 MB

    assert cpu_peak_bytes(call) == 12_000_000
    x = torch.randn(1000, 1000)
    # a copy in float64 inside, and the result
    assert cpu_peak_bytes(lambda: x.softmax(-1, dtype=torch.float64)) == 16_000_000
    assert cpu_peak_bytes(lambda: None) == 0


def test_peak_of_a_prefill():
    """Longer prompts hold more; the cache, which is what stays, is a part of the peak."""
    model = tiny.build(torch.float32, max_position_embeddings=256)
    peaks = [cpu_peak_bytes(partial(prefill, model, tiny.ids(n))) for n in (64, 256)]
    assert peaks[1] > 2 * peaks[0] and peaks[1] > prefill(model, tiny.ids(256))[1].nbytes()


def test_interleaved():
    """Methods run in turn, repeat by repeat; the first round warms up and leaves nothing."""
    calls = []
    run = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert interleaved(run, 2) == {"a": [3, 5], "b": [4, 6]} and calls == list("ababab")


def test_token_seconds(monkeypatch):
    """To the first token, for each later one, to the last, by a clock that moves at each token."""
    now = [100.0]
    monkeypatch.setattr(bench, "clock", lambda model: now[0])

    def call(new_tokens, on_token):
        for token in range(new_tokens):
            now[0] += 0.5 if token else 2
            on_token([0])

    assert bench.token_seconds(None, 5, call) == (2, 0.5, 4)


def test_speed():
    """A machine that slows down leaves the ratios alone; times are medians, spreads ranges."""
    drift = (1, 2, 3, 10, 30)
    ours = [(2 * d, 0.5 * d, 6 * d) for d in drift]
    row = bench.speed(ours, [(4 * d, 0.25 * d, 18 * d) for d in drift])
    assert (row["prefill_s"], row["decode_s"], row["total_s"]) == (6, 1.5, 18)
    speedups = [row[f"{name}_speedup"] for name in ("prefill", "decode", "total")]
    assert speedups == [2, 0.5, 3] and row["prefill_spread"] == 58 / 6
    # the median of ratios is not the ratio of medians
    row = bench.speed([(1, 1, 1), (8, 1, 1), (2, 1, 1)], [(6, 1, 1), (8, 1, 1), (4, 1, 1)])
    assert row["prefill_speedup"] == 2 and row["prefill_s"] == 2


# ---------------------------------------------------------------------------- models

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


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name][0] in FAMILIES])
def test_shapes(name):
    """Each shape has the parameters of the model that it is named after, and no window."""
    model = empty_model(shape_fields(name))
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED[name], rel=2e-3)
    assert model.config.window(0) is None


def test_random_model():
    """The layers, positions and dtype asked for; weights of deviation 0.02, norms of 1."""
    model = random_model(shape_fields("10m", 2, 50), torch.bfloat16)
    assert len(model.layers) == 2 and model.config.max_position_embeddings == 50
    weight = model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16 and not weight.requires_grad
    assert weight.float().std() == pytest.approx(0.02, rel=0.02) and weight[0].unique().numel() > 50
    logits = prefill(model, torch.arange(50))[0]
    assert (model.norm.weight == 1).all() and logits.isfinite().all() and logits.std() > 0


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


# ---------------------------------------------------------------------------- the command


def test_script(run, tiny_model):
    """Without --keep the heads' own schedule, with it budgets at each length; a row's fields."""
    rows = run(f"--ckpt tiny --lengths 60,64 --seed 2 {QUICK}")  # 64: all positions, and decodes
    assert [(r["length"], r["method"]) for r in rows] == [
        (n, name) for n in (60, 64) for name in ("dense", "sdtp")
    ]
    assert rows[1]["alive"] == [60] * 2 + [48] * 3 + [30] * 3
    assert {"commit", "command", "versions", "machine"} <= rows[0].keys() and rows[0]["seed"] == 2
    rows = run(f"--ckpt tiny --heads heads/tiny --lengths 30,60 --keep 0.9,0.6 {QUICK}")
    variants = [("dense", 0.0), ("sdtp", 0.9), ("sdtp", 0.6)]
    assert [(r["length"], r["method"], r["keep"]) for r in rows] == [
        (n, *v) for n in (30, 60) for v in variants
    ]
    config, first = tiny_model.config, rows[0]
    for r in rows:
        n, schedule = r["length"], {}
        if r["keep"]:
            schedule = flops.at_keep(config, {2: 0.8, 5: 0.5}, r["keep"], n)
        assert r["alive"] == flops.alive_per_layer(schedule, n, 8)
        dense_row = first = r if r["method"] == "dense" else first
        ratio = dense_row["prefill_flops"] / r["prefill_flops"]
        assert r["flops_ratio"] == ratio and (ratio > 1) == (r["method"] == "sdtp")
        assert r["peak_bytes"] > r["kv_bytes"] and r["total_s"] > r["prefill_s"] > 0 < r["decode_s"]
        assert r["tokens_s"] == 3 / r["total_s"] and r["prefill_spread"] == 0  # one repeat
        weights = 4 * sum(p.numel() for p in tiny_model.parameters())
        peaks = weights + r["peak_bytes"], weights + dense_row["peak_bytes"]
        assert r["memory_diff"] == pytest.approx(peaks[0] / peaks[1] - 1)
    speedups = ("prefill_speedup", "decode_speedup", "total_speedup")
    assert all(rows[3][name] == 1 for name in speedups) and rows[3]["memory_diff"] == 0


def test_methods(run, tiny_model, tmp_path):
    """Two folders of heads, each scorer at the stages of each; KV compression; transformers."""
    pytest.importorskip("transformers")
    names = "random,sdtp+h2o,dense+h2o,transformers"
    flags = f"--ckpt tiny --heads heads/tiny,heads/other --methods {names} --lengths 60"
    rows = {r["method"]: r for r in run(f"{flags} {QUICK}")}
    assert list(rows) == [
        "dense",
        *("random:tiny", "sdtp+h2o:tiny", "dense+h2o"),
        *("random:other", "sdtp+h2o:other", "transformers"),
    ]
    assert rows["random:tiny"]["alive"] == rows["sdtp+h2o:tiny"]["alive"] != rows["dense"]["alive"]
    assert rows["dense+h2o"]["alive"] == rows["dense"]["alive"]
    assert rows["dense+h2o"]["kv_bytes"] == rows["dense"]["kv_bytes"] * 24 / 60  # 40 % of 60
    more = rows["dense+h2o"]["prefill_flops"] - rows["dense"]["prefill_flops"]
    assert more == 8 * 2 * 32 * (60 * 61 // 2)  # products of queries and keys once more
    assert rows["transformers"]["kv_bytes"] == rows["dense"]["kv_bytes"]
    assert rows["transformers"]["prefill_flops"] == rows["dense"]["prefill_flops"]
    tiny.checkpoint(tmp_path / "window", model_type="mistral", sliding_window=16)
    rows = run(f"--ckpt window --lengths 50 --methods transformers {QUICK}")
    assert [r["method"] for r in rows] == ["dense", "transformers"]  # which needs no stage
    assert rows[1]["kv_bytes"] < rows[0]["kv_bytes"]  # it holds the window alone


def test_shape_and_batches(run):
    """Untrained heads at the paper's stages; prompts at once, of which random has one draw each."""
    flags = "--shape 10m --layers 6 --lengths 40 --methods random,sdtp,sdtp+snapkv --batches 1,3"
    rows = run(f"{flags} {QUICK}")
    assert rows[0]["ckpt"] == "10m, 6 layers, random weights"
    one, three = rows[:4], rows[4:]
    assert [(r["method"], r["batch_size"]) for r in three] == [
        (name, 3) for name in ("dense", "random", "sdtp", "sdtp+snapkv")
    ]
    for r, r3 in zip(one, three):
        assert r3["alive"] == r["alive"] and r3["kv_bytes"] == 3 * r["kv_bytes"]
        assert r3["prefill_flops"] == 3 * r["prefill_flops"] and r3["tokens_s"] == 9 / r3["total_s"]
    assert one[2]["alive"] == flops.alive_per_layer(paper_schedule(6), 40, 6) == [40] * 4 + [36] * 2
    rows = run(f"--shape 10m --layers 2 --lengths 20 --methods dense+h2o {QUICK}")  # needs no stage
    assert [r["method"] for r in rows] == ["dense", "dense+h2o"]


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


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--shape 11m", "--shape 11m: choose 10m"),
        ("--shape 10m --heads h", "--shape and --heads"),
        ("--shape 10m --ckpt c", "--shape and --ckpt"),
        ("--layers 3", "--layers"),
        ("--marking --batches 2", "--marking and --batches"),
        ("--paper_table --seed 1", "--paper_table and --seed"),
        ("--marking --shape 10m --lengths 70", "--lengths 70"),
        ("--shape 10m --methods dense,teacher", "teacher"),
        ("--shape 10m --methods dense,transformers+h2o", "transformers.h2o"),
        ("--shape 10m --methods dense+h3o", "dense.h3o"),
        ("--shape 10m --methods dense --keep 0.9", "--keep 0.9"),
        ("--shape 10m --keep 1.5", "--keep 1.5"),
        ("--shape 10m --batches 0", "--batches 0"),
        ("--shape 10m --new_tokens 1", "--new_tokens 1"),
        ("--shape 10m --layers 3", "no stage fits"),
        ("--ckpt tiny --lengths 65", "--lengths 65"),
        ("--ckpt tiny --lengths 20 --heads heads/none", "heads/none"),
    ],
)
def test_refusals(flags, message, run, tiny_model):
    """A flag that is wrong or without effect ends in one line that names it."""
    with pytest.raises(SystemExit, match=message):
        run(flags)


def test_sdtp_needs_heads(run, tmp_path):
    """Without heads/CKPT there is no sdtp, and other methods run at the paper's stages."""
    tiny.checkpoint(tmp_path / "bare", num_hidden_layers=8)
    with pytest.raises(SystemExit, match="heads/bare"):
        run(f"--ckpt bare --lengths 40 {QUICK}")
    rows = run(f"--ckpt bare --lengths 40 --methods most_recent {QUICK}")
    assert rows[1]["alive"] == flops.alive_per_layer(paper_schedule(8), 40, 8)
