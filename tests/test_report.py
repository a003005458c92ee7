"""report.py: its parts are what the scripts understand, run once, and end in the tables worked out here by hand."""

import contextlib
import json
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

import bench
import cli
import eval_tasks
import report
from model import Transformer
from sdtp import PruneHead, Schedule, save_heads

ROOT = Path(report.__file__).parent
ORIGIN = {"command": "python x.py", "commit": "c0ffee", "machine": "abacus", "versions": "v", "dtype": "float32"}
COST = {"keep": 0.0, "mean_alive": 0.5, "flops_share": 0.4, "compression": 2.0}
BOOLQ = {"task": "boolq", "num_fewshot": 0, "documents": 9, "score": 0.625, "diff": -0.125, "low": -0.25, "high": 0.125}
LONGBENCH = {"n": 7, "score": 30.5, "diff": -1.5, "diff_low": -3.0, "diff_high": 0.5, "method": "sdtp", **COST}
OTHERS = {  # rows of what is not run here
    "tasks": [{**BOOLQ, "method": "sdtp", **COST, **ORIGIN}],
    "longbench": [
        {
            "set": name,
            "sets": sets,
            **{k: v for k, v in LONGBENCH.items() if k not in ("keep", "compression")},
            **ORIGIN,
        }
        for name, sets in (("qasper", 1), ("AVG", 14), ("all", 1))
    ],
}
FLAGS = "--ckpt tiny --lengths 20,40 --text text.txt --data text.txt --methods sdtp,teacher --keep 0.9,0.5 --limit 2"
QUICK = ["--new_tokens", "3", "--repeats", "1"]
FLAGS = f"{FLAGS} --out_dir out --dtype float32 --device cpu".split()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a tiny checkpoint, heads and a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=6, max_position_embeddings=2048)
    torch.manual_seed(0)
    model, schedule = Transformer.from_pretrained(tmp_path / "tiny", torch.float32), Schedule(6, {2: 0.7, 4: 0.3})
    save_heads(tmp_path / "heads" / "tiny", {layer: PruneHead(32) for layer in schedule}, model, schedule, ckpt="tiny")
    words = torch.randint(0, 40, (30_000,), generator=torch.Generator().manual_seed(1)).tolist()
    (tmp_path / "text.txt").write_text("".join(tiny.ALPHABET[3 + w] for w in words))
    return tmp_path


@pytest.fixture
def run(world, monkeypatch):
    """Run report.py with the scripts in this process, tasks and LongBench by their rows alone; returns the parts that ran.

    broken: a part whose script fails after it has written.
    """

    def script(*flags, broken=None):
        ran = []

        def in_process(command, stdout=None, **how):
            if command[0] == "git":
                return subprocess.run(command, **how)
            name = Path(stdout.name).parent.name
            ran.append(name)
            stdout.write(b"begins\n")
            if name in OTHERS:
                file = "scores.json" if name == "longbench" else "rows.json"
                Path(stdout.name).with_name(file).write_text(json.dumps(OTHERS[name]))
            else:
                with monkeypatch.context() as patch, contextlib.redirect_stdout(None):
                    patch.setattr(sys, "argv", [*command[1:], *QUICK * (name == "speed")])
                    runpy.run_path(command[1], run_name="__main__")
            stdout.write(b"x.py: it broke\n" if name == broken else b"")
            return SimpleNamespace(returncode=int(name == broken))

        monkeypatch.setattr(cli, "subprocess", SimpleNamespace(run=in_process))
        monkeypatch.setattr(sys, "argv", ["report.py", *FLAGS, *flags])
        try:
            cli.run(report.main)
        except SystemExit as end:
            return ran, end.code
        return ran, None

    return script


def cells(text, *columns):
    """{first cell: cells of these columns} of the first Markdown table in a text that has them."""
    for block in text.split("\n\n"):
        head, *lines = (line.strip("| ").split(" | ") for line in block.splitlines())
        if lines and set(columns) <= set(head):
            return {line[0]: [line[head.index(c)] for c in columns] for line in lines[1:]}
    raise AssertionError(f"no table of {columns}")


