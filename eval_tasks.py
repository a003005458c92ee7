"""What pruning costs: perplexity of responses, or needles found, after a dense and a pruned prompt.

python eval_tasks.py --text FILE.txt                       # windows of plain text
python eval_tasks.py --data FILE.jsonl --keep 0.9,0.8      # held-out rows, at two budgets
python eval_tasks.py --data dolly --methods dense+h2o,sdtp,sdtp+h2o  # KV compression (table 6)
python eval_tasks.py --data dolly --heads out/a,out/b      # two folders of heads
python eval_tasks.py --text FILE.txt --needles 1024,2048   # a number to be found in the text

Every prompt is read by all methods in turn. All methods of a table execute the same prefill FLOPs
at the median prompt: scorers drop as many tokens as sdtp at its stages, peers have its compute at
their own. --rows FILE.jsonl keeps what each prompt gave: a killed run goes on, a method can join.
"""

import hashlib
import json
import math
import re
import statistics
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import cli
import data
import kv
import parallel
import saliency
import scorers
from download import DEFAULT
from flops import at_keep, executed_flops
from model import KVCache
from sdtp import alive_count, dense, generate, keep_count
from tokenizer import Tokenizer

MIN_PROMPT, MAX_PROMPT = 100, 1024  # tokens of a row's prompt: others are left out
MORE_TOKENS = 16  # generated beyond the length of a needle's value: room for a few words before it


@dataclass
class EvalConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT), or several with commas
    text: str = ""  # UTF-8 file: windows of prompt_len + score_len tokens, or needles in it
    data: str = ""  # or a source of train.py, its held-out part: dolly, FILE.jsonl, with commas
    needles: str = ""  # tokens of a prompt with a needle in --text, several with commas
    methods: str = "sdtp,random,most_recent,last_attention,teacher"  # dense always runs
    keep: str = ""  # compute of the paper's stages at this ratio, with commas (default: heads' own)
    prompt_len: int = 1024  # tokens of a window that are pruned
    score_len: int = 128  # tokens scored after it; of a row's response at most so many
    limit: int = 64  # prompts at most, spread over a text; of each length of --needles
    rows: str = ""  # .jsonl file of every prompt's results: what it holds is not computed again
    seed: int = 0  # of method random
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the rows of the tables
    figure: str = ""  # .png file: perplexity against executed FLOPs, a line for each method


# ---------------------------------------------------------------------------- one prompt


def measured(method, heads, notes):
    """The method, which also leaves in the dict `notes` what its prefill of one prompt cost.

    alive: tokens at each layer; seconds; flops: executed, those of `heads` (None: of none) and of
    passes before included; head_flops: the heads' alone; kv_bytes: of the keys and values held.
    """

    def run(model, ids, seqlens, cache):
        start = cli.clock(model)
        logits = method(model, ids, seqlens, cache)
        seconds = cli.clock(model) - start
        alive = [count for (count,) in cache.alive]
        tokens = list(alive)  # of layers with a window their positions, which decide what is seen
        for layer, count in enumerate(alive):
            if model.config.window(layer) is not None:
                tokens[layer] = cache[layer].positions[0, :count]
        parts = executed_flops(model.config, seqlens[0], tokens, heads)
        held = [t[:, :, : c.seqlens[0]].nbytes for c in cache.layers for t in (c.k, c.v)]
        notes.update(alive=alive, seconds=seconds, kv_bytes=sum(held))
        notes.update(flops=sum(parts) + cache.extra_flops, head_flops=parts[-1])
        return logits

    return run


@torch.no_grad()
def score_response(model, example, method):
    """Nats of each response token, (S,) float32, after the prompt as a method reads it.

    Exact: one forward of the response over the cache, at the positions that follow the prompt's.
    """
    prompt = torch.tensor(example.prompt, device=model.device)
    response = torch.tensor(example.response, device=model.device)
    cache, more = KVCache(len(model.layers)), len(response) - 1
    logits = method(model, prompt, [len(prompt)], cache)  # (1, vocab_size)
    if more:  # the last token is only predicted
        positions = cache.next_positions() + torch.arange(more, device=model.device)
        logits = torch.cat((logits, model(response[:-1], positions, [more], cache)))
    return F.cross_entropy(logits.float(), response, reduction="none")


