"""Studies of the method: one command trains and measures each variant, then writes a table, a figure and JSON.

    python study.py span                        # results/studies/span.md, .png, .json
    python study.py span --limit 16 --eval_prompts 4 --results out/try    # the same, small
    python study.py schedule --scorer teacher   # which layers bear pruning, and the schedule that follows

A variant is a run of train.py in out/studies/NAME/VARIANT. A stopped study goes on where it was: give the same command
again. Prompts that are measured on are held out (schedule: the end of the training part, as it chooses).
"""

import bisect
import hashlib
import json
import math
import random
import shlex
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import cli
import data
import eval_tasks
import saliency
import scorers
from download import DEFAULT
from model import read_json
from sdtp import Schedule, alive_count, executed_flops, fingerprint, heads_sha256, load_heads, write_atomic
from tokenizer import Tokenizer
from train import PAPER, TrainConfig

BARE = {
    n: PAPER[n] for n in ("norm", "position", "matches", "ending", "attention", "alike", "conv", "dropout")
}  # the paper's head
LOSSES = {name: value for name, value in PAPER.items() if name != "epochs"}  # the paper's, for as many epochs as ours
STUDIES = {  # {name: {variant: flags of train.py}}; variants "LINE: X" are drawn as lines over X; init: the variant whose heads to begin with
    "span": {str(span): {"span": span} for span in (1, 8, 16, 32)},
    "teacher": {  # their labels as they are
        name: fields | {"recency": 0.0, "primacy": 0.0}
        for name, fields in {
            **{f"{t}, {loss}": {"teacher": t, "label_loss": loss} for t in ("grad_norm", "grad_x_input") for loss in ("response", "all")},
            **{t: {"teacher": t} for t in ("response_attention", "attention_entropy")},
            "grad_norm, response, 4 noisy copies": {"teacher": "grad_norm", "noisy_copies": 4},
        }.items()
    },
    "losses": {
        "paper": LOSSES,
        "no rank": LOSSES | {"rank_weight": 0.0},
        "no rank, no MSE": LOSSES | {"rank_weight": 0.0, "mse_weight": 0.0},
        "with distillation": LOSSES | {"distill": True},
        "ours": {},
        "ours, fine-tuned": {"init": "ours", "lm_weight": 1.0, "distill": True, "noise": 0.05, "list_weight": 0.1, "lr": 5e-4, "epochs": 1},
    },
    "heads": {
        "plain": BARE,
        "+ norm": BARE | {"norm": True},
        "+ position": BARE | {"norm": True, "position": True},
        "+ matches": {"ending": False, "attention": False, "alike": False, "dropout": 0.0},
        "+ ending": {"attention": False, "alike": False, "dropout": 0.0},
        "+ dropout": {"attention": False, "alike": False},
        "+ attention": {"alike": False},
        **{f"+ alike, d/{divisor}": {"divisor": divisor} for divisor in (2, 4, 8, 16)},
        **{f"+ alike, conv {k}": {"conv": k} for k in (5, 17)},
    },
    "first_layer": {f"keep {r}: {layer}": {"shares": f"{layer}:{r}"} for r in (0.9, 0.8, 0.7) for layer in range(0, 11, 2)},
    "stages": {str(stages): {"stages": stages} for stages in (1, 2, 3, 5, 9)} | {"ours": {}},
    "recency": {str(r): {"recency": r} for r in (0.0, 2.0, 4.0, 8.0)},
    "primacy": {str(p): {"primacy": p} for p in (0.0, 0.5, 1.0, 2.0)},
    "prompts": {str(n or "all"): {"max_prompts": n} for n in (125, 250, 500, 1000, 2000, 0)},
    "seeds": {str(seed): {"seed": seed} for seed in range(3)},
}  # fmt: skip