def test_report(world, run):
    """bench.py and eval_tasks.py as they are: every figure of the report against the rows that they wrote."""
    assert run() == (["speed", "text", "copying"], None)
    text, rows = (world / "out" / "report.md").read_text(), {}
    for part in ("speed", "text", "copying"):
        rows[part] = json.loads((world / "out" / part / "rows.json").read_text())
        assert (
            f"- {part}: `{rows[part][0]['command']}`, commit {rows[part][0]['commit']}, {rows[part][0]['machine']}"
            in text
        )
    for part, flag in {"tasks": "tasks_dir", "longbench": "longbench"}.items():
        assert f"- {part}: not measured, --{flag} was not given" in text
    assert re.search("## 5.*\n\nNot measured.", text) and re.search("## 8.*\n\nNot measured.", text)
    for image in re.findall(r"\]\((.*?)\)", text):
        assert (world / "out" / image).read_bytes()[:4] == b"\x89PNG"
    assert len(re.findall(r"!\[", text)) == 4

    plain = text[text.index("### plain text") : text.index("### copying")]
    found = cells(plain, "prompts", "PPL", "PPL difference", "loss", "loss difference", "1/tau")
    assert list(found) == ["dense", "sdtp, r = 0.9", "teacher, r = 0.9", "sdtp, r = 0.5", "teacher, r = 0.5"]
    for r in rows["text"]:
        assert found[report.label(r)] == [
            "2", f"{r['ppl']:.2f}", f"{r['ppl_diff']:+.1%}", f"{r['loss']:.3f}", f"{r['loss_diff']:+.3f}",
            f"{r['compression']:.2f}x",
        ]  # fmt: skip

    times = text[text.index("## 3.") :]
    long = [r for r in rows["speed"] if r["length"] == 40]
    table = cells(times, "tokens", "speedup", "end-to-end speedup")
    for r in long:  # the later rows of a name
        assert table[report.label(r)] == ["40", f"{r['speedup']:.2f}x", f"{r['total_speedup']:.2f}x"]
    kv = cells(text[text.index("## 4.") :], "KV")["sdtp, r = 0.5"][0]
    assert kv.endswith(f"({long[2]['kv_bytes'] / long[0]['kv_bytes'] - 1:+.1%})") and "(-" in kv

    stages = cells(text[text.index("## 1") :], "alive from layer", "mean alive")
    assert len(stages) == 6 and {name.split(", r")[0] for name in stages} == {
        "plain text, sdtp", "copying prompts, sdtp", "40 tokens, sdtp"
    }  # fmt: skip
    measured = map(json.loads, (world / "out" / "text" / "results.jsonl").read_text().splitlines())
    measured = [r["alive"] for r in measured if (r["method"], r["keep"]) == ("sdtp", 0.5)]
    shares = [statistics.fmean(alive[layer] for alive in measured) / 1024 for layer in (0, 2, 4)]
    assert stages["plain text, sdtp, r = 0.5"][0] == ", ".join(f"{i}: {s:.1%}" for i, s in zip((0, 2, 4), shares))


def test_finished_failed_and_other_flags(world, run, capsys):
    """Finished parts are not run again, a failed one is, in the same folder; other flags are refused before anything runs."""
    more = ("--lengths", "", "--data", "", "--tasks_dir", "d", "--longbench", "l", "--methods", "sdtp", "--keep", "0.9")
    ran, error = run(*more, broken="tasks")
    assert ran == ["tasks", "text", "longbench"] and error.startswith("report.py: without tasks, see above")
    line = "tasks: failed with status 1, see out/tasks/stdout.log: x.py: it broke"
    assert line in capsys.readouterr().out.splitlines()
    text = (world / "out" / "report.md").read_text()
    assert (
        f"- {line}\n" in text
        and re.search("## 5.*\n\nNot measured.", text)
        and "- copying: not measured, --data" in text
    )
    assert list(cells(text[text.index("## 8") :], "documents")) == [
        "AVG, sdtp",
        "all, sdtp",
    ]  # of groups, not of each set
    columns = ("score", "to dense", "95 % interval to dense", "mean alive")
    assert cells(text, *columns)["AVG, sdtp"] == ["30.50", "-1.50", "-3.00 to +0.50", "0.500"]

    assert run(*more) == (["tasks"], None)
    text = (world / "out" / "report.md").read_text()
    assert cells(text, *columns)["boolq, 0-shot, sdtp"] == ["62.50", "-12.50", "-25.00 to +12.50", "0.500"]
    assert run(*more) == ([], None) and (world / "out" / "report.md").read_text() == text
    ran, error = run(*more, "--limit", "1", "--data", "text.txt")
    assert not ran and "out/tasks holds a run with other flags" in error
    flags = json.loads((world / "out" / "text" / "flags.json").read_text())
    (world / "out" / "text" / "flags.json").write_text(json.dumps(flags | {"finished": False}))
    assert run(*more)[0] == ["text"]
    heads = world / "heads" / "tiny" / "heads.json"
    heads.write_text(heads.read_text() + " ")
    ran, error = run(*more)
    assert not ran and "out/tasks holds a run with heads that have changed since" in error


