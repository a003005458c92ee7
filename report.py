"""All metrics of a checkpoint's heads on one page: OUT_DIR/report.md.

python report.py --text FILE.txt --data dolly --tasks boolq,piqa --longbench DIR

Each part is a run of bench.py, eval_tasks.py, eval_harness.py or eval_longbench.py, with its rows
and log.txt in OUT_DIR/PART. The same command again goes on where it was stopped: a part that ended
with these flags and heads is not run again.
"""

import contextlib
import io
import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cli
import parallel
from bench import CELLS, print_rows
from checkpoint import read_json
from download import DEFAULT
from sdtp import write_atomic


@dataclass
class ReportConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads, several with commas (default: heads/CKPT)
    lengths: str = "1024,4096"  # speed, memory: tokens of a prompt ("": left out)
    text: str = ""  # perplexity of plain text: a text file
    data: str = ""  # perplexity of responses: a source of train.py (its held-out part)
    tasks: str = ""  # accuracies: tasks of lm-evaluation-harness
    tasks_dir: str = ""  # and the folder of their rows (default: the hub's)
    longbench: str = ""  # LongBench: a folder of official DATASET.jsonl files, or a data.zip
    max_length: int = 0  # LongBench: longer prompts lose their middle
    methods: str = "sdtp,random,most_recent,last_attention"  # of all but speed
    keep: str = "0.95,0.9,0.8"  # budgets of speed and perplexity; the others: heads' own stages
    limit: int = 0  # prompts, questions, rows of a set at most (0: each script's default)
    out_dir: str = ""  # the page, and a folder for each part (default: results/CKPT)
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda


PARTS = {  # script, its flags here (the first asks for the part), files beside rows.json
    "speed": ("bench.py", "lengths keep", {}),
    "tasks": ("eval_harness.py", "tasks tasks_dir methods limit", {"rows": "rows.jsonl"}),
    "text": ("eval_tasks.py", "text methods keep limit", {"rows": "rows.jsonl"}),
    "data": ("eval_tasks.py", "data methods keep limit", {"rows": "rows.jsonl"}),
    "longbench": ("eval_longbench.py", "longbench max_length methods limit", {"out_dir": "."}),
}
RENAMED = {"tasks_dir": "data_dir", "longbench": "data"}  # a flag here: the script's
COST = "mean_alive:.3f compression:.2f flops_share:.3f"
PERPLEXITY = "method keep prompts ppl:.2f ppl_diff:+.1% low:+.1% high:+.1% loss:.4f loss_diff:+.4f "
ACCURACY = "task method num_fewshot documents score:.1% diff:+.1% low:+.1% high:+.1% "
SECTIONS = (  # title, part, fields of its rows
    ("Compression, active tokens", "speed", "method keep length compression:.2f alive_from_layer"),
    ("Prefill and end-to-end speedup, memory", "speed", CELLS),
    ("Accuracies", "tasks", ACCURACY + COST),
    ("Perplexity and loss, plain text", "text", PERPLEXITY + COST),
    ("Perplexity and loss, responses", "data", PERPLEXITY + COST),
    ("LongBench", "longbench", "set method n score:.2f diff:+.2f low:+.2f high:+.2f " + COST),
)
INTRO = """keep: compute of the paper's stages at that ratio; without it (0) the heads' own stages.
compression: prompt tokens over tokens alive, mean over layers (the paper's 1/tau)."""


def parts(config, out):
    """{name: (script, flags)} of the parts that are asked for; ValueError for useless flags."""
    found, used = {}, {"out_dir"}
    for part, (script, own, files) in PARTS.items():
        if not getattr(config, own.split()[0]):
            continue
        flags = ["--json", str(out / part / "rows.json")]
        for name in f"ckpt heads dtype device {own}".split():
            used.add(name)
            if value := getattr(config, name):
                flags += [f"--{RENAMED.get(name, name)}", str(value)]
        for name, file in files.items():
            flags += [f"--{name}", str(out / part / file)]
        found[part] = script, flags
    if not found:
        raise ValueError("nothing to measure: give --lengths, --text, --data, --tasks, --longbench")
    if useless := {name for name in config.given if getattr(config, name)} - used:
        raise ValueError(f"--{min(useless)} has no effect on {', '.join(found)}")
    return found


def heads_info(config):
    """The heads.json of all folders: they hold the schedules, and hashes of the weights."""
    folders = (config.heads or f"heads/{Path(config.ckpt).name}").split(",")
    paths = [cli.find(folder) / "heads.json" for folder in folders]
    return [read_json(path) for path in paths if path.is_file()]


def run_part(folder, script, flags, heads):
    """Run a part unless it ended with these flags and heads; what went wrong in a line, or None."""
    done, log = folder / "done.json", folder / "log.txt"
    state = {"script": script, "flags": flags, "heads": heads}
    if done.is_file() and read_json(done) == state:
        return None
    done.unlink(missing_ok=True)
    print(shlex.join(["python", script, *flags]), ">", log, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name(script)), *flags]
    with open(log, "w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if status:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"failed with status {status}, see {log}: {' '.join(last)}"
    write_atomic(done, json.dumps(state).encode())


def with_more(row):
    """A row of a part with the fields that the page adds."""
    more = {"loss_diff": math.log1p(row.get("ppl_diff", 0))}
    if "alive" in row:
        before = [None, *row["alive"]]
        changes = [f"{i}: {n}" for i, n in enumerate(row["alive"]) if n != before[i]]
        more["alive_from_layer"] = ", ".join(changes)
        more["compression"] = 1 / row["mean_alive"]
    return row | more


def table(rows, cells):
    """Rows of a part as Markdown, and where they come from."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_rows([with_more(row) for row in rows], cells)
    origin = ", ".join(rows[0][name] for name in ("commit", "machine", "versions", "dtype"))
    return f"`{rows[0]['command']}` ({origin})\n\n```\n{printed.getvalue()}```"


def main():
    config = cli.parse(ReportConfig, __doc__)
    if parallel.WORLD > 1:
        raise ValueError("it starts other scripts: run it without torchrun")
    out = Path(config.out_dir or Path("results") / Path(config.ckpt).name)
    asked, failed, heads = parts(config, out), {}, heads_info(config)
    for name, (script, flags) in asked.items():
        if error := run_part(out / name, script, flags, heads):
            failed[name] = error
            print(f"{name} {error}", flush=True)
    page = [f"# {Path(config.ckpt).name}", INTRO]
    for title, part, cells in SECTIONS:
        said = failed.get(part, "Not asked for.")
        if part in asked and part not in failed:
            said = table(json.loads((out / part / "rows.json").read_text()), cells)
        page.append(f"## {title}\n\n{said}")
    write_atomic(out / "report.md", ("\n\n".join(page) + "\n").encode())
    print(out / "report.md")
    if failed:
        raise ValueError(f"without {', '.join(failed)}; the same command runs what is missing")


if __name__ == "__main__":
    cli.run(main)