@dataclass
class StudyConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    data: str = ""  # as train.py's
    limit: int = 500  # training prompts at most (0: all; variants that ask for more are left out)
    eval_prompts: int = 32  # held-out prompts that variants are measured on
    flags: str = ""  # more flags for every variant's train.py, its own win over these: --flags="--epochs 2 --lr 1e-3"
    out_dir: str = "out/studies"  # runs go to out_dir/NAME/VARIANT
    label_cache: str = "out/studies/labels"  # what all runs have marked
    results: str = "results/studies"  # the table, figure and JSON go here
    # study schedule
    scorer: str = "teacher"  # teacher, sdtp (with --heads), or a training-free scorer of eval_tasks.py
    heads: str = ""  # sdtp: folder of heads, at whose layers stages may be
    layers: str = "0,1,2,4,6,8,10,13,16,20,24"  # where stages may be
    shares: str = "0.85,0.7,0.55,0.45,0.35,0.25,0.15"  # what they may keep
    ratio: float = 0.9  # compute to spend: of one stage at --first_layer with train.py's --ratio
    first_layer: int = 4  # the layer of that stage
    span: int = TrainConfig.span  # neighbouring tokens kept or dropped together
    prompts: int = 16  # training prompts to find the schedule on, and as many others to measure it on
    prompt_len: int = 512  # text: tokens of a prompt
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda


# ---------------------------------------------------------------------------- variants


def arguments(fields):
    """{field: value} as a script's flags."""
    pairs = ((name, value) if value is not False else (f"no-{name}", True) for name, value in fields.items())
    return [part for name, value in pairs for part in (f"--{name}", *[str(value)] * (value is not True))]


