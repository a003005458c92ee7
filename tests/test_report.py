"""report.py: its parts are what the scripts understand, run once, and end in one page."""

import contextlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_cli import config_class
from test_sdtp import checkpoint_with_heads

import cli
import report

ORIGIN = {"command": "python x.py", "commit": "c0ffee", "machine": "m", "versions": "v"}
COST = {"method": "sdtp", "mean_alive": 0.5, "compression": 2.0, "flops_share": 0.4, "dtype": "f"}
SCORE = {"score": 0.625, "diff": -0.125, "low": -0.25, "high": 0.125, **COST, **ORIGIN}
OTHERS = {  # rows of the parts that are not run here
    "tasks": [{"task": "boolq", "num_fewshot": 5, "documents": 9, **SCORE}],
    "longbench": [{"set": "AVG", "n": 7, **SCORE, "score": 30.5}],
}
FLAGS = "--ckpt tiny --heads own --lengths 20,40 --text text.txt --tasks boolq --longbench l"
FLAGS += " --methods sdtp,most_recent --keep 0.5 --limit 2 --out_dir out --device cpu"
NAMES = ["speed", "tasks", "text", "longbench"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a tiny checkpoint, heads for it and a text."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(num_hidden_layers=6, max_position_embeddings=2048)
    checkpoint_with_heads(tmp_path, {"own": {2: 0.7, 4: 0.3}}, **sizes)
    words = torch.randint(40, (20_000,), generator=torch.Generator().manual_seed(1)).tolist()
    (tmp_path / "text.txt").write_text("".join(tiny.ALPHABET[3 + word] for word in words))
    return tmp_path


@pytest.fixture
def run(world, monkeypatch):
    """Run report.py: (parts that ran, how it ended); those in `real` do, others only write rows."""

    def script(*flags, real=(), broken=None):
        ran = []

        def in_process(command, stdout, stderr):
            name = Path(stdout.name).parent.name
            ran.append(name)
            rows = Path(stdout.name).with_name("rows.json")
            rows.write_text(json.dumps(OTHERS.get(name, OTHERS["tasks"])))
            if name in real:
                quick = ["--new_tokens", "3", "--repeats", "1"] * (name == "speed")
                monkeypatch.setattr(sys, "argv", [*command[1:], *quick])
                with contextlib.redirect_stdout(stdout):
                    runpy.run_path(command[1], run_name="__main__")
            stdout.write("begins\nx.py: it broke\n" if name == broken else "")
            return SimpleNamespace(returncode=int(name == broken))

        monkeypatch.setattr(report, "subprocess", SimpleNamespace(run=in_process, STDOUT=None))
        monkeypatch.setattr(sys, "argv", ["report.py", *FLAGS.split(), *flags])
        try:
            cli.run(report.main)
        except SystemExit as end:
            return ran, end.code
        return ran, None

    return script


def table(page, title):
    """The rows of a section's table, {field: cell}; cells with spaces are the last of a row."""
    names, *lines = page.split(f"## {title}\n")[1].split("```")[1].strip().splitlines()
    names = names.split()
    return [dict(zip(names, line.split(maxsplit=len(names) - 1), strict=True)) for line in lines]


def test_page(world, run):
    """bench.py and eval_tasks.py as they are: figures of the page against the rows they wrote."""
    assert run(real=["speed", "text"]) == (NAMES, None)
    page = (world / "out" / "report.md").read_text()
    rows = {part: json.loads((world / "out" / part / "rows.json").read_text()) for part in NAMES}
    assert all(f"`{r[0]['command']}` ({r[0]['commit']}, " in page for r in rows.values())
    shown = table(page, "Prefill and end-to-end speedup, memory")
    for r, line in zip(rows["speed"], shown, strict=True):
        assert line["prefill_speedup"] == f"{r['prefill_speedup']:.2f}"
        assert line["memory_diff"] == f"{r['memory_diff']:+.1%}"
    *_, dense, sdtp = table(page, "Compression, active tokens")
    alive = rows["speed"][-1]["alive"]
    assert dense["alive_from_layer"] == "0: 40" and len(set(alive)) == 3
    assert sdtp["alive_from_layer"] == f"0: 40, 2: {alive[2]}, 4: {alive[4]}"
    assert float(sdtp["compression"]) == pytest.approx(6 * 40 / sum(alive), abs=0.005)
    for r, line in zip(rows["text"], table(page, "Perplexity and loss, plain text"), strict=True):
        difference = r["loss"] - rows["text"][0]["loss"]
        assert [line["method"], line["ppl_diff"]] == [r["method"], f"{r['ppl_diff']:+.1%}"]
        assert float(line["loss_diff"]) == pytest.approx(difference, abs=1e-4)
    assert table(page, "Accuracies")[0]["low"] == "-25.0%"
    assert table(page, "LongBench")[0]["score"] == "30.50"
    assert "## Perplexity and loss, responses\n\nNot asked for." in page


def test_goes_on(world, run):
    """A part that fails is told, the others run; then it alone runs again, then none."""
    ran, end = run(broken="tasks")
    assert ran == NAMES and end == "report.py: without tasks; the same command runs what is missing"
    page = (world / "out" / "report.md").read_text()
    line = "failed with status 1, see out/tasks/log.txt: x.py: it broke"
    assert f"## Accuracies\n\n{line}\n" in page and table(page, "LongBench")
    assert run() == (["tasks"], None) and run() == ([], None)
    assert "failed" not in (world / "out" / "report.md").read_text()


def test_other_flags_and_heads(world, run):
    """A part runs again where a flag of its own, or the heads, have changed; a killed one too."""
    run()
    assert run("--keep", "0.6", broken="speed")[0] == ["speed", "text"]
    assert run() == (["speed", "text"], None)  # what failed may have left its rows
    heads = world / "own" / "heads.json"
    heads.write_text(heads.read_text().replace('"span": 1', '"span": 2'))
    assert run(broken="text")[0] == NAMES and run() == (["text"], None)


def test_scripts_understand_the_flags():
    """Each part's flags, all of them given, are those of its script."""
    flags = f"{FLAGS} --data d --max_length 7 --tasks_dir x"
    parts = report.parts(cli.parse(report.ReportConfig, "", flags.split()), Path("o"))
    for name, (script, flags) in parts.items():
        got = cli.parse(config_class(script.removesuffix(".py")), "", flags)
        assert (got.ckpt, got.heads, got.device) == ("tiny", "own", "cpu")
        assert Path(got.json) == Path("o") / name / "rows.json"
        assert name == "speed" or (got.limit, got.methods) == (2, "sdtp,most_recent")
        assert name in ("speed", "longbench") or got.rows == f"o/{name}/rows.jsonl"
    assert (len(parts), got.data, got.max_length, got.out_dir) == (5, "l", 7, "o/longbench")
