"""bench.py: FLOPs against torch's own counter, the paper's table and loops; memory against known tensors."""

import json
import sys
from functools import partial

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import bench
import bench_peer
import cli
import download
import scorers
import sdtp
from bench import SHAPES, cpu_peak_bytes, random_model, rss_bytes, shape_fields
from kv import Compression
from model import Config, Transformer
from sdtp import LateKV, PruneHead, Schedule, generate, prefill, select


def test_paper_table():
    """The formula gives the paper's table 2 within 0.1 % (dense) and 2.5 % (pruned), never exactly."""
    rows = bench.paper_table()
    assert [r["length"] for r in rows] == [4096, 8192, 16384, 32768, 65536, 131072]
    assert rows[0]["dense_paper"] == 72.51 and rows[-1]["sdtp_paper"] == 4678.81
    for r in rows:
        assert r["dense_ours"] == pytest.approx(r["dense_paper"], rel=1e-3)
        assert r["sdtp_ours"] == pytest.approx(r["sdtp_paper"], rel=0.025)
        assert r["sdtp_diff"] == pytest.approx(r["sdtp_ours"] / r["sdtp_paper"] - 1) and r["sdtp_diff"] < -0.01


def test_fit_recovers_the_rates():
    """Times made from two rates give them back; other programs' rows are not ours; a row 10 % off shows as that."""
    rows = [
        {"method": "dense", "linear_flops": n * 1e9, "attention_flops": n * n * 1e7, "prefill_s": n / 500 + n * n / 2e4}
        for n in (1, 3, 10, 300)
    ]
    others = [
        {"method": method, "linear_flops": 1e9, "attention_flops": 1e9, "prefill_s": 77.0}
        for method in ("transformers", "llama.cpp", "kvpress")
    ]
    linear, attention, deviation = bench.fit(rows + others)
    assert (linear, attention) == pytest.approx((500, 200)) and deviation < 1e-6
    rows[1]["prefill_s"] /= 1.1
    linear, attention, deviation = bench.fit(rows)
    predicted = [r["linear_flops"] / linear / 1e9 + r["attention_flops"] / attention / 1e9 for r in rows]
    assert deviation == pytest.approx(max(abs(p / r["prefill_s"] - 1) for p, r in zip(predicted, rows)))
    assert 0.03 < deviation < 0.1


def test_no_fit():
    """Two rows are solved, not fitted, and a negative rate is none."""
    rows = [
        {"method": "dense", "linear_flops": a, "attention_flops": b, "prefill_s": s}
        for a, b, s in ((1e12, 1e11, 2.0), (6.5e11, 5e10, 1.36), (3e11, 1e10, 0.66))
    ]
    assert bench.fit(rows[:2]) is None and bench.fit(rows) is None


def test_cpu_peak_bytes():
    """The peak of known tensors: what is freed leaves, what was there before does not count, temporaries do."""
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
    assert cpu_peak_bytes(lambda: x.softmax(-1, dtype=torch.float64)) == 16_000_000  # a float64 copy inside, the result
    assert cpu_peak_bytes(lambda: None) == 0