def slug(variant):
    """A variant's folder name."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in variant)


def run_variant(out, fields, config):
    """One run of train.py, or what is left of it; ValueError where it fails, or the folder holds another run."""
    base = {name: getattr(config, name) for name in ("ckpt", "data", "eval_prompts", "dtype", "device")}
    flags = [*arguments(base | {"max_prompts": config.limit}), *shlex.split(config.flags), *arguments(fields)]
    started = (out / "config.json").is_file()
    if not started:
        write_atomic(out / "flags.json", json.dumps(flags).encode())
    elif json.loads(data.read_text(out / "flags.json")) != flags:
        raise ValueError(f"{out} holds a run with other flags (flags.json): delete it, or choose another --out_dir")
    if (out / "eval.json").is_file():
        return
    shared = ["--label_cache", config.label_cache, "--eval_rows", str(out.parent / "rows.jsonl")]
    shared += ["--eval_methods", "sdtp,teacher"]  # which collect() reads, whatever --flags say
    places = ["--out_dir", str(out), *shared, *["--resume"] * started]
    if error := cli.run_logged("train.py", [*flags, *places], out / "stdout.log"):
        raise ValueError(f"variant {out.name!r} {error}")


def collect(variant, out):
    """(the table row of a finished run: heads and teacher on its held-out prompts, the mean of the log's last tenth; its
    heads' results, prompt by prompt)."""
    rows = {row["method"]: row for row in json.loads(data.read_text(out / "eval.json"))}
    log = [json.loads(line) for line in data.read_text(out / "log.jsonl").splitlines()]
    end = log[-max(1, len(log) // 10) :]
    heads = read_json(out / "heads" / "heads.json")
    row = {"variant": variant, "prompts": heads["prompts"]}
    row |= {name: statistics.fmean(r[name] for r in end) for name in ("overlap", "list") if name in end[0]}
    row |= {name: rows["sdtp"][name] for name in ("ppl_diff", "low", "high", "mean_alive", "flops_share")}
    row |= {"teacher_ppl_diff": rows["teacher"]["ppl_diff"], "eval_prompts": rows["sdtp"]["prompts"]}
    row |= {f"run_{name}": rows["sdtp"][name] for name in ("commit", "command")}
    own = {"method": "sdtp", **{name: heads[name] for name in ("sha256", "span", "schedule")}}
    every = eval_tasks.Results(out.parent / "rows.jsonl").values()
    results = [result for result in every if all(result.get(name) == value for name, value in own.items())]
    if len(results) != rows["sdtp"]["prompts"]:
        rest = f"delete it and {out.parent}/*/eval.json, and give the same command again"
        raise ValueError(f"{out.parent}/rows.jsonl has {len(results)} results of {out}'s heads: {rest}")
    return row, results


COLUMNS = {  # of the Markdown table: title -> how a row fills it
    "variant": "{variant}",
    "prompts": "{prompts}",
    "overlap": "{overlap:.3f}",
    "L_list": "{list:.3f}",
    "PPL difference": "{ppl_diff:+.1%}",
    "95 % interval": "{low:+.1%} to {high:+.1%}",
    "over the first, paired": "{over_first:+.1%} [{over_first_low:+.1%}, {over_first_high:+.1%}]",
    "of the teacher": "{teacher_ppl_diff:+.1%}",
    "mean alive": "{mean_alive:.3f}",
    "FLOPs": "{flops_share:.3f}",
}


def table(rows, columns=COLUMNS):
    """Rows as Markdown, with the columns that some row fills."""

    def cell(row, column):
        try:
            return columns[column].format_map(row)
        except KeyError:
            return ""

    names = [c for c in columns if any(cell(row, c) for row in rows)]
    lines = [names, ["---"] * len(names), *([cell(row, c) for c in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows, title, path):
    """PPL difference of each variant with its interval, in per cent; variants "LINE: X" as lines over X."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    names = [r["variant"].rpartition(": ") for r in rows]
    for line in dict.fromkeys(name[0] for name in names):
        part = [(x, r) for (label, _, x), r in zip(names, rows) if label == line]
        middle = [100 * r["ppl_diff"] for _, r in part]
        error = [[100 * abs(r[end] - r["ppl_diff"]) for _, r in part] for end in ("low", "high")]
        axis.errorbar([x for x, _ in part], middle, error, marker="o", capsize=3, ls="-" if line else "", label=line)
    if any(name[0] for name in names):
        axis.legend()
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set(title=title, ylabel="PPL difference, %")
    axis.tick_params("x", rotation=0 if all(len(x) < 6 for _, _, x in names) else 30)
    figure.tight_layout()
    cli.save_figure(figure, path)


def write(name, rows, config, note="Prompts trained on; measured on held-out ones."):
    """NAME.md and NAME.json in --results."""
    results, origin = Path(config.results), ", ".join(cli.ORIGIN[key] for key in ("commit", "machine", "versions"))
    text = f"# Study: {name}\n\n{note}\n\n{table(rows)}\n\n`{cli.ORIGIN['command']}`, commit {origin}\n"
    write_atomic(results / f"{name}.md", text.encode())
    cli.write_rows(results / f"{name}.json", rows, study=name)


def run_variants(name, config):
    """A study of STUDIES; what is done so far is written after each variant."""
    rows, first = [], None
    for variant, fields in STUDIES[name].items():
        if config.limit and not 0 < fields.get("max_prompts", 1) <= config.limit:
            print(f"{variant}: left out, --limit is {config.limit}", flush=True)
            continue
        runs = Path(config.out_dir) / name
        out = runs / slug(variant)
        if "init" in fields:
            fields = fields | {"init": str(runs / slug(fields["init"]) / "heads")}
        print(f"{variant}: {' '.join(arguments(fields))} > {out / 'stdout.log'}", flush=True)
        run_variant(out, fields, config)
        row, results = collect(variant, out)
        first = first or results
        row |= zip(("over_first", "over_first_low", "over_first_high"), eval_tasks.compare(results, first, np.expm1))
        rows.append(row)
        write(name, rows, config)
    if not rows:
        raise ValueError(f"--limit {config.limit} leaves out every variant of {name}")
    print(table(rows))
    draw(rows, f"{name}, {rows[0]['eval_prompts']} held-out prompts", Path(config.results) / f"{name}.png")


# ---------------------------------------------------------------------------- the schedule


def allocate(damage, cost, num_hidden_layers, budget):
    """{layer: share}: the stages of least damage whose layers cost at most the budget; exact, by dynamic programming.

    damage: {layer: {share: nats lost when pruned to it there alone}}; cost: {share: FLOPs of a layer}, 1.0 among them.
    A stage that goes from share a to b is taken to lose damage(b) - damage(a) of its layer. ValueError: out of reach.
    """
    layers = sorted(damage)
    fronts = {1.0: [(layers[0] * cost[1.0], 0.0, {})]}  # share alive: [(FLOPs, nats, stages)], none beaten in both
    for layer, end in zip(layers, [*layers[1:], num_hidden_layers]):
        lost, found = damage[layer] | {1.0: 0.0}, {}
        for alive, paths in fronts.items():
            for share in (s for s in lost if s <= alive):
                more, worse = (end - layer) * cost[share], lost[share] - lost[alive]
                step = {layer: share} if share < alive else {}
                found.setdefault(share, []).extend((f + more, n + worse, stages | step) for f, n, stages in paths)
        fronts = {}
        for share, paths in found.items():
            best = float("inf")
            for path in sorted((p for p in paths if p[0] <= budget), key=lambda p: p[:2]):
                if path[1] < best:
                    best = path[1]
                    fronts.setdefault(share, []).append(path)
    if not fronts:
        raise ValueError("no schedule of these layers and shares costs as little as the budget")
    return min((p for paths in fronts.values() for p in paths), key=lambda p: (p[1], p[0]))[2]


def block_flops(model, rows):
    """FLOPs of one block on so many rows."""
    return sum(executed_flops(model.config, rows, [rows], logit_rows=0))


def one_stage(layer, flops, n, model):
    """The Schedule of one stage at a layer whose blocks take that many FLOPs on a prompt of n tokens."""
    depth, cost = len(model.layers), partial(block_flops, model)
    count = bisect.bisect_left(range(n + 1), (flops - layer * cost(n)) / (depth - layer), key=cost)
    return Schedule(depth, {layer: min(1.0, count / n)})


def flops_of(schedule, n, model):
    return sum(executed_flops(model.config, n, schedule.alive(n), logit_rows=0))


def rankers(model, example, layers, config, heads):
    """{layer: scorer} for one example; the teacher marks all layers in one pass."""
    if config.scorer == "sdtp":
        return heads
    if config.scorer != "teacher":
        return dict.fromkeys(layers, eval_tasks.SCORERS[config.scorer])
    ids = torch.tensor(example.prompt + example.response, device=model.device)
    labels = saliency.label(model, ids, layers, prompt_lens=[len(example.prompt)])
    return {layer: scorers.from_labels([label]) for layer, label in labels.items()}


def measure(model, examples, schedules, config, heads, path):
    """[[nats of each example's response] under each schedule, None: dense]; what is at `path` is not run again."""
    spans = [s and Schedule(len(model.layers), s, span=config.span) for s in schedules]
    layers = sorted({layer for s in spans if s for layer in s})
    how = [fingerprint(model), config.scorer, heads_sha256(heads), config.span, spans, saliency.TEACHER]
    how += [str(model.norm.weight.dtype)]
    keys = [
        hashlib.sha256(json.dumps([saliency.LABELS, *how, example[:2]]).encode()).hexdigest() for example in examples
    ]
    known = read_json(path) if path.is_file() else {}
    for i, (key, example) in enumerate(zip(keys, examples, strict=True)):
        if key not in known:
            ranks = rankers(model, example, layers, config, heads)
            results = [eval_tasks.score(model, [example], s and {layer: ranks[layer] for layer in s}, s) for s in spans]
            known[key] = [nats[0].sum().item() for nats, _, _ in results]
            write_atomic(path, json.dumps(known).encode())
            print(f"prompt {i + 1}/{len(examples)}: {len(spans)} schedules", flush=True)
    return [list(nats) for nats in zip(*(known[key] for key in keys))]


def difference(nats, dense, examples):
    """{"ppl_diff", "low", "high"} against nats of the same examples."""
    sides = ([{"value": v, "count": len(e.response)} for v, e in zip(part, examples)] for part in (nats, dense))
    return dict(zip(("ppl_diff", "low", "high"), eval_tasks.compare(*sides, np.expm1)))


def sensitivities(alone, each, dense, examples):
    """(table rows, {layer: {share: nats lost}}) of pruning at one layer alone; alone: [(layer, share)], each layer's shares falling."""
    rows, damage = [], {}
    for (layer, share), nats in zip(alone, each, strict=True):
        row = {"variant": f"layer {layer}: {share}", "prompts": len(examples)} | difference(nats, dense, examples)
        rows.append(row)
        # Fewer tokens never help but by chance: the running maximum.
        damage.setdefault(layer, {})[share] = max(0.0, math.log1p(row["ppl_diff"]), *damage.get(layer, {}).values())
    return rows, damage


def run_schedule(config):
    """The study `schedule`: sensitivity, allocation, and what the schedule found costs on other prompts."""
    if config.scorer not in ("teacher", "sdtp", *eval_tasks.SCORERS):
        raise ValueError(f"--scorer {config.scorer}: choose teacher, sdtp, {', '.join(eval_tasks.SCORERS)}")
    try:
        layers = [int(layer) for layer in config.layers.split(",")]
        shares = sorted({float(share) for share in config.shares.split(",")}, reverse=True)
    except ValueError:
        raise ValueError(f"--layers {config.layers} --shares {config.shares}: numbers with commas are needed") from None
    cli.at_least(1, config, "prompts", "span")
    model, folder = cli.load_model(config)
    heads = None
    if config.scorer == "sdtp":
        heads, own, _ = load_heads(config.heads, model)
        heads = {layer: heads[layer] for layer in own.scored()}  # no LateKV
    layers = list(heads or layers)
    training, _ = data.load(config.data or "pydoc,made", Tokenizer(folder), config.prompt_len)
    if len(training) < 2 * config.prompts:
        raise ValueError(f"--prompts {config.prompts}: twice as many are needed, there are {len(training)}")
    drawn = random.Random(0).sample(training, 2 * config.prompts)
    examples, others = drawn[: config.prompts], drawn[config.prompts :]
    depth, n = len(model.layers), round(statistics.fmean(len(e.prompt) for e in drawn))
    budget = Schedule(depth, first_layer=config.first_layer, stages=1).with_ratio(config.ratio)
    path = Path(config.out_dir) / "schedule" / "nats.json"

    alone = [(layer, share) for layer in layers for share in shares]
    dense, *each = measure(model, examples, [None, *({layer: s} for layer, s in alone)], config, heads, path)
    sensitivity, damage = sensitivities(alone, each, dense, examples)
    cost = {share: block_flops(model, alive_count(n, share)) for share in (1.0, *shares)}
    found = Schedule(depth, allocate(damage, cost, depth, flops_of(budget, n, model)))
    single = one_stage(config.first_layer, flops_of(found, n, model), n, model)

    dense, *both = measure(model, others, [None, found, single], config, heads, path)
    rows = []
    for name, schedule, nats in zip(("found", "one stage"), (found, single), both, strict=True):
        given = ",".join(f"{layer}:{round(share, 4)}" for layer, share in schedule.items())
        flops = flops_of(schedule, n, model) / (depth * cost[1.0])
        row = {"variant": f"{name}, --shares {given}", "prompts": len(others), "flops_share": flops}
        rows.append(row | difference(nats, dense, others))
    rows.append({"variant": "found over one stage", "prompts": len(others)} | difference(*both, others))
    print(table(sensitivity + rows))
    note = f"Prompts of the training part, pruned by {config.scorer} at one layer alone: its share kept; then others."
    write("schedule", [r | {"scorer": config.scorer} for r in sensitivity + rows], config, note)
    draw(sensitivity, "pruned at one layer alone, against the share kept", Path(config.results) / "schedule.png")


def main():
    name, names = "".join(sys.argv[1:2]), (*STUDIES, "schedule")
    if name not in (*names, "-h", "--help"):
        raise ValueError(f"which study? give its name first: {', '.join(names)}")
    config = cli.parse(StudyConfig, __doc__, sys.argv[1 + (name in names) :])
    if name == "schedule":
        run_schedule(config)
    else:
        run_variants(name, config)


if __name__ == "__main__":
    cli.run(main)
