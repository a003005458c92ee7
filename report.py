"""One report of a checkpoint: what pruning saves and what it costs, metrics 1 to 8, in results/CKPT/report.md.

    python report.py --text FILE.txt --data FILE.jsonl --tasks_dir DIR --longbench DIR
    python report.py --text FILE.txt --keep 0.97,0.95,0.9 --lengths ""    # no speed and memory

Each part is a run of bench.py, eval_tasks.py or eval_longbench.py in OUT_DIR/PART; a part without its flag is left out.
Give the same command again after an interruption: finished parts are not run again, the others go on where they can.
"""

import hashlib
import itertools
import json
import shlex
import statistics
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import cli
import data
import eval_tasks
import study
from download import DEFAULT
from model import read_json
from sdtp import write_atomic


@dataclass
class ReportConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT)
    lengths: str = "1024,4096"  # speed and memory: prompt lengths in tokens ("": left out)
    text: str = ""  # perplexity of plain text: a text file
    data: str = ""  # perplexity after copying prompts: a source of train.py (its held-out part)
    tasks_dir: str = ""  # accuracies: folder of boolq_val.jsonl, piqa_valid.jsonl, piqa_valid-labels.lst
    longbench: str = ""  # LongBench: folder of official DATASET.jsonl files, or a data.zip
    max_length: int = 0  # LongBench: longer prompts lose their middle (0: what the model's positions leave)
    methods: str = "sdtp,most_recent,last_attention"  # as in eval_tasks.py; teacher is left out where it cannot be had
    keep: str = "0.98,0.95,0.9,0.8"  # speed, perplexity: budgets as in eval_tasks.py; tasks, LongBench: the heads' own
    limit: int = 0  # prompts, questions of a task, rows of a LongBench set at most (0: each script's own default)
    out_dir: str = ""  # report.md, figures, and a folder for each part (default: results/CKPT)
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda


SMALL = 0.05  # the difference in perplexity that the largest compression is asked for
SOURCES = {"text": "plain text", "copying": "copying prompts"}  # the parts with perplexities
Part = namedtuple("Part", "script asked flags outputs rows heads")  # asked: the flag that it needs; heads: their hash

COLUMNS = study.COLUMNS | {  # a table shows the columns that its rows fill
    "documents": "{documents}", "score": "{score:.2f}", "to dense": "{diff:+.2f}",
    "95 % interval to dense": "{diff_low:+.2f} to {diff_high:+.2f}",
    "1/tau": "{compression:.2f}x", "PPL": "{ppl:.2f}", "loss": "{loss:.3f}", "loss difference": "{loss_diff:+.3f}",
    "tokens": "{length:,}", "alive from layer": "{stages}", "prefill": "{prefill_s:.3f} s", "speedup": "{speedup:.2f}x",
    "executed FLOPs ratio": "{flops_ratio:.2f}x", "end to end": "{total_s:.2f} s",
    "end-to-end speedup": "{total_speedup:.2f}x", "decode ratio": "{decode_ratio:.2f}",
    "KV": "{kv_bytes}", "peak above weights": "{peak_bytes}", "RSS": "{rss_bytes}",
}  # fmt: skip


# ---------------------------------------------------------------------------- parts


def parts(config, out):
    """{name: Part}, those without their flag too."""
    heads = config.heads or f"heads/{Path(config.ckpt).name}"  # bench.py would take untrained ones
    base = {"ckpt": config.ckpt, "heads": heads, "dtype": config.dtype, "device": config.device}
    trained = Path(heads) / "heads.json"  # holds the weights' hash
    sha256 = hashlib.sha256(trained.read_bytes()).hexdigest() if trained.is_file() else ""
    budgets = {"methods": config.methods, "keep": config.keep, "limit": config.limit}
    questions = [m for m in config.methods.split(",") if eval_tasks.parse(m)[0] != "teacher"]  # no response is given
    own = {"methods": ",".join(questions), "limit": config.limit}
    tasks = {"tasks": "boolq,piqa", "data_dir": config.tasks_dir}
    longbench = {"data": config.longbench, "max_length": config.max_length}
    table = [
        ("speed", "bench.py", "lengths", {"lengths": config.lengths, "keep": config.keep}, ("json", "figure")),
        ("tasks", "eval_tasks.py", "tasks_dir", tasks | own, ("json", "rows")),
        ("text", "eval_tasks.py", "text", {"text": config.text, **budgets}, ("json", "rows", "figure")),
        ("copying", "eval_tasks.py", "data", {"data": config.data, **budgets}, ("json", "rows", "figure")),
        ("longbench", "eval_longbench.py", "longbench", longbench | own, ("out_dir",)),
    ]
    files = {"json": "rows.json", "rows": "results.jsonl", "figure": "figure.png", "out_dir": ""}
    found = {}
    for name, script, asked, fields, outputs in table:
        flags = study.arguments({k: v for k, v in (base | fields).items() if v})
        places = study.arguments({flag: out / name / files[flag] for flag in outputs})
        rows = out / name / ("scores.json" if script == "eval_longbench.py" else "rows.json")
        found[name] = Part(script, asked, flags, places, rows, sha256)
    return found