def test_cpu_peak_bytes_of_a_prefill():
    """Longer prompts hold more; the cache, which is what stays, is a part of the peak."""
    model = tiny.build(torch.float32, max_position_embeddings=256)
    peaks = []
    for n in (64, 256):
        peaks.append(cpu_peak_bytes(partial(prefill, model, tiny.ids(n))))
        assert peaks[-1] > prefill(model, tiny.ids(n))[1].nbytes()
    assert peaks[1] > 2 * peaks[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_rss_bytes():
    """A larger call shows by its size, and does not stay in the next call's figure."""
    nothing, large, after = (rss_bytes(partial(torch.ones, n)) for n in (1, 25_000_000, 1))
    assert 90_000_000 < large - nothing < 130_000_000 and after - nothing < 30_000_000


def test_timed_interleaves(monkeypatch):
    """Variants run in turn; the first round warms up on two tokens; times to the first, per later and to the last."""
    calls, now = [], [0.0]
    monkeypatch.setattr(bench, "clock", lambda model: now[0])

    def variant(name, prefill_s, decode_s):
        def call(new_tokens, on_token):
            calls.append((name, new_tokens))
            now[0] += 7 * (new_tokens == 2)  # the warm-up is slow
            for token in range(new_tokens):
                now[0] += decode_s if token else prefill_s
                on_token([0])

        return call

    seconds = bench.timed(None, {"a": variant("a", 2, 0.5), "b": variant("b", 1, 0.25)}, 5, 2)
    assert calls == [("a", 2), ("b", 2), ("a", 5), ("b", 5), ("a", 5), ("b", 5)]
    assert seconds == {"a": [(2, 0.5, 4)] * 2, "b": [(1, 0.25, 2)] * 2}


def test_timed_asks_peers():
    """A peer's own times count, but for those of the warm-up; one that fails on the way leaves what it had."""
    answers = [{"first_s": n, "per_token_s": 2 * n, "total_s": 3 * n} for n in range(4)]
    asked = {
        "a": lambda new_tokens, it=iter(answers): next(it),
        "b": lambda new_tokens, it=iter(answers[:2]): next(it, None),
    }
    assert bench.timed(None, {}, 5, 3, asked) == {"a": [(1, 2, 3), (2, 4, 6), (3, 6, 9)], "b": [(1, 2, 3)]}


def test_speed_ratios_are_per_repeat():
    """A machine that slows down from repeat to repeat leaves the ratios alone; the times are medians."""
    drift = (1, 2, 3, 10, 30)
    row = bench.speed([(2 * d, 0.5 * d, 6 * d) for d in drift], [(4 * d, 1 * d, 18 * d) for d in reversed(drift)])
    assert (row["prefill_s"], row["decode_s"], row["total_s"]) == (6, 1.5, 18) and row["prefill_spread"] == 58 / 6
    row = bench.speed([(2 * d, 0.5 * d, 6 * d) for d in drift], [(4 * d, 1 * d, 18 * d) for d in drift[:2]])
    assert (row["speedup"], row["decode_ratio"], row["total_speedup"]) == (2, 0.5, 3)


def test_heads_seconds(monkeypatch):
    """Scores and selection of every stage, and nothing of the blocks."""
    now = [0.0]

    def takes(seconds, function, *args):
        now[0] += seconds
        return function(*args)

    monkeypatch.setattr(bench, "clock", lambda model: now[0])
    monkeypatch.setattr(sdtp, "select", partial(takes, 2, select))
    model = tiny.build(torch.float32, num_hidden_layers=4)
    for block in model.layers:
        monkeypatch.setattr(block, "forward", partial(takes, 100, block.forward))
    heads = {layer: partial(takes, 5, scorers.most_recent) for layer in (1, 3)}
    assert bench.heads_seconds(model, tiny.ids(40), heads, Schedule(4, {1: 0.6, 3: 0.4})) == 2 * (5 + 2)


def test_late_is_counted(monkeypatch):
    """With a LateKV a row has what is alive and what is held apart, both in its FLOPs; kvpress keeps as much as is held; heads alone are timed."""
    model, n = tiny.build(torch.float32, num_hidden_layers=5), 40
    schedule, heads = Schedule(5, {1: 0.6, 3: 0.0}, late=True), {1: PruneHead(32), 3: LateKV(model.config, 3)}
    row = bench.work(model, tiny.ids(n), heads, schedule)
    assert row["alive"] == [40, 24, 24, 8, 8] and row["held"] == [40, 24, 24, 24, 24]
    assert row["kv_bytes"] == 2 * 16 * 4 * sum(row["held"])
    assert row["prefill_flops"] == sum(sdtp.executed_flops(model.config, n, row["alive"], heads))
    assert row["prefill_flops"] > sum(sdtp.executed_flops(model.config, n, row["alive"], {1: heads[1]}))
    compressed = bench.work(model, tiny.ids(n), heads, schedule, Compression("h2o", 0.4))
    more = Compression("h2o", 0.4).flops(model.config, row["alive"], n, row["held"])
    assert compressed["prefill_flops"] == row["prefill_flops"] + more and compressed["held"] == [16] * 5
    asked = []
    peer = type("Peer", (), {"ask": lambda self, **how: asked.append(how["compression_ratio"])})()
    bench.requests({"kvpress": peer}, tiny.ids(n), {0.9: schedule}, heads)["kvpress", 0.9]()
    assert asked == [1 - sum(row["held"]) / 5 / n]
    monkeypatch.setattr(bench, "clock", lambda model, ticks=iter([2.0, 7.0]): next(ticks))
    assert bench.heads_seconds(model, tiny.ids(n), heads, schedule) == 5


def test_transformers_generate(tmp_path):
    """transformers' loop gives the tokens of ours, one call of on_token each, and a cache of all but the last."""
    folder = tiny.write(tmp_path / "tiny")
    model = Transformer.from_pretrained(folder, torch.float32)
    reference, seen = bench.transformers_model(model, folder), []
    cache = bench.transformers_generate(reference, tiny.ids(30), 9, on_token=seen.append)
    assert [i for ids in seen for i in ids] == generate(model, tiny.ids(30), 9)[0]
    assert cache.layers[0].keys.shape == (1, 2, 30 + 8, 8)


PUBLISHED = {  # millions of parameters, from the model cards; 10m is ours
    "10m": 9.97, "135m": 134.5, "360m": 361.8, "1b": 1235.8, "llama2-7b": 6738.4, "mistral-7b": 7241.7,
    "qwen2-7b": 7615.6, "gemma-7b": 8537.7,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    """Each shape has the parameters of the model that it is named after."""
    with torch.device("meta"):
        model = Transformer(Config.from_dict(shape_fields(name, 0, 8)))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], rel=2e-3)


