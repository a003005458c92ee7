"""study.py: a study killed and resumed, its table from eval.json, and the schedule search against brute force."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

import cli
import study
from data import Example
from sdtp import PruneHead, Schedule
from study import StudyConfig, allocate, arguments, collect, flops_of, one_stage, table

FLAGS = "--first_layer 1 --step 1 --prompt_len 30 --score_len 8 --batch_tokens 80 --checkpoint_every 10 --epochs 4"
TWO = {
    "two": {"a": {"seed": 1}, "b, longer": {"seed": 1, "epochs": 8, "norm": False}, "left out": {"max_prompts": 50}},
    "big": {"a": {"max_prompts": 50}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    tiny.checkpoint(folder / "tiny", max_position_embeddings=256)
    words = torch.randint(0, 40, (4200,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text("".join(tiny.ALPHABET[3 + w] for w in words))
    return folder


def argv(world, name, *more):
    flags = f"--ckpt {world}/tiny --data {world}/text.txt --out_dir {world}/out --label_cache {world}/labels"
    flags += f" --results {world}/results --dtype float32 --device cpu"
    return ["study.py", name, *flags.split(), *more]


def run(patch, *arguments):
    patch.setattr(sys, "argv", argv(*arguments))
    patch.setattr(study, "STUDIES", TWO)
    patch.setenv("MPLBACKEND", "Agg")
    cli.run(study.main)


def test_killed_and_resumed(world, monkeypatch, capsys):
    """kill -9 of a study in its second variant: it goes on there, the first is not run again, other flags are refused."""
    here = Path(study.__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(here)}
    more = ("--limit", "20", "--eval_prompts", "2", f"--flags={FLAGS}")
    code = f"import cli, study; study.STUDIES = {TWO!r}; cli.run(study.main)"
    command = [sys.executable, "-c", code, *argv(world, "two", *more)[1:]]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, cwd=world, start_new_session=True)
    out, log = world / "out" / "two", world / "out" / "two" / "b__longer" / "log.jsonl"
    try:
        while not log.is_file() or log.read_text().count("\n") < 12:
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (log.parent / "eval.json").exists() and (log.parent / "checkpoint.safetensors").is_file()
    assert len(json.loads((world / "results" / "two.json").read_text())) == 1  # what was done is written
    first = (out / "a" / "stdout.log").read_text()

    run(monkeypatch, world, "two", *more)
    assert (out / "a" / "stdout.log").read_text() == first and "left out: left out" in capsys.readouterr().out
    starts = [line for line in (log.parent / "stdout.log").read_text().splitlines() if "steps to go" in line]
    left = [int(line.split(", ")[1].split()[0]) for line in starts]
    assert len(left) == 2 and left[1] < left[0] == 80 and left[1] % 10 == 0
    rows = json.loads((world / "results" / "two.json").read_text())
    assert [r["variant"] for r in rows] == ["a", "b, longer"] and {"commit", "run_commit"} <= rows[0].keys()
    for row, name in zip(rows, ("a", "b__longer"), strict=True):
        by_method = {r["method"]: r for r in json.loads((out / name / "eval.json").read_text())}
        assert row["ppl_diff"] == by_method["sdtp"]["ppl_diff"] and row["prompts"] == 20
        ratio = (1 + row["ppl_diff"]) / (1 + rows[0]["ppl_diff"])
        assert (
            row["over_first"] == pytest.approx(ratio - 1)
            and row["over_first_low"] <= ratio - 1 <= row["over_first_high"]
        )
    measured = [json.loads(line)["method"] for line in (out / "rows.jsonl").read_text().splitlines()]
    assert (measured.count("dense"), measured.count("sdtp")) == (2, 4)  # two prompts, two variants
    assert {*measured} == {"dense", "sdtp", "teacher"}
    assert (world / "results" / "two.png").read_bytes()[:4] == b"\x89PNG"
    assert table(rows) in (world / "results" / "two.md").read_text()
    with pytest.raises(SystemExit, match="a holds a run with other flags"):
        run(monkeypatch, world, "two", *more, "--limit", "10")


def test_a_variant_that_begins_with_anothers_heads(world, monkeypatch):
    """Its --init is that variant's folder of heads; a variant's own flags win over --flags."""
    asked = []
    monkeypatch.setattr(cli, "run_logged", lambda script, flags, log: asked.append(flags))
    monkeypatch.setattr(
        study, "collect", lambda variant, out: ({"variant": variant, "eval_prompts": 1}, [{"value": 1, "count": 1}])
    )
    monkeypatch.setattr(study, "draw", lambda *_: None)
    three = {"three": {"a, b": {"epochs": 3}, "after": {"init": "a, b", "lr": 1e-3}}}
    monkeypatch.setattr(study, "STUDIES", three)
    monkeypatch.setattr(sys, "argv", argv(world, "three", "--flags=--lr 1 --epochs 2"))
    cli.run(study.main)
    first, after = (dict(zip(flags, flags[1:])) for flags in asked)  # of a flag given twice the last, as argparse
    assert "--init" not in first and (first["--epochs"], first["--lr"]) == ("3", "1")
    assert (after["--init"], after["--epochs"], after["--lr"]) == (f"{world}/out/three/a__b/heads", "2", "0.001")


def test_a_variant_that_fails(world, monkeypatch):
    """The study ends in one line with the run's last; flags of a run that never began may be given anew."""
    (world / "fails").write_text("#!/bin/sh\nprintf '\\377first\\n'\necho train.py: no such flag\nexit 1\n")
    (world / "fails").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(world / "fails"))
    for limit in ("20", "10"):
        with pytest.raises(SystemExit, match="variant 'a' failed with status 1, see .*log: train.py: no such flag"):
            run(monkeypatch, world, "two", "--limit", limit, "--out_dir", str(world / "failed"))


