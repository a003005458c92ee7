"""Every script, run as __main__: a user's mistake is one line and a non-zero exit; flags; origin of --json rows."""

import contextlib
import importlib
import io
import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch

import cli
from model import Transformer
from sdtp import PruneHead, Schedule, save_heads

ROOT = Path(__file__).parent.parent
SCRIPTS = {  # script -> the flags that it needs beside --ckpt to get to the model
    "train.py": ["--data", "text.txt"],
    "sample.py": ["--prompt", "hello there, how are you"],
    "eval_tasks.py": ["--text", "text.txt"],
    "bench.py": ["--lengths", "20"],
    "saliency.py": ["--prompt", "hello"],
}
each_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a checkpoint and its heads, another checkpoint, damaged ones, and inputs good and bad."""
    folder = tmp_path_factory.mktemp("cli")
    for name, fields in {"tiny": {}, "other": {"rms_norm_eps": 1e-5}, "cut": {}}.items():
        tiny.checkpoint(folder / name, num_hidden_layers=5, **fields)
    torch.manual_seed(0)
    for name, seed in {"tiny": 0, "other": 1}.items():
        model = tiny.randomise(Transformer.from_pretrained(folder / name, torch.float32), seed=seed)
        schedule = Schedule(5, {2: 0.5, 4: 0.3})
        if name == "tiny":
            few, high = Schedule(5, {2: 0.2}), Schedule(5, {2: 0.5}, threshold={2: 1e9})
            save_heads(folder / "heads" / "few", {2: PruneHead(32)}, model, few, ckpt=name)
            save_heads(folder / "heads" / "high", {2: PruneHead(32)}, model, high, ckpt=name)
        save_heads(folder / "heads" / name, {layer: PruneHead(32) for layer in schedule}, model, schedule, ckpt=name)
    weights = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(folder / "heads" / "tiny", folder / "heads" / "cut")
    heads = (folder / "heads" / "cut" / "heads.safetensors").read_bytes()
    (folder / "heads" / "cut" / "heads.safetensors").write_bytes(heads[:-50])
    (folder / "text.txt").write_text("some words and more words. " * 40)
    (folder / "bad.jsonl").write_text('{"instruction": "a", "context": "b", "response": "c"}\n{"instruction": \n')
    return folder


@pytest.fixture
def run(world, monkeypatch, capsys):
    """Run a script as __main__ in the world's folder; returns (exit status, what goes to stderr)."""

    def script(name, *argv):
        monkeypatch.chdir(world)
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:  # the interpreter prints a text and exits with 1
            return (1, end.code) if isinstance(end.code, str) else (end.code or 0, capsys.readouterr().err)
        return 0, capsys.readouterr().err

    return script


def one_line(result, *words):
    status, error = result
    assert status == 1 and "\n" not in error and "Traceback" not in error
    for word in words:
        assert str(word) in error


@each_script
def test_bad_checkpoints(run, script):
    """No such folder, an unknown name, a folder without config.json and truncated weights, at every script."""
    flags = SCRIPTS[script]
    one_line(run(script, "--ckpt", "no/such/folder", *flags), script, "no/such/folder", "known")
    one_line(run(script, "--ckpt", "gpt-17", *flags), script, "gpt-17", "smollm2-135m-q4")
    one_line(run(script, "--ckpt", "heads", *flags), "heads/config.json")
    one_line(run(script, "--ckpt", "cut", *flags), "cut/model.safetensors", "damaged")


@each_script
def test_bad_flags(run, script):
    """An unknown or shortened flag and a wrong type are argparse's usage; a bad dtype or device is one line."""
    for flags in (["--nope", "1"], ["--ckp", "tiny"], ["--seed" if script != "saliency.py" else "--max_tokens", "x"]):
        status, error = run(script, *flags)
        assert status == 2 and error.startswith("usage:") and flags[0] in error and "Traceback" not in error
    one_line(run(script, "--ckpt", "tiny", "--dtype", "int8", *SCRIPTS[script]), "--dtype int8", "bfloat16")
    one_line(run(script, "--ckpt", "tiny", "--device", "tpu", *SCRIPTS[script]), "--device tpu")