def test_random_model():
    """The layers and positions asked for, in the dtype asked for; weights of deviation 0.02; finite logits."""
    model = random_model(shape_fields("10m", 2, 50), torch.bfloat16)
    assert len(model.layers) == 2 and model.config.max_position_embeddings == 50
    weight = model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16 and weight.float().std() == pytest.approx(0.02, rel=0.02)
    assert (model.norm.weight == 1).all() and not weight.requires_grad and weight[0].unique().numel() > 50
    logits = prefill(model, torch.arange(50))[0]
    assert logits.isfinite().all() and logits.std() > 0


def test_extend_positions():
    """More positions change nothing of what was there, and let the model decode after a full prompt."""
    model, more = tiny.build(), tiny.build()
    bench.extend_positions(more, 30)
    assert more.config.max_position_embeddings == 64
    bench.extend_positions(more, 70)
    assert torch.equal(model(tiny.ids(64)), more(tiny.ids(64)))
    assert len(generate(more, tiny.ids(64), 6)[0]) == 6
    larger = tiny.build(max_position_embeddings=70)
    assert torch.equal(larger(tiny.ids(70)), more(tiny.ids(70)))


def run_script(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, flags.split())])
    cli.run(bench.main)


def test_script(tmp_path, monkeypatch, capsys):
    """bench.py runs dense, each --keep and transformers in one run; a row of each, a table and a figure."""
    folder = tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=8)
    flags = f"--ckpt {folder} --lengths 20,64 --new_tokens 6 --repeats 2 --keep 0.6,0.5 --transformers --dtype float32"
    run_script(monkeypatch, f"{flags} --seed 2 --json {tmp_path}/r.json --figure {tmp_path}/new/f.png")
    rows = json.loads((tmp_path / "r.json").read_text())
    variants = [("dense", None), ("sdtp", 0.6), ("sdtp", 0.5), ("transformers", None)]
    assert [(r["length"], r["method"], r["keep"]) for r in rows] == [(n, *v) for n in (20, 64) for v in variants]
    dense, pruned, half, reference = rows[4:]
    for field in ("speedup", "flops_ratio", "reached", "mean_alive", "decode_ratio", "total_speedup"):
        assert dense[field] == 1
    assert pruned["alive"] == [64] * 4 + [38] * 3 + [23] and half["alive"] == [64] * 4 + [32] * 3 + [16]
    for r in rows:
        assert r["prefill_flops"] == r["linear_flops"] + r["attention_flops"]
        assert r["reached"] == pytest.approx(r["speedup"] / r["flops_ratio"])
        assert r["kv_bytes"] == 2 * sum(r["alive"]) * 2 * 8 * 4  # keys and values of 2 heads of 8 in float32
        assert r["peak_bytes"] > r["kv_bytes"] and r["total_s"] > r["prefill_s"] > 0 and r["decode_s"] > 0
        assert r["mean_alive"] == pytest.approx(sum(r["alive"]) / 8 / r["length"])
        assert (r["heads_share"] > 0) == (r["method"] == "sdtp")
    assert half["flops_ratio"] > pruned["flops_ratio"] > 1 == reference["flops_ratio"]
    assert dense["prefill_flops"] == reference["prefill_flops"] and dense["paper_flops"] > pruned["paper_flops"]
    assert {"commit", "command", "versions", "machine"} <= dense.keys() and dense["seed"] == 2
    assert (tmp_path / "new" / "f.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    table = next(i for i, line in enumerate(lines) if line.lstrip().startswith("tokens"))
    assert len({len(line) for line in lines[table : table + 9]}) == 1 and "fit" in lines[table + 9]


def test_script_compressed(tmp_path, monkeypatch, capsys):
    """--kv adds a row to each of ours: same tokens alive, fewer bytes, the FLOPs of its scores."""
    flags = "--shape 10m --layers 3 --lengths 40 --new_tokens 3 --repeats 1 --dtype float32 --keep 0.6 --kv snapkv"
    run_script(monkeypatch, f"{flags} --kv_keep 0.85 --json {tmp_path}/r.json")
    rows = json.loads((tmp_path / "r.json").read_text())
    names = [("dense", None), ("sdtp", 0.6), ("dense+snapkv@0.85", None), ("sdtp+snapkv@0.85", 0.6)]
    assert [(r["method"], r["keep"]) for r in rows] == names
    for plain, compressed in zip(rows, rows[2:]):
        assert compressed["alive"] == plain["alive"]
        assert compressed["heads_share"] > 0 or plain["method"] == "dense"
        assert plain["held"] == plain["alive"] and compressed["held"] == [min(n, 34) for n in plain["alive"]]
        assert compressed["kv_bytes"] == 2 * sum(compressed["held"]) * 128 * 4
        over = sum(32 * n - 32 * 31 // 2 for n in plain["alive"] if n > 34) * 2 * 64 * 4
        assert compressed["attention_flops"] == plain["attention_flops"] + over > plain["attention_flops"]
        assert compressed["linear_flops"] == plain["linear_flops"]
    assert " sdtp+snapkv@0.85 0.6|" in capsys.readouterr().out


def test_script_shape(tmp_path, monkeypatch):
    """--shape: random weights with room for the longest prompt and the new tokens, beside transformers' of the shape."""
    flags = "--shape 10m --layers 3 --lengths 30 --new_tokens 3 --repeats 1 --transformers --dtype float32"
    run_script(monkeypatch, f"{flags} --json {tmp_path}/r.json")
    dense, pruned, reference = json.loads((tmp_path / "r.json").read_text())
    assert dense["ckpt"] == "10m, 3 layers, random weights" and pruned["keep"] == 0.9
    assert pruned["alive"] == [30, 27, 24] and dense["alive"] == [30] * 3
    assert reference["kv_bytes"] == dense["kv_bytes"] == 2 * 90 * 128 * 4


def test_script_paper_table(monkeypatch, capsys):
    """--paper_table prints both columns and reads no checkpoint."""
    run_script(monkeypatch, "--ckpt no/such/folder --paper_table")
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:2] == ["131072", "8864.49"] and last[4] == "4678.81" and last[6] == "-2.42%"


def test_script_batches_and_marking(tmp_path, monkeypatch):
    """--batches and --marking as commands: their rows."""
    flags = f"--shape 10m --layers 5 --repeats 1 --json {tmp_path}/r.json"
    run_script(monkeypatch, f"{flags} --batches 8,16 --new_tokens 2 --keep 0.5")
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(r["batch_size"], r["method"], r["prompts"]) for r in rows] == [
        (size, name, 16) for size in (8, 16) for name in ("dense", "sdtp 0.5")
    ]
    assert 16 * 200 < rows[0]["prompt_tokens"] < 16 * 2000 and all(r["tokens_s"] > 0 for r in rows)
    run_script(monkeypatch, f"{flags} --marking --lengths 90,120")
    assert [r["length"] for r in json.loads((tmp_path / "r.json").read_text())] == [90] * 5 + [120] * 5
    run_script(monkeypatch, f"{flags} --profile --lengths 40,70 --keep 0.5")
    rows = json.loads((tmp_path / "r.json").read_text())
    variants = [(n, name) for n in (40, 70) for name in ("dense", "sdtp 0.5")]
    assert [(r["length"], r["method"]) for r in rows] == variants
    assert all(r["product_gflops"] > 0 and r["copy_gb_s"] > 0 for r in rows)