def response_nats(model, example, method):
    """A result of evaluate(): value, the nats of the response; count, its tokens."""
    nats = score_response(model, example, method)
    return {"value": nats.sum().item(), "count": len(nats)}


def needle_found(tokenizer, model, example, method):
    """A result of evaluate(): value, 1 where the greedy answer has the response as a whole word."""
    prompt = torch.tensor(example.prompt, device=model.device)
    new_tokens = len(example.response) + MORE_TOKENS
    ends = tokenizer.eos_token_ids
    (output,) = generate(model, prompt, new_tokens, method, eos_token_ids=ends)
    answer, wanted = tokenizer.decode(output), tokenizer.decode(example.response).strip()
    hit = re.search(rf"\b{re.escape(wanted)}\b", answer)
    return {"value": int(bool(hit)), "count": 1, "answer": answer}


# ---------------------------------------------------------------------------- methods


def parse(method):
    """(name, kind of KV compression or "") of NAME or NAME+KIND; ValueError for anything else."""
    name, plus, kind = method.partition("+")
    if name not in scorers.METHODS or plus and kind not in kv.KINDS:
        known = f"{', '.join(scorers.METHODS)}, each also with +{' or +'.join(kv.KINDS)}"
        raise ValueError(f"unknown method {method!r} (known: {known})")
    return name, kind


def check_one_budget(config, names):
    """ValueError for a --keep or --seed out of range, or without effect on methods so named."""
    if not 0 <= config.keep <= 1 or config.keep and names == {"dense"}:
        raise ValueError(f"--keep {config.keep}: a share from 0 to 1, for methods that drop tokens")
    if config.seed and "random" not in names:
        raise ValueError(f"--seed {config.seed} is for method random alone")


class Plan(NamedTuple):
    """How a method runs at one budget."""

    name: str  # in scorers.METHODS
    kind: str = ""  # of KV compression
    heads: dict = None  # of sdtp alone
    schedule: dict = {}
    span: int = 1

    def method(self, labels=None, key="0"):
        """Of one prompt; labels: {layer: (N,)}, the teacher's; key: hex digits, random's seed."""
        labels = {layer: [scores] for layer, scores in (labels or {}).items()}
        draws = [torch.Generator().manual_seed(int(key[:15], 16))]
        made = scorers.method(self.name, self.schedule, self.span, self.heads, labels, draws)
        return kv.compressed(made, self.kind) if self.kind else made


def plans(config, methods, stages, keeps, n):
    """{(keep, method): Plan}, dense first at every budget; n: tokens of the median prompt.

    methods: names, see parse(); stages: cli.given_stages(), whose suffixes join the names; keeps:
    of flops.at_keep(), 0 for the stages' own shares. A peer that cannot meet a budget is left out,
    and a line says so. ValueError for an unknown method, or stages that cannot meet a budget.
    """
    found, names = {}, {method: parse(method) for method in methods}
    for keep in keeps:
        found[keep, "dense"] = Plan("dense")
        for suffix, (heads, schedule, span) in stages.items():
            try:
                schedule = at_keep(config, schedule, keep, n) if keep and schedule else schedule
            except ValueError as error:
                raise ValueError(f"--keep {keep:g}{suffix}: {error}") from None
            for method, (name, kind) in names.items():
                if name == "dense":
                    found[keep, method] = Plan(name, kind)
                    continue
                try:
                    own = scorers.stages(name, config, schedule, span, n)
                except ValueError as error:
                    at = f" at --keep {keep:g}" if keep else ""
                    print(f"{method}{suffix} is left out{at}: {error}", flush=True)
                    continue
                heads_of = heads if name == "sdtp" else None
                found[keep, method + suffix] = Plan(name, kind, heads_of, *own)
    return found


def digest(heads):
    """SHA-256 of heads, {layer: module}: their layers, classes and all weights."""
    modules = torch.nn.ModuleDict({str(layer): head for layer, head in heads.items()})
    weights = safetensors.torch.save(modules.state_dict())
    return hashlib.sha256(str(modules).encode() + weights).hexdigest()