MISTAKES = {
    "sample.py --prompt_file nowhere.txt": "nowhere.txt does not exist",
    "sample.py": "--prompt",
    "sample.py --prompt a --prompt_file text.txt": "--prompt",
    "sample.py --prompt_file text.txt --dense": "beyond the model's 64 positions",
    "sample.py --prompt abc --max_new_tokens 0": "--max_new_tokens 0",
    "sample.py --prompt abc --chat": "no chat_template",
    "sample.py --prompt abc --heads heads/other": "another checkpoint (other)",
    "sample.py --prompt abc --heads heads/cut": "heads/cut",
    "sample.py --prompt abc --heads heads/none": "heads/none/heads.json does not exist",
    "sample.py --prompt abc --heads heads/tiny --keep 1.5": "is 1.5",
    "sample.py --prompt abc --adaptive --keep 0.8": "--adaptive: the heads have a threshold for their own schedule",
    "sample.py --prompt abc --adaptive --dense": "leave out --keep and --dense",
    "sample.py --prompt abc --heads heads/few --adaptive": "these heads have no threshold",
    "sample.py --prompt abc --kv magic": "--kv magic: choose h2o, snapkv",
    "sample.py --prompt abc --kv_keep 0.4": "--kv_keep 0.4: give --kv too",
    "bench.py --lengths 20 --kv h2o --kv_keep 1.5": "--kv_keep 1.5",
    "bench.py --batches 1,4 --kv h2o": "--kv are for the run by length",
    "eval_tasks.py --text text.txt --methods dense,dense+h2o@2": "'dense+h2o@2'",
    "train.py --data text.txt --list_weight 0": "all weights that rank are 0",
    "train.py --data text.txt --distill": "--distill goes by --lm_weight",
    "eval_tasks.py --text text.txt --heads heads/other": "another checkpoint",
    "eval_tasks.py --text nowhere.txt": "nowhere.txt does not exist",
    "eval_tasks.py --text text.txt --data pydoc": "--text",
    "eval_tasks.py --text text.txt --tasks chess": "--tasks chess",
    "eval_tasks.py --text text.txt --prompt_len 20 --score_len 5 --methods dense,magic": "'magic'",
    "eval_tasks.py --text text.txt --prompt_len 2000 --methods random": "no prompt",
    "eval_tasks.py --data bad.jsonl": "bad.jsonl, line 2",
    "train.py --data bad.jsonl": "bad.jsonl, line 2",
    "train.py --data text.csv": "--data text.csv",
    "train.py --data text.txt": "0 held-out",
    "train.py --data text.txt --prompt_len 60 --score_len 20": "beyond the model's 64 positions",
    "train.py --data text.txt --teacher magic": "--teacher magic",
    "train.py --data text.txt --checkpoint_every 0": "--checkpoint_every 0",
    "train.py --data text.txt --epochs 0": "--epochs 0",
    "train.py --data text.txt --stages 1 --first_layer 5": "no stage",
    "train.py --data text.txt --resume --out_dir new --prompt_len 20 --score_len 5": "new/config.json does not exist",
    "bench.py --lengths 20,many": "--lengths 20,many",
    "bench.py --lengths 20,0": "--lengths 20,0",
    "bench.py --lengths 20,65": "--lengths 65: beyond the model's 64 positions; --shape",
    "bench.py --lengths 20 --keep 0.9,1.1": "--keep 0.9,1.1",
    "bench.py --lengths 20 --keep 0.9,": "--keep 0.9,",
    "bench.py --batches 1,4 --marking": "give one of them",
    "bench.py --batches 1,4 --figure f.png": "without --batches",
    "bench.py --lengths 20 --new_tokens 1": "--new_tokens 1",
    "bench.py --lengths 20 --layers 2": "--layers is for --shape",
    "bench.py --lengths 20 --shape 3b": "--shape 3b: choose 10m",
    "bench.py --lengths 20 --shape 10m --text text.txt": "leave out --heads and --text",
    "bench.py --heads heads/other --lengths 20": "another checkpoint",
    "bench.py --text text.txt --lengths 4000": "only 1081 tokens",
    "saliency.py": "--prompt",
    "saliency.py --prompt_file nowhere.txt": "nowhere.txt does not exist",
    "saliency.py --prompt_file text.txt": "beyond the model's 64 positions",
    "saliency.py --prompt abc --teacher magic": "'magic'",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes(run, command, tmp_path):
    """Each of a user's other mistakes ends in one line that names it."""
    script, *flags = command.split()
    out = ["--out_dir", tmp_path] if script == "train.py" and "--out_dir" not in flags else []
    one_line(run(script, "--ckpt", "tiny", *flags, "--dtype", "float32", *out), script, MISTAKES[command])


def test_from_outside(world):
    """As a process: one line on stderr, status 1; download.py as well."""
    for command in (["sample.py", "--ckpt", "cut", "--prompt", "a"], ["download.py", "gpt-17"]):
        done = subprocess.run(
            [sys.executable, ROOT / command[0], *command[1:]], capture_output=True, text=True, cwd=world
        )
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stdout + done.stderr
        assert command[-1] in done.stderr or "damaged" in done.stderr


def test_sample_compare(run, tmp_path):
    """sample.py --compare prints dense and pruned text and counts; its --json rows carry their origin."""
    flags = ["--ckpt", "tiny", "--prompt", "hello there, how are you today?", "--compare", "--max_new_tokens", 5]
    status, _ = run("sample.py", *flags, "--dtype", "float32", "--seed", 7, "--json", tmp_path / "r.json")
    assert status == 0
    dense, pruned = json.loads((tmp_path / "r.json").read_text())
    n = len("hello there, how are you today?") + 1
    alive = [n, n, n // 2, n // 2, 0.3 * n]
    assert dense["alive"] == " ".join([str(n)] * 5) and pruned["alive"] == " ".join(str(int(a + 0.5)) for a in alive)
    assert dense["method"] == "dense" and pruned["method"] == "sdtp" and pruned["kv_bytes"] < dense["kv_bytes"]
    # keys and values, 2 heads of 8 float32 numbers, of what is alive and the tokens to come
    assert pruned["kv_bytes"] == sum(2 * 2 * 8 * 4 * (int(a + 0.5) + 5) for a in alive)
    for row in (dense, pruned):
        assert (
            {"commit", "versions", "machine"} <= row.keys()
            and row["seed"] == 7
            and row["command"].startswith("python sample.py --ckpt tiny")
        )


def test_sample_compressed(run, tmp_path):
    """sample.py --kv: tokens alive stay, tokens held and KV bytes are those of the share, dense and pruned."""
    flags = ["--ckpt", "tiny", "--prompt", "hello there, how are you today?", "--compare", "--max_new_tokens", 5]
    flags += ["--kv", "h2o", "--kv_keep", 0.5, "--dtype", "float32", "--json", tmp_path / "r.json"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run("sample.py", *flags)[0] == 0
    dense, pruned = json.loads((tmp_path / "r.json").read_text())
    assert [dense["method"], pruned["method"]] == ["dense+h2o@0.5", "sdtp+h2o@0.5"]
    assert [dense["alive"], dense["held"]] == ["32 32 32 32 32", "16 16 16 16 16"]
    assert [pruned["alive"], pruned["held"]] == ["32 32 16 16 10", "16 16 16 16 10"]
    assert pruned["kv_bytes"] == 2 * 2 * 8 * 4 * (4 * 16 + 10 + 5 * 5)
    assert "[sdtp+h2o@0.5] tokens in the KV cache per layer: 16 16 16 16 10" in out.getvalue()


def test_sample_adaptive(run, tmp_path):
    """sample.py --adaptive goes by the heads' threshold, here one that no span reaches; without it by their share."""
    flags = ["--prompt", "hello there, how are you today?"]
    flags += "--ckpt tiny --heads heads/high --max_new_tokens 2".split()
    for more, method, alive in (([], "sdtp", "32 32 16 16 16"), (["--adaptive"], "sdtp_adaptive", "32 32 7 7 7")):
        assert run("sample.py", *flags, *more, "--json", tmp_path / "r.json")[0] == 0
        row = json.loads((tmp_path / "r.json").read_text())[0]
        assert (row["method"], row["alive"]) == (method, alive)  # 7: the protected ones


def test_keep_at_the_floor_says_so(run):
    """A share below what is protected keeps the floor, and the line says so."""
    flags = [
        "--ckpt",
        "tiny",
        "--prompt",
        "hello there, how are you today?",
        "--heads",
        "heads/few",
        "--max_new_tokens",
        3,
        "--dtype",
        "float32",
    ]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run("sample.py", *flags)[0] == 0
    assert "32 32 7 7 7 (the floor: protected tokens only)" in out.getvalue()


def test_flags_come_from_the_dataclass(capsys):
    """Flags, types, defaults and help are the fields'; booleans have a --no form; the resolved config is printed."""

    @dataclass
    class Options:
        size: int = 3  # how many: 100 % of them
        name: str = "x"  # what it is called
        rate: float = 0.5  # how fast
        loud: bool = False  # say so

    assert cli.parse(Options, "doc", []) == Options()
    assert capsys.readouterr().out == "size=3 name='x' rate=0.5 loud=False\n"
    assert cli.parse(Options, "doc", "--size 4 --name y --rate 1e-3 --loud".split()) == Options(4, "y", 0.001, True)
    assert cli.parse(Options, "doc", ["--no-loud"]).loud is False
    assert cli.parse(Options, "doc", "--size 3 --no-loud".split()).given == {"size", "loud"}
    with pytest.raises(SystemExit):
        cli.parse(Options, "the doc", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "the doc" in shown and "how many: 100 % of them (default: 3)" in shown and "say so (default: False)" in shown


@each_script
def test_every_flag_has_help(script):
    """Every field of every script has a comment, from which its help is made."""
    module = importlib.import_module(script.removesuffix(".py"))
    (config,) = (c for name, c in vars(module).items() if name.endswith("Config") and c.__module__ == module.__name__)
    helps = cli.comments(config)
    assert helps.keys() == {f for f in config.__dataclass_fields__}


def test_rows_without_git(tmp_path, monkeypatch):
    """On a machine without git the rows are still written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    cli.note_origin()
    cli.write_rows(tmp_path / "r.json", [{"a": 1}, {"a": 2}], seed=5)
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [r["a"] for r in rows] == [1, 2] and all(r["commit"] == "unknown" and r["seed"] == 5 for r in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    """A script's large temporaries are not faulted in again: the tenth of 64 MiB touches hardly any new page."""
    code = (
        "import cli, resource, torch\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def main():\n"
        "    for i in range(11):\n"
        "        before = faults()\n"
        "        torch.zeros(2**24).add_(1)\n"
        "    print(faults() - before)\n"
        "cli.run(main)"
    )
    folder = Path(cli.__file__).parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True).stdout
    assert int(out) < 1000  # of 16,384


def test_programming_errors_keep_their_traceback():
    """Only what a user can cause is shortened: a RuntimeError, such as the guard's, comes through."""

    def broken():
        raise RuntimeError("pruning was not applied")

    with pytest.raises(RuntimeError):
        cli.run(broken)


def test_commit_is_dirty_but_by_results(tmp_path, monkeypatch):
    """A changed file makes it dirty; one under results/, where runs write, or a new one does not; in no repository, one without
    a commit or one that does not track it: unknown."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    cli.note_origin()
    assert cli.ORIGIN["commit"] == "unknown"
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