def test_breakdown():
    """Each group holds its own operators: shares add to 1, and a call of nothing but products is nearly all products."""
    model, a = tiny.build(), torch.randn(600, 600)
    shares = bench.breakdown(model, lambda: [a @ a for _ in range(20)])
    assert sum(shares.values()) == pytest.approx(1) and shares["linear products"] > 0.8
    shares = bench.breakdown(model, lambda: [torch.bmm(a[None], a[None]) for _ in range(20)])
    assert shares["attention products"] > 0.8
    shares = bench.breakdown(model, lambda: [a.softmax(-1) for _ in range(20)])
    assert shares["softmax"] > 0.8
    shares = bench.breakdown(model, lambda: [(a.clone(), a * a) for _ in range(20)])
    assert shares["copies, casts, gathers"] + shares["element-wise"] > 0.8


def test_machine_limits(monkeypatch):
    """Rates are work over seconds: with a clock that ticks once a call, the work itself."""
    model = tiny.build(torch.float32)
    ticks = iter(range(1000))
    monkeypatch.setattr(bench, "clock", lambda model: next(ticks))
    weight = model.layers[0].mlp.gate_proj.weight
    product, copy = bench.machine_limits(model, size=1000)
    assert product == pytest.approx(2 * 2048 * weight.numel() / 1e9) and copy == pytest.approx(8000 / 1e9)