def result_key(base, plan, own, example):
    """Hash of all that a result depends on, and of nothing else; own: of this method alone."""
    n = len(example.prompt)
    kept = [[layer, alive_count(n, share)] for layer, share in plan.schedule.items()]
    prompt = [example.prompt, example.response]
    parts = json.dumps([*base, *prompt, plan.name, plan.span, kept, own])
    return hashlib.sha256(parts.encode()).hexdigest() + (plan.kind and f"+{plan.kind}")


def at_floor(schedule, n):
    """Whether the protected tokens alone are more than a share above 0 asks for."""
    return any(alive_count(n, share) > keep_count(n, share) for share in schedule.values() if share)


def evaluate(
    run, task, model, examples, methods, stages, *, keeps=(0.0,), seed=0, rows="", teacher=()
):
    """{(keep, method): a result of each example}; every prompt is read by all methods in turn.

    run: run(model, example, method) -> a result as response_nats() gives it; what measured() notes
    and at_floor are added; task: its name, in the keys of the file `rows` (see cli.Results);
    methods, stages, keeps, errors: see plans(), at the median prompt; teacher: (teacher, over)
    of saliency.label() for the method of that name, empty for its defaults.
    """
    if not examples:
        raise ValueError("no prompt to evaluate on")
    n = int(statistics.median(len(e.prompt) for e in examples))
    planned = plans(model.config, methods, stages, keeps, n)
    base = [task, *saliency.identity(model), model.device.type]
    own = {which: plan.heads and digest(plan.heads) for which, plan in planned.items()}
    own |= {which: seed for which, plan in planned.items() if plan.name == "random"}
    own |= {which: teacher for which, plan in planned.items() if plan.name == "teacher"}
    taught = {layer for p in planned.values() if p.name == "teacher" for layer in p.schedule}
    results, found, warm = cli.Results(rows), {which: [] for which in planned}, False
    for example in tqdm(parallel.mine(examples), desc=task, disable=None):
        labels, n = {}, len(example.prompt)
        for which, plan in planned.items():
            key = result_key(base, plan, own[which], example)
            if key not in results:
                if not warm:
                    run(model, example, dense)
                    warm = True
                if plan.name == "teacher" and not labels:
                    ids = torch.tensor(example.prompt + example.response, device=model.device)
                    labels = saliency.label(model, ids, n, sorted(taught), *teacher)
                notes = {}
                got = run(model, example, measured(plan.method(labels, key), plan.heads, notes))
                results.add({"key": key, "keep": which[0], "method": which[1], **got, **notes})
            floor = {"at_floor": at_floor(plan.schedule, n)}
            found[which].append(results[key] | floor)
    return {which: parallel.joined(part, len(examples)) for which, part in found.items()}


# ---------------------------------------------------------------------------- tables


def perplexity(model, examples, methods, stages, **settings):
    """One flat row per method and budget: see table(), and evaluate() for the settings.

    loss: nats per response token, pooled over all tokens; ppl = exp(loss); ppl_diff: ppl over
    dense's, less 1; over_sdtp: ppl over sdtp's, less 1.
    """
    found = evaluate(response_nats, "perplexity", model, examples, methods, stages, **settings)
    rows = table(found, examples, np.expm1)
    for row in rows:
        row["loss"], row["ppl_diff"] = row.pop("value"), row.pop("diff")
        row["ppl"] = math.exp(row["loss"])
    return rows


def needles(tokenizer, model, examples, methods, stages, **settings):
    """One flat row per method and budget: see table(), and evaluate() for the settings.

    accuracy: share of the prompts with an exact match; accuracy_diff: less dense's; over_sdtp: less
    sdtp's; dense_fails: dense finds fewer than half, so that nothing is to be learnt.
    """
    run = partial(needle_found, tokenizer)
    found = evaluate(run, "needle", model, examples, methods, stages, **settings)
    rows = table(found, examples, lambda difference: difference)
    for row in rows:
        row["accuracy"], row["accuracy_diff"] = row.pop("value"), row.pop("diff")
        row["dense_fails"] = rows[0]["accuracy"] < 0.5
    return rows