def test_no_variant_is_left(world, monkeypatch):
    with pytest.raises(SystemExit, match="--limit 20 leaves out every variant of big"):
        run(monkeypatch, world, "big", "--limit", "20")


def test_collect_and_table(tmp_path):
    """A row by hand: heads' and teacher's figures, the mean of the log's last tenth; the heads' own results, and no others."""
    (tmp_path / "a" / "heads").mkdir(parents=True)
    (tmp_path / "a" / "heads" / "heads.json").write_text(
        '{"prompts": 7, "sha256": "c0de", "span": 8, "schedule": {"0": 0.5}}'
    )
    same = {"method": "sdtp", "sha256": "c0de", "span": 8, "schedule": {"0": 0.5}}
    ours = [same | {"value": v} for v in (1, 2, 3)]
    others = [
        same | part for part in ({"sha256": "another"}, {"span": 1}, {"schedule": {"0": 0.4}}, {"method": "sdtp+h2o"})
    ]
    others.append({"method": "dense", "value": 6})
    for key, result in enumerate([*ours, *others]):
        result["key"] = str(key)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (ours[0], *others, *ours[1:])))
    origin = {"prompts": 3, "commit": "c", "command": "python train.py", "mean_alive": 0.5, "flops_share": 0.4}
    sdtp = {"method": "sdtp", "ppl_diff": 0.25, "low": 0.125, "high": 0.5, **origin}
    evaluated = [{"method": "teacher", "ppl_diff": -0.0625}, sdtp]
    (tmp_path / "a" / "eval.json").write_text(json.dumps(evaluated))
    log = [{"step": i, "overlap": 0.25 * (i >= 18) + 0.5 * (i == 19), "list": i} for i in range(20)]
    (tmp_path / "a" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    row, results = collect("a", tmp_path / "a")
    assert results == ours
    (tmp_path / "rows.jsonl").write_text(json.dumps(others[0]) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl has 0 results of .*a's heads: delete"):
        collect("a", tmp_path / "a")
    assert row["overlap"] == 0.5 and row["list"] == 18.5 and row["teacher_ppl_diff"] == -0.0625 and row["prompts"] == 7
    bare = {k: v for k, v in row.items() if k != "list"} | {"variant": "b"}
    assert table([row, bare]).splitlines() == [
        "| variant | prompts | overlap | L_list | PPL difference | 95 % interval | of the teacher | mean alive | FLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| a | 7 | 0.500 | 18.500 | +25.0% | +12.5% to +50.0% | -6.2% | 0.500 | 0.400 |",
        "| b | 7 | 0.500 |  | +25.0% | +12.5% to +50.0% | -6.2% | 0.500 | 0.400 |",
    ]


def test_studies_are_flags_of_train():
    """Every variant of every study is understood by train.py, and variants of a study have folders of their own."""
    import train

    for variants in study.STUDIES.values():
        assert len({study.slug(v) for v in variants}) == len(variants)
        for fields in variants.values():
            config = cli.parse(train.TrainConfig, "", arguments(fields))
            assert all(getattr(config, name) == value for name, value in fields.items())
            train.check_flags(config)
            train.make_schedule(config, 30)


def all_schedules(damage, depth):
    """Every {layer: share alive from there on}, by enumeration."""
    layers = sorted(damage)
    for alive in itertools.product([1.0, *next(iter(damage.values()))], repeat=len(layers)):
        if all(a >= b for a, b in itertools.pairwise(alive)):
            yield dict(zip(layers, alive, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_allocate_equals_brute_force(seed):
    """The cheapest damage of all schedules within the budget, on random damages and costs."""
    draw, depth, shares = random.Random(seed), 9, (0.8, 0.5, 0.3, 0.1)
    cost = {s: s + 0.3 * s * s for s in (1.0, *shares)}
    damage = {}
    for layer in sorted(draw.sample(range(depth), 4)):
        damage[layer] = dict(zip(shares, sorted(draw.random() for _ in shares), strict=True))
    budget = draw.uniform(0.5, 1) * depth * cost[1.0]

    def flops_and_nats(alive):
        flops = nats = 0.0
        share = 1.0
        for layer in range(depth):
            after = alive.get(layer, share)
            if after < share:
                nats += damage[layer][after] - damage[layer].get(share, 0.0)
            share = after
            flops += cost[share]
        return flops, nats

    within = [v for v in map(flops_and_nats, all_schedules(damage, depth)) if v[0] <= budget]
    if not within:
        with pytest.raises(ValueError, match="no schedule"):
            allocate(damage, cost, depth, budget)
        return
    flops, nats = flops_and_nats(allocate(damage, cost, depth, budget))
    assert flops <= budget + 1e-9 and nats == pytest.approx(min(v[1] for v in within), abs=1e-12)


def test_sensitivities(monkeypatch):
    """The nats lost at a layer never fall as its share falls: what chance has made less is the share's before."""
    loss = iter([0.1, -0.2, 0.05, 0.3])
    monkeypatch.setattr(study, "difference", lambda *args: {"ppl_diff": next(loss)})
    alone = [(1, 0.8), (1, 0.5), (4, 0.8), (4, 0.5)]
    rows, damage = study.sensitivities(alone, [None] * 4, None, [])
    assert [row["ppl_diff"] for row in rows] == [0.1, -0.2, 0.05, 0.3]
    expected = {1: {0.8: 0.1, 0.5: 0.1}, 4: {0.8: 0.05, 0.5: 0.3}}
    assert damage == {i: {s: pytest.approx(math.log1p(v)) for s, v in by.items()} for i, by in expected.items()}


def test_one_stage_costs_the_same():
    model = tiny.build(num_hidden_layers=5, max_position_embeddings=512)
    for shares in ({1: 0.7}, {0: 0.9, 2: 0.6}, {2: 0.6, 4: 0.5}):
        flops = flops_of(Schedule(5, shares), 500, model)
        single = one_stage(1, flops, 500, model)
        count = single.alive(500)[1]
        assert flops <= flops_of(single, 500, model) < flops + 4 * study.block_flops(model, 1) * 3
        assert single.alive(500)[0] == 500 and count == single.alive(500)[4]


def test_measured_once(tmp_path, monkeypatch):
    """What is kept of a prompt is for these heads' weights, whatever their folder is called."""
    model, config = tiny.build(), StudyConfig(scorer="sdtp", span=1)
    heads, examples = {1: PruneHead(model.config.hidden_size)}, [Example(tiny.ids(40).tolist(), [5, 6, 7])]

    score, asked = study.eval_tasks.score, []
    monkeypatch.setattr(study.eval_tasks, "score", lambda *a: asked.append(1) or score(*a))

    def nats():
        ((value,),) = study.measure(model, examples, [{1: 0.4}], config, heads, tmp_path / "nats.json")
        return value, len(asked)

    first = nats()
    config.heads, config.ckpt = "elsewhere", "other name"
    assert nats() == first and first[1] == 1
    heads[1].fc1.weight.data.neg_()
    assert nats()[1] == 2


def test_schedule(world, monkeypatch, capsys):
    """The search on the tiny checkpoint: the schedule found is no worse than one stage in the model's own terms; a second run measures nothing."""
    more = "--prompts 3 --prompt_len 40 --layers 0,1,2 --shares 0.8,0.6,0.4 --first_layer 0 --span 4".split()
    run(monkeypatch, world, "schedule", *more)
    out = capsys.readouterr().out
    assert "prompt 3/3: 10 schedules" in out and "prompt 3/3: 3 schedules" in out
    rows = json.loads((world / "results" / "schedule.json").read_text())
    assert len(rows) == 9 + 3 and [r["variant"].split(",")[0] for r in rows[9:]] == [
        "found",
        "one stage",
        "found over one stage",
    ]
    assert rows[9]["flops_share"] == pytest.approx(rows[10]["flops_share"], rel=0.05)
    assert rows[11]["ppl_diff"] == pytest.approx((1 + rows[9]["ppl_diff"]) / (1 + rows[10]["ppl_diff"]) - 1)
    assert (world / "results" / "schedule.png").is_file()
    run(monkeypatch, world, "schedule", *more)
    assert "prompt 3/3" not in capsys.readouterr().out
    assert json.loads((world / "results" / "schedule.json").read_text()) == rows
    for flags, named in ((("--scorer", "magic"), "magic: choose"), (("--layers", "a"), "numbers"), (("--prompts", "99"), "twice as many")):  # fmt: skip
        with pytest.raises(SystemExit, match=named):
            run(monkeypatch, world, "schedule", *more, *flags)
    with pytest.raises(SystemExit, match="which study"):
        run(monkeypatch, world, "magic")