@pytest.mark.parametrize("flags", ["--batches 1 --marking", "--profile --marking", "--profile --transformers"])
def test_script_one_run_at_a_time(flags, monkeypatch):
    """Flags that ask for different runs are refused by name."""
    with pytest.raises(SystemExit, match=f"{flags.split()[-1]}"):
        run_script(monkeypatch, f"--shape 10m {flags}")


def test_throughput(monkeypatch):
    """Every prompt runs once per batch size and method; rates follow from the ticks of each batch."""
    model, calls, generate_ = tiny.build(torch.float32), [], bench.generate
    prompts = [tiny.ids(n) for n in (9, 20, 5)]
    monkeypatch.setattr(bench, "generate", lambda *a, **k: calls.append((k["seqlens"], a[4])) or generate_(*a, **k))
    ticks = iter(range(1000))
    monkeypatch.setattr(bench, "clock", lambda model: float(next(ticks)))
    schedule = Schedule(3, {1: 0.5})
    variants = {"dense": (None, None), "sdtp": ({1: PruneHead(32)}, schedule)}
    rows = bench.throughput(model, prompts, variants, [1, 2], new_tokens=4, repeats=1)
    one, two = [[9], [20], [5]], [[9, 20], [5]]
    once = [(b, s) for size in (one, two) for s in (None, schedule) for b in size]
    assert calls == once + once  # the first round is a warm-up
    for row, batches in zip(rows, (3, 3, 2, 2), strict=True):  # a tick per token of a batch, the first by the prefill
        assert (row["prefill_s"], row["decode_s"]) == (batches, 3 * batches)
        assert row["decode_tokens_s"] == 9 / (3 * batches) and row["tokens_s"] == 12 / (4 * batches)
        assert row["of_first"] == 3 / batches
    assert [(r["batch_size"], r["method"]) for r in rows] == [(1, "dense"), (1, "sdtp"), (2, "dense"), (2, "sdtp")]