def finished(part):
    """Whether the part has been run to its end; ValueError where its folder holds results of other flags or heads."""
    folder = part.rows.parent
    saved = read_json(folder / "flags.json") if (folder / "flags.json").is_file() else {}
    results = [p for p in folder.glob("*") if p.name not in ("flags.json", "stdout.log")]
    if results and (saved.get("flags"), saved.get("heads")) != (part.flags, part.heads):
        what = "other flags" if saved.get("flags") != part.flags else "heads that have changed since"
        raise ValueError(f"{folder} holds a run with {what} (flags.json): delete it, or choose another --out_dir")
    return bool(saved.get("finished")) and part.rows.is_file()


def run_part(name, part):
    """Run a part, or what is left of it; returns what went wrong in one line, or nothing."""
    folder, command = part.rows.parent, [*part.flags, *part.outputs]
    log, mark = folder / "stdout.log", folder / "flags.json"
    print(f"{name}: {shlex.join(['python', part.script, *command])} > {log}", flush=True)
    saved = {"flags": part.flags, "heads": part.heads, "finished": False}
    write_atomic(mark, json.dumps(saved).encode())
    if error := cli.run_logged(part.script, command, log):
        return error
    write_atomic(mark, json.dumps(saved | {"finished": True}).encode())  # rows come before the end too


# ---------------------------------------------------------------------------- metrics


def label(row):
    """Method and budget of a row."""
    return row["method"] + (f", r = {row['keep']:g}" if row["keep"] and row["method"] != "dense" else "")


def table(rows, names, title=label):
    """Rows as Markdown: a title of each, and those of the named fields that it has a value for."""
    cells = [{"variant": title(r)} | {n: r[n] for n in names.split() if r.get(n) is not None} for r in rows]
    return study.table(cells, COLUMNS) if cells else "Not measured."


def alive_shares(path):
    """{budget: share of the prompt alive at each layer under sdtp}, means over the prompts in a file of --rows."""
    counts = {}
    for result in eval_tasks.Results(path).values():
        counts.setdefault(result["method"], {}).setdefault(result["keep"], []).append(result["alive"])
    n = statistics.fmean(alive[0] for of in counts["dense"].values() for alive in of)  # noted once for all budgets
    return {keep: [statistics.fmean(layer) / n for layer in zip(*of)] for keep, of in counts.get("sdtp", {}).items()}


def pruned(found, parts):
    """Rows of sdtp with `title`, `shares` alive at each layer, and `stages`, where these fall; speed's at its longest prompt."""
    rows = []
    for name, source in SOURCES.items():
        shares = alive_shares(parts[name].rows.with_name("results.jsonl")) if found[name] else {}
        rows += [
            r | {"title": source, "shares": shares.get(r["keep"], [])} for r in found[name] if r["method"] == "sdtp"
        ]
    n = max((r["length"] for r in found["speed"]), default=0)
    for r in found["speed"]:
        if (r["method"], r["length"]) == ("sdtp", n):
            inverse = {"compression": 1 / r["mean_alive"], "flops_share": 1 / r["flops_ratio"]}
            rows.append(r | inverse | {"title": f"{n:,} tokens", "shares": [alive / n for alive in r["alive"]]})
    for row in rows:
        text = ["", *(f"{share:.1%}" for share in row["shares"])]
        row["stages"] = ", ".join(f"{i}: {b}" for i, (a, b) in enumerate(itertools.pairwise(text)) if a != b)
    return rows


def draw(rows, path):
    """Share of the prompt alive at each layer: an axis for each title of pruned()'s rows, a line for each budget."""
    import matplotlib.pyplot as plt

    titles = list(dict.fromkeys(row["title"] for row in rows))
    figure, axes = plt.subplots(1, len(titles), figsize=(5 * len(titles), 3.5), sharey=True, squeeze=False)
    for title, axis in zip(titles, axes[0]):
        for row in (row for row in rows if row["title"] == title):
            shares = [100 * share for share in row["shares"]]
            axis.step(range(len(shares)), shares, where="mid", label=label(row))
        axis.set(title=title, xlabel="layer", ylim=(0, 105))
        axis.legend()
    axes[0][0].set_ylabel("tokens alive, % of the prompt")
    figure.tight_layout()
    cli.save_figure(figure, path)


def memory(speed):
    """The rows of bench.py with bytes as text, beside the difference to dense's at the same length."""
    dense = {r["length"]: r for r in speed if r["method"] == "dense"}
    for r in speed:
        texts = dict.fromkeys(("kv_bytes", "peak_bytes", "rss_bytes"))
        for name in texts:
            if r[name] and (base := dense[r["length"]][name]):
                texts[name] = f"{r[name] / 2**20:,.1f} MiB ({r[name] / base - 1:+.1%})"
        yield r | texts


