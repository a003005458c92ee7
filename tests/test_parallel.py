"""Two processes on the CPU (gloo) against one: torchrun runs this file's work()."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from test_eval_harness import write_rows
from test_eval_longbench import ROW
from test_sdtp import checkpoint_with_heads
from test_train import die_at, read_log

import cli
import parallel
import sdtp
import tensor_parallel
import train
from model import Transformer

FOUR_HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
MXFP4 = dict(quantization_config={"quant_method": "mxfp4"})
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=7),
    "llama one KV head": dict(num_key_value_heads=1),
    "qwen3": dict(head_dim=16),
    "gemma": dict(head_dim=8),
    "bloom": dict(num_attention_heads=6, hidden_size=48),
    "gpt_oss": dict(num_local_experts=4, sliding_window=7, hidden_size=64),
    "gpt_oss mxfp4": dict(MXFP4, num_local_experts=4, hidden_size=64, intermediate_size=32),
}
SCHEDULE = {0: 0.8, 2: 0.5}


def read(folder, part=None):
    """What a model of a folder gives: dense logits, kept positions, decoded ids, its identity."""
    m = Transformer.from_pretrained(folder, torch.float32, part=part)
    torch.manual_seed(0)
    heads = {layer: sdtp.PruneHead(m.config.hidden_size) for layer in SCHEDULE}
    cache, ids = sdtp.KVCache(3, extra=8), tiny.ids(40)
    method = sdtp.pruned(heads, SCHEDULE, span=3)
    new = sdtp.generate(m, ids, 8, method, cache=cache)[0]
    kept = [layer.positions[0, :n].tolist() for layer, (n,) in zip(cache.layers, cache.alive)]
    found = {"kept": kept, "new": new, "fingerprint": sdtp.fingerprint(m)}
    return found | {"logits": m(ids).tolist()}


def work(folder):
    """One process of torchrun: all families in turn."""
    parallel.DIVIDED = True
    parallel.wait()
    for name in FAMILIES:
        found = read(Path(folder) / name, tensor_parallel)
        (Path(folder) / name / f"rank{parallel.RANK}.json").write_text(json.dumps(found))


def torchrun(*command, processes=2):
    how = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    how += ["--nproc_per_node", str(processes)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*how, *map(str, command)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_divided_model(tmp_path):
    """Dense logits, kept tokens, text and fingerprint of two processes are those of one."""
    for name, fields in FAMILIES.items():
        tiny.write(tmp_path / name, model_type=name.split()[0], **FOUR_HEADS | fields)
    torchrun(__file__, tmp_path)
    for name in FAMILIES:
        one = read(tmp_path / name)
        for rank in (0, 1):
            two = json.loads((tmp_path / name / f"rank{rank}.json").read_text())
            far = torch.tensor(two.pop("logits")) - torch.tensor(one["logits"])
            assert far.abs().max() <= 1e-4, name
            assert two == {k: v for k, v in one.items() if k in two}, name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny checkpoint, heads and rows."""
    folder = tmp_path_factory.mktemp("world")
    sizes = dict(num_hidden_layers=6, max_position_embeddings=256)
    checkpoint_with_heads(folder, {"heads": {2: 0.7, 5: 0.4}}, **sizes)
    tiny.rows(folder / "rows.jsonl", 60)
    return folder


def on_tiny(world, out):
    flags = f"--ckpt {world}/tiny --data {world}/rows.jsonl --device cpu --dtype float32"
    return f"{flags} {out}".split()