def table(results, examples, difference):
    """Rows from evaluate()'s results: what it gave, against dense and against the first sdtp.

    value: sum of the results' values over that of their counts; diff, low, high: see compare(),
    with dense; over_sdtp, over_sdtp_low, over_sdtp_high: likewise with sdtp; prompt_tokens: of all
    prompts; at_floor: share of the prompts; and costs().
    """
    lens, rows = [len(e.prompt) for e in examples], []
    sdtp = next((method for _, method in results if method.split(":")[0] == "sdtp"), None)
    for (keep, method), found in results.items():
        row = {"method": method, "keep": keep, "prompts": len(lens), "prompt_tokens": sum(lens)}
        row["value"] = sum(r["value"] for r in found) / sum(r["count"] for r in found)
        dense, ours = results[keep, "dense"], results.get((keep, sdtp))
        row |= zip(("diff", "low", "high"), compare(found, dense, difference))
        if ours:
            over = compare(found, ours, difference)
            row |= zip(("over_sdtp", "over_sdtp_low", "over_sdtp_high"), over)
        row["at_floor"] = sum(r["at_floor"] for r in found) / len(found)
        rows.append(row | costs(found, dense, lens))
    return rows


def compare(found, base, difference):
    """cli.paired_interval() of the results of two methods."""
    values, base_values = ([r["value"] for r in side] for side in (found, base))
    return cli.paired_interval(values, base_values, [r["count"] for r in found], difference)


def costs(found, dense, lens):
    """What a method's results of prompts of `lens` tokens cost, against dense's of the same.

    mean_alive: share of the tokens alive, mean over layers; compression: its inverse (the paper's
    1/tau); flops_share: executed FLOPs over dense's; head_share: the heads' part of the method's;
    kv_bytes: mean; prefill_speedup: median over prompts of dense's seconds over the method's.
    """
    alive = sum(statistics.mean(r["alive"]) for r in found) / sum(lens)
    flops, dense_flops = (sum(r["flops"] for r in side) for side in (found, dense))
    speedups = [base["seconds"] / r["seconds"] for base, r in zip(dense, found)]
    return {
        "mean_alive": alive,
        "compression": 1 / alive,
        "flops_share": flops / dense_flops,
        "head_share": sum(r["head_flops"] for r in found) / flops,
        "kv_bytes": sum(r["kv_bytes"] for r in found) / len(found),
        "prefill_speedup": statistics.median(speedups),
    }


INTERVAL = {"95 %": "[{low:+.1%}, {high:+.1%}]"}
ACCURACY = {"accuracy": "{accuracy:.1%}", "points": "{accuracy_diff:+.1%}"} | INTERVAL
PERPLEXITY = {"loss": "{loss:.3f}", "ppl": "{ppl:.2f}", "diff": "{ppl_diff:+.1%}"} | INTERVAL
OVER_SDTP = {
    "over sdtp": "{over_sdtp:+.1%}",
    "95 % of it": "[{over_sdtp_low:+.1%}, {over_sdtp_high:+.1%}]",
}
OTHERS = {
    "mean alive": "{mean_alive:.3f}",
    "1/tau": "{compression:.2f}x",
    "FLOPs": "{flops_share:.3f}",
    "prefill": "{prefill_speedup:.2f}x",
    "KV MiB": "{mib:.2f}",
    "": "{mark}",
}


def print_rows(rows):
    """The rows of perplexity() or needles(), aligned, budget by budget."""
    columns = {"method": "{method}"} | (PERPLEXITY if "ppl" in rows[0] else ACCURACY)
    columns |= (OVER_SDTP if "over_sdtp" in rows[0] else {}) | OTHERS
    for keep in dict.fromkeys(row["keep"] for row in rows):
        if keep:
            print(f"at the compute of the paper's stages with a ratio of {keep:g}")
        part = [row for row in rows if row["keep"] == keep]
        for i, row in enumerate(part):
            mark = "at the floor" * (row["at_floor"] == 1)
            part[i] = row | {"mib": row["kv_bytes"] / 2**20, "mark": mark}
        cli.print_table(part, columns)
    count, heads = rows[0]["prompts"], max(row["head_share"] for row in rows)
    line = f"{count} prompts of {rows[0]['prompt_tokens'] / count:.0f} tokens on average"
    line += f"; heads: {heads:.2%} of their prefill's FLOPs" * (heads > 0)
    print(line + "; dense finds fewer than half" * rows[0].get("dense_fails", False), flush=True)