def largest(rows):
    """A line for each method: the largest compression measured whose difference in perplexity is below SMALL."""
    for method in dict.fromkeys(r["method"] for r in rows if r["method"] != "dense"):
        small = [r for r in rows if r["method"] == method and r["ppl_diff"] < SMALL]
        best = max(small, key=lambda r: r["compression"], default=None)
        said = f"- {method}: none of those measured"
        if best:
            said = f"- {label(best)}: {best['compression']:.2f}x, PPL {best['ppl_diff']:+.1%}"
            said += f" [{best['low']:+.1%}, {best['high']:+.1%}]"
        yield said


# ---------------------------------------------------------------------------- the report


def losses(name, rows):
    """The part of the report about one source of perplexities."""
    fields = "prompts ppl_diff low high mean_alive flops_share compression ppl loss loss_diff"
    figure = f"![PPL difference, {SOURCES[name]}]({name}/figure.png)"
    shown = [r for r in rows if r["method"] != "dense" or r is rows[0]]  # it is the same at all budgets
    end = f"Largest compression measured with a PPL difference under {SMALL:.0%}:"
    return [f"### {SOURCES[name]}", table(shown, fields), *([figure, end, "\n".join(largest(rows))] if rows else [])]


def sections(found, sdtp):
    """Paragraphs of Markdown: the metrics."""
    speed, cost = found["speed"], "mean_alive flops_share compression"
    scores = f"documents score diff diff_low diff_high {cost}"
    tasks = [r | {"diff_low": r["low"], "diff_high": r["high"]} for r in found["tasks"]]
    tasks = [r | {name: 100 * r[name] for name in ("score", "diff", "diff_low", "diff_high")} for r in tasks]
    groups = [r | {"documents": r["n"], "keep": 0} for r in found["longbench"] if r["sets"] > 1 or r["set"] == "all"]
    return [
        "## 1 and 2. Compression ratio, active tokens per layer",
        table(sdtp, f"prompts {cost} stages", lambda r: f"{r['title']}, {label(r)}"),
        *["![tokens alive per layer](alive.png)"] * bool(sdtp),
        "## 3. Prefill and end-to-end speedup",
        table(speed, "length prefill_s speedup flops_ratio total_s total_speedup decode_ratio"),
        *["![speedup and memory](speed/figure.png)"] * bool(speed),
        "## 4. Memory, and its difference to dense",
        table(memory(speed), "length kv_bytes peak_bytes rss_bytes"),
        "## 5. Accuracies, %",
        table(tasks, scores, lambda r: f"{r['task']}, {r['num_fewshot']}-shot, {label(r)}"),
        "## 6 and 7. PPL and loss difference",
        *(paragraph for name in SOURCES for paragraph in losses(name, found[name])),
        "## 8. LongBench",
        table(groups, scores, lambda r: f"{r['set']}, {label(r)}"),
    ]


def origins(found, parts, failed):
    """Where each part's figures come from, or why there are none."""
    for name, part in parts.items():
        said = failed.get(name) or f"not measured, --{part.asked} was not given"
        if rows := found[name]:
            said = f"`{rows[0]['command']}`, commit "
            said += ", ".join(rows[0][key] for key in ("commit", "machine", "versions", "dtype"))
        yield f"- {name}: {said}"


def main():
    config = cli.parse(ReportConfig, __doc__)
    ckpt = Path(config.ckpt).name
    out = Path(config.out_dir or Path("results") / ckpt)
    every, failed = parts(config, out), {}
    asked = {name: part for name, part in every.items() if getattr(config, part.asked)}
    if not asked:
        raise ValueError(f"nothing to measure: give {', '.join(f'--{part.asked}' for part in every.values())}")
    todo = [name for name, part in asked.items() if not finished(part)]  # refuses other flags before anything runs
    for name in todo:
        if error := run_part(name, asked[name]):
            failed[name] = error
            print(f"{name}: {error}", flush=True)
    done = asked.keys() - failed
    found = {name: json.loads(data.read_text(part.rows)) if name in done else [] for name, part in every.items()}
    if sdtp := pruned(found, every):
        draw(sdtp, out / "alive.png")
    intro = "r: the executed prefill FLOPs of the paper's stages with that share; without r: the heads' own schedule."
    text = [f"# Report: {ckpt}", intro, "\n".join(origins(found, every, failed)), *sections(found, sdtp)]
    write_atomic(out / "report.md", ("\n\n".join(text) + "\n").encode())
    print(out / "report.md")
    if failed:
        raise ValueError(f"without {', '.join(failed)}, see above; the same command goes on with what is missing")


if __name__ == "__main__":
    cli.run(main)