def test_a_part_that_wrote_nothing(world, run):
    """Its flags may be given anew; the scripts' own one line is in the report."""
    few = ("--lengths", "", "--data", "", "--heads")
    assert run("--lengths", "", "--text", "", "--data", "")[1].startswith(
        "report.py: nothing to measure: give --lengths"
    )
    ran = []

    def fails(command, stdout=None, **how):
        if command[0] == "git":
            return subprocess.run(command, **how)
        ran.append(command)
        stdout.write(b"eval_tasks.py: heads/none/heads.json does not exist\n")
        return SimpleNamespace(returncode=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "subprocess", SimpleNamespace(run=fails))
        patch.setattr(sys, "argv", ["report.py", *FLAGS, *few, "heads/none"])
        with pytest.raises(SystemExit, match="without text"):
            cli.run(report.main)
    assert len(ran) == 1
    assert (
        "stdout.log: eval_tasks.py: heads/none/heads.json does not exist" in (world / "out" / "report.md").read_text()
    )
    assert run(*few, "heads/tiny") == (["text"], None)


def test_largest():
    """Among the budgets whose difference is below 5 %: not the smallest difference, nor the largest compression of all."""
    names = ("method", "keep", "compression", "ppl_diff", "low", "high")
    rows = [
        ("dense", 0.9, 1.0, 0.0, 0.0, 0.0),
        ("sdtp", 0.9, 1.5, 0.049, 0.02, 0.08),
        ("norm", 0.9, 1.5, 0.05, 0.0, 0.1),
    ]
    rows += [
        ("dense", 0.8, 1.0, 0.0, 0.0, 0.0),
        ("sdtp", 0.8, 2.0, 0.2, 0.1, 0.3),
        ("sdtp", 0.95, 1.2, -0.01, -0.02, 0.0),
    ]
    assert list(report.largest([dict(zip(names, row, strict=True)) for row in rows])) == [
        "- sdtp, r = 0.9: 1.50x, PPL +4.9% [+2.0%, +8.0%]",
        "- norm: none of those measured",
    ]


def test_alive_shares(tmp_path):
    """By hand: means of prompts of 10 and 30 tokens; dense is noted under the first budget alone."""
    lines = [("dense", 0.9, [10, 10, 10]), ("sdtp", 0.9, [10, 8, 2]), ("sdtp", 0.8, [10, 6, 2])]
    lines += [
        ("dense", 0.9, [30, 30, 30]),
        ("sdtp", 0.9, [30, 20, 6]),
        ("sdtp", 0.8, [30, 10, 4]),
        ("norm", 0.9, [30, 1, 1]),
    ]
    rows = [{"key": str(i), "method": m, "keep": k, "alive": a} for i, (m, k, a) in enumerate(lines)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.alive_shares(tmp_path / "results.jsonl") == {
        0.9: [1.0, pytest.approx(28 / 40), pytest.approx(8 / 40)],
        0.8: [1.0, pytest.approx(16 / 40), pytest.approx(6 / 40)],
    }


def test_parts_are_flags_of_the_scripts():
    """Every part's flags are understood by its script; all have the same heads, and no method that they refuse."""
    longbench = pytest.importorskip("eval_longbench")
    flags = "--ckpt a/b --lengths 9 --text t --data d --tasks_dir x --longbench l --methods sdtp,teacher@8 --limit 3 --max_length 7"
    config = cli.parse(report.ReportConfig, "", flags.split())
    classes = {"bench.py": bench.BenchConfig, "eval_tasks.py": eval_tasks.EvalConfig}
    classes["eval_longbench.py"] = longbench.LongBenchConfig
    for name, part in report.parts(config, Path("o")).items():
        got = cli.parse(classes[part.script], "", [*part.flags, *part.outputs])
        assert (got.ckpt, got.heads) == ("a/b", "heads/b") and part.rows.parent == Path("o") / name
        if name != "speed":
            assert got.limit == 3 and got.methods == "sdtp" + ",teacher@8" * (name in report.SOURCES)
        if name == "longbench":
            assert got.max_length == 7
        else:
            assert Path(got.json) == part.rows
        assert (ROOT / part.script).is_file()
