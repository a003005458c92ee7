"""cli.py, and every script run as __main__: a mistake is one line, a flag has its help."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from test_sdtp import checkpoint_with_heads

import cli
from model import Transformer

ROOT = Path(__file__).parent.parent
SCRIPTS = "train sample eval_tasks bench saliency eval_harness eval_longbench report".split()
MISTAKES = {  # a script with the flags that it needs, more flags: what the line says
    "sample.py --ckpt tiny --prompt a": {
        "--ckpt gpt-17": "gpt-17: neither a folder nor one of smollm2-135m-q4",
        "--ckpt heads": "heads/config.json",
        "--ckpt cut": "cut/model.safetensors",
        "--dtype int8": "--dtype int8: choose auto, bfloat16",
        "--prompt_file text.txt": "give --prompt TEXT or --prompt_file FILE",
        "--temperature nan": "--temperature nan",
        "--seed 3": "--seed",
        "--chat": "no chat_template",
        "--heads heads/tiny,heads/a/heads": "one folder is needed",
        "--keep 1.5": "--keep 1.5",
        "--dense --keep 0.5": "--keep has no effect with --dense",
        "--kv h2o --picture p.png": "--picture: not with --kv",
        "--max_new_tokens 63": "the model's 64 positions",
    },
    "train.py --ckpt tiny --data text.txt": {
        "": "no prompts to train on",
        "--shares 5:0.5": "layers 0 to 4 once",
        "--teacher attention_entropy --over all": "--over has no effect with --teacher",
        "--lm_weight 0 --mse_weight 0 --rank_weight 0": "are all 0",
        "--shares 1:0.7 --stages 9": "--stages has no effect with --shares",
        "--resume": "config.json does not exist",
        "--ratio 0": "--ratio 0.0",
        "--teacher x": "--teacher x: choose ",
        "--epochs 0": "--epochs 0",
        **{f"--shares {s}": f"--shares {s}: " for s in "1 1:0.7, 1:a 1:0.7,1:0.6 1:0".split()},
    },
    "eval_tasks.py --ckpt tiny": {
        "--text text.txt --data d.jsonl": "give --text FILE",
        "--text text.txt --needles 100": "beyond the model's 64 positions",
        "--text text.txt --prompt_len 5000": "text.txt: no prompt so long",
        "--text text.txt --needles 9 --figure f.png": "--figure f.png has no effect here",
        "--data d.jsonl --prompt_len 9": "--prompt_len 9 has no effect here",
        "--text text.txt --methods dense --keep 0.9": "--keep 0.9 has no effect here",
        "--text text.txt --methods sdtp --seed 1": "--seed 1 has no effect here",
    },
    "eval_harness.py --data_dir . --methods dense": {
        "--tasks copa": "--tasks copa: --data_dir has boolq and piqa",
        "--data_dir nowhere": "nowhere/boolq_val.jsonl does not exist",
        "--tasks piqa": "piqa_valid.jsonl does not hold the rows of piqa",
        "--methods teacher": "ranks by the loss of one response",
        "--keep 0.9": "--keep 0.9",
    },
    "eval_longbench.py --data . --methods most_recent": {
        "--datasets trec,hotpot": "unknown dataset 'hotpot'",
        "--methods teacher": "teacher ranks by the loss",
        "--datasets lcc": "lcc.jsonl does not exist",
        "--keep nan": "--keep nan",
        "--methods dense --keep 0.5": "--keep 0.5",
        "--seed 3": "--seed 3",
    },
    "bench.py": {
        "--shape 11m": "--shape 11m: choose 10m",
        "--shape 10m --ckpt c": "--shape and --ckpt",
        "--layers 3": "--layers",
        "--marking --batches 2": "--marking and --batches",
        "--paper_table --seed 1": "--paper_table and --seed",
        "--marking --shape 10m --lengths 70": "--lengths 70",
        "--shape 10m --methods dense,teacher": "teacher",
        "--shape 10m --methods dense,transformers+h2o": "transformers+h2o",
        "--shape 10m --methods dense --keep 0.9": "--keep 0.9",
        "--ckpt tiny --lengths 65": "--lengths 65",
        "--ckpt tiny --lengths 20 --heads heads/none": "heads/none",
    },
    "report.py --ckpt tiny": {
        "--lengths=": "nothing to measure: give",
        "--max_length 9": "--max_length has no effect",
    },
}
COMMANDS = [(f"{b} {flags}", says) for b, more in MISTAKES.items() for flags, says in more.items()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with checkpoints, whole and damaged, heads of them, and a text."""
    folder = tmp_path_factory.mktemp("cli")
    for name, layers in {"cut": 5, "bare": 5, "flat": 3}.items():
        tiny.checkpoint(folder / name, num_hidden_layers=layers)
    folders = dict.fromkeys(("heads/tiny", "heads/a/heads", "heads/b/heads"), {2: 0.5})
    checkpoint_with_heads(folder, folders, span=4, num_hidden_layers=5)
    (folder / "cut/model.safetensors").write_bytes(b"no weights")
    (folder / "text.txt").write_text("some words and more words. " * 40)
    (folder / "piqa_valid.jsonl").write_text("{}")
    (folder / "piqa_valid-labels.lst").write_text("1")
    return folder