def test_marking(monkeypatch):
    """One row each for the prefill, for labels without and with recomputed blocks, and for both kinds of steps; multiples are of the prefill."""
    model, calls, label = tiny.build(torch.float32), [], bench.saliency.label
    monkeypatch.setattr(bench.saliency, "label", lambda *a: calls.append(a[3:]) or label(*a))
    steps, step = [], bench.train.train_step
    monkeypatch.setattr(bench.train, "train_step", lambda *a: steps.append((a[4], *step(*a))) or {})
    ticks = iter(t for _ in range(3) for t in (0, 2, 0, 5, 0, 8, 0, 6, 0, 10))
    monkeypatch.setattr(bench, "clock", lambda model: next(ticks))
    rows = bench.marking(model, tiny.ids(30), [1, 2], repeats=2, response=10)
    assert [(r["seconds"], r["multiple"]) for r in rows] == [(2, 1), (5, 2.5), (8, 4), (6, 3), (10, 5)]
    ours, paper = ([s for s in steps if (len(s[0]) == 2) == both] for both in (False, True))
    assert len(ours) == len(paper) == 4 and "list" in ours[0] and "lm" not in ours[0] and "lm" in paper[0]
    assert set(map(str, calls)) == {str(("grad_norm", [30], [20], again)) for again in (False, True)}
    assert all(r["peak_bytes"] > 0 and r["length"] == 30 for r in rows)
    assert rows[2]["peak_bytes"] < rows[1]["peak_bytes"]


FAKE = '''#!{python}
"""A peer's python: notes how it was called, then answers each request by `answer`."""
import json, sys
from pathlib import Path

where = Path(__file__).parent
with open(where / "asked", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
for line in sys.stdin:
    request = json.loads(line)
    with open(where / "asked", "a") as file:
        print(line.strip(), file=file)
    {answer}
'''
GOOD = """print(json.dumps({"first_s": 2.0, "per_token_s": 0.001, "total_s": 5.0, "kv_bytes": len(request["ids"]),
        "rss_bytes": 7 * 2**20, "first_token": 99}), flush=True)"""