@pytest.mark.slow
def test_divided_prompts(world):
    """Training and evaluating on two processes is training and evaluating on one."""
    more = "--first_layer 2 --stages 2 --max_prompts 14 --eval_prompts 4 --accumulate 3 --out_dir"
    rows, heads, logs = [], [], []
    for processes, name in ((1, "one"), (2, "two")):
        out = world / name
        torchrun("train.py", *on_tiny(world, f"{more} {out}"), processes=processes)
        heads.append(safetensors.torch.load_file(out / "heads/heads.safetensors"))
        logs.append([json.loads(line) for line in open(out / "log.jsonl")])
        table = f"--heads {world}/one/heads --methods sdtp,random,teacher --limit 5"
        table += f" --json {out}.json --rows {out}.jsonl"
        torchrun("eval_tasks.py", *on_tiny(world, table), processes=processes)
        rows.append([{k: r[k] for k in ("method", "loss", "flops_share")} for r in read_json(out)])
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert len(logs[0]) == len(logs[1]) == 10
    for a, b in zip(*logs):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-5) for k in a)
    for name, weight in heads[0].items():
        assert (weight - heads[1][name]).abs().max() <= 1e-6, name

    out, whole = world / "killed", world / "two"
    with pytest.raises(AssertionError, match="exitcode *: -9"):
        torchrun(__file__, "die", *on_tiny(world, f"{more} {out}"))
    assert not (out / "heads").exists() and len(read_log(out)) == 5
    torchrun("train.py", "--resume", "--out_dir", out)
    for name in ("heads/heads.safetensors", "log.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name

    texts = []
    for command, processes in ((["sample.py"], 1), (["tensor_parallel.py", "sample.py"], 2)):
        flags = f"--ckpt {world}/tiny --device cpu --dtype float32 --heads {world}/one/heads"
        flags += f" --prompt {'abcdefghij' * 9} --max_new_tokens 9"
        text = torchrun(*command, *flags.split(), processes=processes)
        texts.append(text.split(" | first")[0].splitlines()[2:])  # after the flags and the size
    assert texts[0] == texts[1] and "mean alive" in texts[0][-1]


def read_json(out):
    return json.loads(Path(f"{out}.json").read_text())


@pytest.mark.slow
def test_refusals(world):
    """Processes that do not fit the heads, and training with a divided model: a line each."""
    for processes, script, error in (
        (3, "saliency.py", "3 processes: num_attention_heads is 4"),
        (2, "saliency.py", "a divided model has no gradients"),
        (2, "train.py", "SCRIPT.py ..., but no train.py"),
    ):
        flags = f"--ckpt {world}/tiny --device cpu --out_dir {world}/no --prompt abc"
        with pytest.raises(AssertionError, match=error):
            torchrun("tensor_parallel.py", script, *flags.split(), processes=processes)


@pytest.mark.slow
def test_divided_benchmarks(world):
    """The tables of LongBench and of the harness's tasks, from one process and from two."""
    row = ROW | {"answers": ["abc"], "all_classes": ["abc", "d"]}
    lines = [json.dumps(row | {"context": text}) for text in ("abc " * 30, "d " * 9, "xyz")]
    (write_rows(world, 5) / "trec.jsonl").write_text("\n".join(lines))
    rows, data = f"--data {world} --datasets trec --max_length 170", f"--data_dir {world}"
    for script, flags in (("eval_longbench.py", rows), ("eval_harness.py", data)):
        tables = []
        for processes in (1, 2):
            out = f"{world}/{script}-{processes}"
            common = f"--ckpt {world}/tiny --heads {world}/heads --methods sdtp,random"
            common += f" --device cpu --dtype float32 --json {out}.json"
            common += f" --out_dir {out}" * ("longbench" in script)
            torchrun(script, *f"{flags} {common}".split(), processes=processes)
            tables.append([untimed(row) for row in read_json(out)])
        assert tables[0] == tables[1] and len(tables[0]) >= 3, script


def untimed(row):
    timed = "prefill_speedup", "total_seconds", "command", "commit"
    return {k: v for k, v in row.items() if k not in timed}


def die(*argv):
    """train.py killed in its fifth step, two after a checkpoint."""
    sys.argv, train.CHECKPOINT_EVERY = ["train.py", *argv], 3
    train.learning_rate = die_at(5, lambda: os.kill(os.getpid(), 9))
    cli.run(train.main)


if __name__ == "__main__":
    die(*sys.argv[2:]) if sys.argv[1] == "die" else work(sys.argv[1])