def draw(rows, path):
    """PPL difference with its interval against executed FLOPs, both in per cent of dense's."""
    lines = {}
    for row in rows:
        if row["method"] != "dense":
            point = (row["flops_share"], row["ppl_diff"], row["low"], row["high"])
            lines.setdefault(row["method"], []).append([100 * value for value in point])
    labels = {"xlabel": "executed prefill FLOPs, % of dense", "ylabel": "PPL difference, %"}
    cli.draw_lines(lines, path, title=f"{rows[0]['prompts']} prompts", **labels)


# ---------------------------------------------------------------------------- the command


def prompts(config, tokenizer):
    """{length of a needle's prompt, 0 for perplexity: Examples} by the flags; never without any."""
    if config.needles:
        text = data.read_text(config.text)
        lengths = cli.numbers("needles", config.needles, int, lambda n: n > 0)
        how = {"count": config.limit, "held_out": True, "overlap": True}
        sets = {n: data.needle_examples(text, tokenizer, n, **how) for n in lengths}
    elif config.text:
        text, sizes = data.read_text(config.text), (config.prompt_len, config.score_len)
        windows = data.text_windows(text, tokenizer, *sizes)
        count = min(config.limit, len(windows))
        sets = {0: [windows[i * len(windows) // count] for i in range(count)]}
    else:
        sizes = config.prompt_len, config.score_len, MIN_PROMPT, MAX_PROMPT
        sets = {0: data.load(config.data, tokenizer, *sizes)[1][: config.limit]}
    if not all(sets.values()):
        rows = f"no held-out row with a context and a prompt of {MIN_PROMPT} to {MAX_PROMPT} tokens"
        why = "no prompt so long: lower --prompt_len" if config.text else rows
        raise ValueError(f"{config.text or config.data}: {why}")
    return sets


def check_flags(config, methods):
    """ValueError for flags out of range or without effect, before anything is loaded."""
    cli.at_least(1, config, "prompt_len", "score_len", "limit")
    if bool(config.text) == bool(config.data) or config.needles and config.data:
        raise ValueError("give --text FILE, --text FILE with --needles, or --data SOURCE")
    names, windows = {parse(method)[0] for method in methods}, not config.needles
    if parallel.DIVIDED and "teacher" in names:
        raise ValueError("--methods: no teacher with a divided model, which has no gradients")
    rows = all(name == "dolly" or name.endswith(".jsonl") for name in config.data.split(","))
    useful = {"prompt_len": windows and not rows, "score_len": windows, "figure": windows}
    useful |= {"keep": names != {"dense"}, "seed": "random" in names}
    for flag, has_effect in useful.items():
        if flag in config.given and not has_effect:
            raise ValueError(f"--{flag} {getattr(config, flag)} has no effect here: leave it out")


def main():
    config = cli.parse(EvalConfig, __doc__)
    methods, keeps = config.methods.split(","), [0.0]
    check_flags(config, methods)
    if config.keep:
        keeps = cli.numbers("keep", config.keep, float, lambda keep: 0 < keep <= 1)
    model, folder = cli.load_model(config)
    tokenizer, rows = Tokenizer(folder), []
    stages = cli.given_stages(config, model, methods)
    sets = prompts(config, tokenizer)
    room = MORE_TOKENS * bool(config.needles)
    longest = [len(e.prompt) + len(e.response) + room for part in sets.values() for e in part]
    model.positions([max(longest)])  # refuses one that is too long now
    for length, examples in sets.items():
        run = partial(needles, tokenizer) if config.needles else perplexity
        settings = {"keeps": keeps, "seed": config.seed, "rows": config.rows}
        new = run(model, examples, methods, stages, **settings)
        print_rows(new)
        rows += [row | ({"length": length} if length else {}) for row in new]
        cli.write_rows(config.json, rows, source=config.text or config.data, seed=config.seed)
    if config.figure:
        draw(rows, config.figure)


if __name__ == "__main__":
    cli.run(main)