def fake_peer(folder, name, answer=GOOD):
    """An environment of --peers whose python is FAKE. Returns the file of what it was asked."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE.replace("{python}", sys.executable).replace("{answer}", answer))
    python.chmod(0o755)
    return python.with_name("asked")


def run_peers(tmp_path, monkeypatch, capsys, lengths="20,40"):
    """bench.py --peers on a tiny checkpoint: its rows of the peers, and what it printed."""
    folder = tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=8)
    flags = f"--ckpt {folder} --lengths {lengths} --new_tokens 6 --repeats 3 --keep 0.6,0.5 --dtype float32"
    run_script(monkeypatch, f"{flags} --peers {tmp_path} --json {tmp_path}/r.json --figure {tmp_path}/f.png")
    rows = json.loads((tmp_path / "r.json").read_text())
    assert {(r["length"], r["method"]) for r in rows} >= {
        (int(n), m) for n in lengths.split(",") for m in ("dense", "sdtp")
    }
    assert len({tuple(sorted(r)) for r in rows}) == 1  # the same keys
    return [r for r in rows if r["method"] not in ("dense", "sdtp")], capsys.readouterr().out


def test_peers(tmp_path, monkeypatch, capsys):
    """Peers are asked in turn, a warm-up first; their rows hold what they answer; a strange first token is a warning."""
    asked = [fake_peer(tmp_path, name) for name in ("llama.cpp", "kvpress")]
    rows, out = run_peers(tmp_path, monkeypatch, capsys)
    expected = [("llama.cpp", None), ("kvpress", 0.6), ("kvpress", 0.5)]
    assert [(r["length"], r["method"], r["keep"]) for r in rows] == [(n, *v) for n in (20, 40) for v in expected]
    for r in rows:
        assert (r["prefill_s"], r["decode_s"], r["total_s"], r["kv_bytes"]) == (2, 0.001, 5, r["length"])
        assert (r["peak_bytes"], r["rss_bytes"], r["mean_alive"], r["flops_ratio"]) == (None, 7 * 2**20, 1, 1)
        assert 0 < r["speedup"] == r["reached"] < 1
    for file, name, variants in zip(asked, ("llama.cpp", "kvpress"), (1, 2)):
        call, check, *requests = map(json.loads, file.read_text().splitlines())
        assert call[0] == "-I" and call[1].endswith("bench_peer.py") and call[2:4] == [name, str(tmp_path / "tiny")]
        assert call[call.index("--threads") + 1] == str(torch.get_num_threads())
        assert len(check["ids"]) == 40 and check["new_tokens"] == 1
        assert [(len(r["ids"]), r["new_tokens"]) for r in requests] == [
            (n, new) for n in (20, 40) for new in (2, 6, 6, 6, 1) for _ in range(variants)
        ]
        assert f"of LICENSE {name} says 99" in out
    alive = {keep: sum(Schedule(8).with_ratio(keep).alive(40)) / 8 / 40 for keep in (0.6, 0.5)}
    assert [r["compression_ratio"] for r in requests[-2:]] == pytest.approx([1 - alive[0.6], 1 - alive[0.5]])
    table = [line for line in out.splitlines() if line.lstrip()[:3] in ("20 ", "40 ", "tok")]
    assert len(table) == 13 and len({len(line) for line in table}) == 1 and "5.00" in table[4] and " - " in table[4]


def test_peers_that_are_missing_or_crash(tmp_path, monkeypatch, capsys):
    """A missing environment and a crash, at the start or later, are a line each; the run and other peers go on."""
    later = """if request["new_tokens"] == 6: raise ValueError("out of luck")\n    """ + GOOD
    fake_peer(tmp_path, "kvpress", later)
    rows, out = run_peers(tmp_path, monkeypatch, capsys)
    assert not rows
    assert f"python -m venv {tmp_path}/llama.cpp && {tmp_path}/llama.cpp/bin/pip install llama-cpp-python==" in out
    assert out.count("no kvpress from here on: it ended with status 1: ValueError: out of luck") == 1
    fake_peer(tmp_path, "llama.cpp")
    (tmp_path / "kvpress" / "bin" / "python").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such model')\n")
    rows, out = run_peers(tmp_path, monkeypatch, capsys, "20")
    assert [r["method"] for r in rows] == ["llama.cpp"]
    assert out.count("no kvpress") == 1 and "status 1: no such model" in out
    (tmp_path / "kvpress" / "bin" / "python").write_text("#!/no/such/interpreter\n")
    assert "no kvpress" in run_peers(tmp_path, monkeypatch, capsys, "20")[1]


def test_peers_are_for_a_checkpoint(monkeypatch):
    with pytest.raises(SystemExit, match="--peers"):
        run_script(monkeypatch, "--peers x --shape 10m")
    with pytest.raises(SystemExit, match="--peers"):
        run_script(monkeypatch, "--peers x --marking")


def test_bench_peer_answers(monkeypatch):
    """Times to the first token, per later token and to the last; the first token; what the prompt's cache holds."""
    ticks = iter((10.0, 12.0, 12.5, 13.5))
    monkeypatch.setattr(bench_peer, "perf_counter", lambda: next(ticks))
    got = bench_peer.answer(lambda ids, new_tokens: iter([5, 6, 7][:new_tokens]), lambda ids: 8 * len(ids), [1, 2], 3)
    assert (got["first_s"], got["per_token_s"], got["total_s"]) == (2, 0.75, 3.5)
    assert (got["first_token"], got["kv_bytes"]) == (5, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bench_peer_reads_safetensors(tmp_path, dtype):
    """Every tensor of every file, to the bit, in the dtypes of checkpoints."""
    state = {f"{i}.weight": torch.randn(3 + i, 5).to(dtype) for i in range(3)}
    save_file({k: state[k] for k in ("0.weight", "1.weight")}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file({"2.weight": state["2.weight"], "rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "b.safetensors")
    read = dict(bench_peer.read_safetensors(tmp_path))
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(torch.from_numpy(read[name].copy()).to(dtype), tensor)


def test_bench_peer_gguf(tmp_path):
    """Its GGUF comes back as the checkpoint through download.py's names and row order; other models are refused."""
    gguf = pytest.importorskip("gguf")
    folder = tiny.write(tmp_path / "tiny", tie_word_embeddings=True)
    reader = gguf.GGUFReader(bench_peer.write_gguf(folder, tmp_path / "t.gguf", "bfloat16"))
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    state = load_file(folder / "model.safetensors")
    assert len(reader.tensors) == len(state.keys() - {"lm_head.weight"})
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if (part := tensor.name.split(".")[-2]) in heads:
            weight = download.unpermute(weight, heads[part])
        expected = state[download.hf_name(tensor.name)]
        expected = expected.bfloat16().float() if expected.dim() == 2 else expected
        assert torch.equal(torch.from_numpy(weight.copy()), expected), tensor.name
    assert not list(tmp_path.glob(".t.gguf*"))
    with pytest.raises(SystemExit, match="qwen2"):
        bench_peer.write_gguf(tiny.write(tmp_path / "other", model_type="qwen2"), tmp_path / "o.gguf", "bfloat16")