@pytest.fixture
def run(world, monkeypatch):
    """Run a command as __main__ in the world's folder; returns what it exits with."""

    def script(command):
        monkeypatch.chdir(world)
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        return end.value.code

    return script


@pytest.mark.parametrize("command, says", COMMANDS)
def test_mistakes(run, world, command, says):
    """One line, which the interpreter prints, and nothing is written."""
    error = run(command)
    assert error.startswith(command.split()[0]) and "\n" not in error and says in error
    assert not (world / "out").exists() and not (world / "results").exists()


def test_from_outside():
    """As a process: one line on stderr, status 1; other errors keep their traceback."""
    command = [sys.executable, str(ROOT / "download.py"), "gpt-17"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "gpt-17" in done.stderr
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


@dataclass
class Options:
    size: int = 3  # how many: 100 % of them
    rate: float = 0.5  # how fast  # or slow
    loud: bool = False  # say so


def test_flags_come_from_the_dataclass(capsys):
    """Types, defaults, help and --no forms; the resolved config is printed."""
    assert cli.parse(Options, "doc", []) == Options()
    assert capsys.readouterr().out == "size=3 rate=0.5 loud=False\n"
    given = cli.parse(Options, "doc", "--size 4 --rate 1e-3 --loud".split())
    assert given == Options(4, 0.001, True) and given.given == {"size", "rate", "loud"}
    with pytest.raises(SystemExit):
        cli.parse(Options, "the doc", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "the doc" in shown and "how many: 100 % of them (default: 3)" in shown


def config_class(script):
    """The dataclass of a script's flags."""
    found = vars(pytest.importorskip(script)).values()
    (config,) = (c for c in found if re.match(rf"<class '{script}\.\w+Config'>", str(c)))
    return config


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(run, script, capsys):
    """Every field has a comment, train.py at most 25, others 16; no other flag, none shortened."""
    names = {field.name for field in fields(config_class(script))}
    assert cli.comments(config_class(script)).keys() == names
    assert len(names) <= (25 if script == "train" else 16)
    assert run(f"{script}.py --ckp 1") == 2 and "arguments: --ckp" in capsys.readouterr().err


def test_checks_of_flags():
    """NaN passes no check."""
    for value in (float("nan"), float("inf"), 0):
        with pytest.raises(ValueError, match=f"--rate {value}: at least 1"):
            cli.at_least(1, Options(rate=value), "rate")
    assert cli.numbers("keep", "0.5,1", float, lambda keep: 0 < keep <= 1) == [0.5, 1]
    for text, kind in {"nan": float, "inf": float, "1,": int, "0": int, "2.5": int}.items():
        with pytest.raises(ValueError, match=f"--x {text}"):
            cli.numbers("x", text, kind, lambda value: not value <= 0)


def test_given_stages(world, monkeypatch, capsys):
    """Which heads and stages methods get; a method that cannot run is refused."""
    monkeypatch.chdir(world)
    models = {name: Transformer.from_pretrained(name) for name in ("tiny", "bare", "flat")}

    def stages(methods, ckpt="tiny", heads=""):
        config = SimpleNamespace(ckpt=ckpt, heads=heads)
        found = cli.given_stages(config, models[ckpt], methods)
        return {name: (heads and list(heads), *rest) for name, (heads, *rest) in found.items()}

    own = [2], {2: 0.5}, 4
    assert stages(["dense", "sdtp"]) == {"": own} == stages(["random"], "bare", "heads/a/heads")
    assert stages(["sdtp"], heads="heads/tiny,heads/a/heads") == {":tiny": own, ":heads": own}
    both = stages(["sdtp"], heads="heads/a/heads,heads/b/heads/")
    assert list(both) == [":heads-a-heads", ":heads-b-heads"]
    assert stages(["dense", "dense+h2o"], "flat") == {"": (None, {}, 1)}
    assert stages(["dense", "random"], "bare") == {"": (None, {4: 0.9}, 1)}
    assert capsys.readouterr().out == "no heads/bare: the paper's stages, at layers [4]\n"
    for message, *arguments in (
        ("give --heads FOLDER or train some with train.py", ["sdtp+h2o"], "bare"),
        ("--first_layer", ["dense", "earliest"], "flat"),
        ("dense uses no heads", ["dense"], "tiny", "heads/tiny"),
        ("given twice", ["sdtp"], "tiny", "heads/tiny,heads/tiny/"),
    ):
        with pytest.raises(ValueError, match=message):
            stages(*arguments)
    monkeypatch.chdir("cut")  # elsewhere: beside the code
    monkeypatch.setattr("download.__file__", str(world / "download.py"))
    assert stages(["sdtp"]) == {"": own}


def test_results(tmp_path):
    """What was added is there again; a torn last line goes, any other bad line is named."""
    path = tmp_path / "new/rows.jsonl"
    for key in "ab":
        cli.Results(path).add({"key": key, "value": 1})
    path.write_bytes(path.read_bytes() + b'{"key": "c", "va')
    cli.Results(path).add({"key": "c"})
    assert list(cli.Results(path)) == ["a", "b", "c"]
    path.write_text('{"key": "a"}\n{"value": 1}\n{"key": "b"}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2: not a result"):
        cli.Results(path)


def test_paired_interval():
    """Prompts are drawn with replacement, both methods' together, weighted by their tokens."""
    draw = np.random.default_rng(0)
    counts, base = draw.integers(5, 50, 40), draw.normal(100, 30, 40)
    found = base + counts * draw.normal(0.1, 0.05, 40)
    value, low, high = cli.paired_interval(list(found), list(base), list(counts), np.expm1)
    drawn = draw.integers(40, size=(20000, 40))
    nats = (found - base)[drawn].sum(1) / counts[drawn].sum(1)
    assert value == pytest.approx(np.expm1((found - base).sum() / counts.sum()))
    assert [low, high] == pytest.approx(np.expm1(np.quantile(nats, [0.025, 0.975])), abs=2e-3)
    assert cli.paired_interval([3, 5], [3, 5]) == (0, 0, 0)


def test_print_table(capsys):
    cli.print_table([{"m": "dense", "x": 1.0}, {"m": "b"}], {"name": "{m}", "x": "{x:.2f}"})
    assert capsys.readouterr().out == "name      x\ndense  1.00\nb          \n"


def test_draw_lines(tmp_path, monkeypatch):
    """Points in the order of x; a figure's file appears, in a folder that need not be there."""
    figures, save = [], cli.save_figure
    monkeypatch.setattr(cli, "save_figure", lambda *args: figures.append(args[0]) or save(*args))
    cli.draw_lines({"a": [(2, 5, 4, 6), (1, 3, 2, 9)]}, tmp_path / "new/f.png")
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [[1, 3], [2, 5]]
    assert [file.name for file in tmp_path.glob("new/*")] == ["f.png"]


def test_rows_and_their_origin(tmp_path, monkeypatch):
    """A commit is dirty by changes outside results/; a foreign or no repository has none."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    monkeypatch.setattr(cli, "ORIGIN", {})
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    monkeypatch.setattr(sys, "argv", ["/x/bench.py", "--text", "a b"])
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "results").mkdir()
    for name in ("cli.py", "results/rows.json"):
        (tmp_path / name).write_text("1")
    for command in ("init -q", "add results", "commit -qm 0", "add -A", "commit -qm 1"):
        cli.note_origin()
        assert cli.ORIGIN["commit"] == "unknown" or command == "commit -qm 1"
        subprocess.run([*git, *command.split()], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout[:12]
    for name, end in (("results/rows.json", ""), ("new", ""), ("cli.py", "-dirty")):
        (tmp_path / name).write_text("2")
        cli.note_origin()
        assert cli.ORIGIN["commit"] == head + end
    cli.write_rows(tmp_path / "r.json", [{"a": 1}, {"a": 2}], seed=5)
    row = json.loads((tmp_path / "r.json").read_text())[1]
    assert (row["a"], row["seed"], row["command"]) == (2, 5, "python bench.py --text 'a b'")
