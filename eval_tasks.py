"""What pruning costs: responses' perplexity, or needles found, after a dense and after a pruned prompt.

python eval_tasks.py --text FILE.txt                       # perplexity: windows of plain text
python eval_tasks.py --data FILE.jsonl --keep 0.9,0.8      # held-out rows in Dolly's fields, at two budgets
python eval_tasks.py --text FILE.txt --methods dense,dense+h2o,sdtp,sdtp+h2o  # KV compression, the paper's table 6
python eval_tasks.py --tasks needle --text FILE.txt        # exact match: a number hidden in the text
python eval_tasks.py --tasks boolq,piqa --methods dense,sdtp   # tasks of lm-evaluation-harness: see eval_harness.py

All methods of a table execute the same prefill FLOPs at the median prompt, or fewer where nothing is left to keep;
NAME_adaptive keeps of each prompt the spans above a threshold, the same for all of the table, together as many tokens
(other prompts, another threshold). NAME_late ranks by NAME and has sdtp's stages, where the heads' LateKV takes what
goes no further. --rows FILE.jsonl keeps what every prompt gave: a killed run goes on, and a method can be added later
to the same prompts. METHOD+h2o or METHOD+snapkv leaves 40 % of a prompt's keys and values after the prefill,
METHOD+h2o@0.2 20 %.
"""

import hashlib
import json
import math
import os
import re
import statistics
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from tqdm import tqdm

import cli
import data
import saliency
import scorers
from cli import clock
from data import Example
from download import DEFAULT
from kv import Compression
from model import KVCache
from sdtp import (
    Schedule, alive_count, calibrate, executed_flops, fingerprint, generate, heads_sha256, held_counts, late_kv,
    paper_stages, prefill, protected_count, select,
)  # fmt: skip
from tokenizer import Tokenizer

SCORERS = {  # training-free, at the stages of the heads
    "most_recent": scorers.most_recent,
    "earliest": scorers.earliest,
    "norm": scorers.norm,
    "last_attention": scorers.last_attention(),  # the last 8 tokens, mean over heads
    "last_attention_w1": scorers.last_attention(1),
    "last_attention_w32": scorers.last_attention(32),
    "last_attention_max": scorers.last_attention(8, "max"),
    "last_attention_best3": scorers.last_attention(8, 3),
    "accumulated_attention": scorers.accumulated_attention,
}
PEERS = {  # whole policies, at stages of their own: what ranks
    "lazyllm": scorers.last_attention(1),
    "fastkv": scorers.last_attention(8, pool=7),  # maximum over 7 neighbours
    "gemfilter": None,
    "self_information": None,
}
METHODS = ("dense", "sdtp", "random", "most_recent", "last_attention", "teacher", "floor")  # the default
WITH_HEADS = ("sdtp", "sdtp_adaptive")
# of these each prompt keeps the spans above a threshold, together as many as the budget allows
ADAPTIVE = tuple(f"{name}_adaptive" for name in ("sdtp", *SCORERS))
# rankings by whose stages the heads' LateKV takes what goes no further, as it does sdtp's
LATE = tuple(f"{name}_late" for name in ("teacher", "random", *SCORERS))
KNOWN = (*dict.fromkeys((*METHODS, *ADAPTIVE, *LATE, *SCORERS, *PEERS)),)
# Of the layers: from there on scorers, which have no LateKV, leave the protected tokens alone (results/LOG.md, session 6)
FLOOR = 5 / 6
GEMFILTER_LAYER = 0.4  # share of the layers below the filter (the paper: 13 of 32)
MORE_TOKENS = 16  # generated beyond the length of a needle's value: room for a few words before it


@dataclass
class EvalConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT)
    tasks: str = "ppl"  # ppl, needle, or tasks of lm-evaluation-harness with commas
    text: str = ""  # text file: windows of prompt_len + score_len tokens, spread over the file, or needles in it
    data: str = ""  # or a source of train.py (its held-out part): pydoc, made, dolly, FILE.jsonl, FILE.txt, with commas
    methods: str = ",".join(METHODS)  # NAME@16: spans of 16, @16@2: one stage, at 2, @16@2/25: the floor from 25 on too
    keep: str = ""  # with commas: FLOPs of the paper's stages with that share (default: the heads' own, or 0.9)
    teacher: str = saliency.TEACHER  # the labels that method teacher ranks by
    label_loss: str = saliency.LABEL_LOSS  # and whom they are for: the response, or all next tokens
    data_dir: str = ""  # harness: folder of boolq_val.jsonl, piqa_valid.jsonl, piqa_valid-labels.lst (default: the hub)
    num_fewshot: int = -1  # harness: examples before each question (-1: the task's own number)
    limit: int = 0  # prompts at most, needle: of each length (0: 64), harness: questions of each task (0: all)
    lengths: str = "1024,2048,4096"  # needle: tokens of a prompt
    prompt_len: int = 1024  # text: tokens of a prompt, which are pruned
    score_len: int = 128  # tokens scored after it (rows: at most, lest a few that repeat their prompt outweigh all)
    min_prompt: int = 200  # rows: shorter prompts are left out
    max_prompt: int = 800  # rows: longer prompts are left out
    batch_size: int = 1  # prompts of different lengths in one forward
    seed: int = 0  # of method random
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    rows: str = ""  # .jsonl file of every prompt's results: what it holds is not computed again
    json: str = ""  # file for the table's rows
    figure: str = ""  # ppl: .png file of the cost in perplexity against executed FLOPs, for several budgets


# ---------------------------------------------------------------------------- running a batch


def score(model, examples, rankers=None, schedule=None, kv=None):
    """Prefill the prompts of a batch of Examples, then score their responses exactly.

    Returns (nats per response token, (S,) per example; tokens alive per layer, a list per example; seconds of
    the prefill).
    """
    prompts = [torch.tensor(e.prompt, device=model.device) for e in examples]
    responses = [torch.tensor(e.response, device=model.device) for e in examples]
    prompt_lens, scored = [len(p) for p in prompts], [len(r) for r in responses]
    sizes = [n + s for n, s in zip(prompt_lens, scored)]
    positions = [p[n:] for p, n in zip(model.positions(sizes).split(sizes), prompt_lens)]
    cache = KVCache(len(model.layers), extra=max(scored))
    start = clock(model)
    first, cache = prefill(model, torch.cat(prompts), rankers, schedule, prompt_lens, cache, kv)
    seconds = clock(model) - start
    alive = [list(counts) for counts in zip(*cache.alive)]
    with torch.no_grad():  # the row after each last token is not used, and spares a case for answers of one token
        rest = model(torch.cat(responses), torch.cat(positions), scored, cache).split(scored)
    logits = (torch.cat((one[None], more[:-1])).float() for one, more in zip(first, rest))
    return [F.cross_entropy(x, r, reduction="none") for x, r in zip(logits, responses)], alive, seconds


def perplexity_results(model, examples, rankers=None, schedule=None, kv=None):
    """score() as results: value is the nats of a response, count its tokens."""
    nats, alive, seconds = score(model, examples, rankers, schedule, kv)
    return [
        {"value": n.sum().item(), "count": len(n), "alive": a, "seconds": seconds / len(nats)}
        for n, a in zip(nats, alive)
    ]


def timed_generate(model, examples, new_tokens, rankers=None, schedule=None, **how):
    """Pruned prefill of a batch's prompts, then greedy decoding; how: more arguments of generate().

    Returns (new ids of each example; tokens alive per layer, a list per example; seconds until the first token; in all).
    """
    ids = torch.tensor([t for e in examples for t in e.prompt], device=model.device)
    cache, first, start = KVCache(len(model.layers), extra=new_tokens), [], clock(model)
    seqlens, on_token = [len(e.prompt) for e in examples], lambda _: first or first.append(clock(model) - start)
    outputs = generate(
        model, ids, new_tokens, rankers, schedule, seqlens=seqlens, cache=cache, on_token=on_token, **how
    )
    return outputs, [list(counts) for counts in zip(*cache.alive)], first[0], clock(model) - start


def needle_results(tokenizer, model, examples, rankers=None, schedule=None, kv=None):
    """timed_generate() as results: value is 1 where the answer holds the response as a whole word, count is 1."""
    new_tokens = max(len(e.response) for e in examples) + MORE_TOKENS
    outputs, alive, seconds, _ = timed_generate(
        model, examples, new_tokens, rankers, schedule, kv=kv, eos_token_ids=tokenizer.eos_token_ids
    )
    results = []
    for example, output, counts in zip(examples, outputs, alive):
        answer, wanted = tokenizer.decode(output), tokenizer.decode(example.response).strip()
        hit = re.search(rf"\b{re.escape(wanted)}\b", answer)
        result = {"value": int(bool(hit)), "count": 1, "alive": counts, "seconds": seconds / len(examples)}
        results.append(result | {"answer": answer})
    return results


# ---------------------------------------------------------------------------- methods, and their compute


def parse(method):
    """(name, span or None, layers of its stages, if any) of NAME, NAME@SPAN, NAME@SPAN@LAYER or NAME@SPAN@LAYER/FLOOR, each with or without +KV.

    ValueError for any other. FLOOR: the layer from which on the protected tokens alone are alive; where that alone would cost less
    than the budget, it begins at a later one (Schedule.fitted).
    """
    match = re.fullmatch(r"(\w+)(?:@([1-9]\d*)(?:@(\d+)(?:/(\d+))?)?)?", method.partition("+")[0])
    name, span, *stages = match.groups() if match else (None, None)
    layers = [int(layer) for layer in stages if layer]
    if name not in KNOWN or layers != sorted({*layers}):
        forms = "NAME@16 for spans of 16 tokens, NAME@16@2 for one stage, at layer 2, NAME@16@2/25 for the floor from 25 on too"
        raise ValueError(f"unknown method {method!r} (known: {', '.join(KNOWN)}; {forms})")
    if span and name == "dense" or layers and name in (*WITH_HEADS, *LATE, "floor", *PEERS):
        raise ValueError(f"method {method!r}: {name} has " + ("no stages" if name == "dense" else "stages of its own"))
    if compressed(method) and name == "gemfilter":
        raise ValueError(
            f"method {method!r}: gemfilter's second prompt is a shorter one, and so would a share of it be"
        )
    return name, span and int(span), layers


def compressed(method):
    """The Compression of METHOD+h2o, METHOD+h2o@0.2 or +snapkv, or None. ValueError for any other."""
    _, plus, kv = method.partition("+")
    kind, at, keep = kv.partition("@")
    try:
        return Compression(kind, float(keep) if at else Compression.keep) if plus else None
    except ValueError:
        forms = "+h2o and +snapkv keep 40 % of the KV cache, +h2o@0.2 20 %"
        raise ValueError(f"unknown KV compression in method {method!r} ({forms})") from None


def filter_depth(config):
    """Layers of GemFilter's first pass."""
    return max(1, round(GEMFILTER_LAYER * config.num_hidden_layers))


def filtering_flops(name, config, n):
    """Executed FLOPs of a method's pass over a prompt of n tokens before the prefill proper."""
    depth = {"gemfilter": filter_depth(config), "self_information": config.num_hidden_layers}.get(name, 0)
    return sum(executed_flops(config, n, [n] * depth, logit_rows=n * (name == "self_information")))


def ranking(name):
    """What a method ranks by: its name without _adaptive or _late."""
    return name.removesuffix("_adaptive").removesuffix("_late")


def check_late(methods, schedule):
    """ValueError for NAME_late where the heads, whose schedule this is, have no LateKV."""
    names = [method for method in methods if parse(method)[0] in LATE]
    if names and not schedule.late:
        raise ValueError(f"method {names[0]!r} needs heads with a LateKV: train some with train.py --late")


def own_heads(name, heads):
    """Of the heads, those that a method runs: all, the LateKV alone, or None."""
    late = name in LATE and late_kv(heads)
    return heads if name in WITH_HEADS else {late.layer: late} if late else None


def flops_share(method, config, lens, alive, heads=None):
    """Executed FLOPs of a method's prefills of prompts of `lens` tokens over dense's: sdtp's heads and a filtering pass count.

    alive: tokens per layer, of each prompt. A LateKV and KV compression's scores count; what training-free scorers compute
    does not, which is generous to them.
    """
    name, kv, total, dense = parse(method)[0], compressed(method), 0, 0
    heads = own_heads(name, heads)
    for n, counts in zip(lens, alive):
        total += sum(executed_flops(config, n, counts, heads)) + filtering_flops(name, config, n)
        total += kv.flops(config, counts, n, held_counts(counts, n, heads)) if kv else 0
        dense += sum(executed_flops(config, n, [n] * config.num_hidden_layers))
    return total / dense


def kv_bytes(method, model, lens, alive, heads=None):
    """Bytes of keys and values that a prompt leaves, mean over prompts; the arguments of flops_share()."""
    config, kv, heads = model.config, compressed(method), own_heads(parse(method)[0], heads)
    held = [held_counts(counts, n, heads) for counts, n in zip(alive, lens)]  # as prefill has checked
    held = [kv.held(counts, n) for counts, n in zip(held, lens)] if kv else held
    token = 2 * config.num_key_value_heads * config.head_dim * model.norm.weight.dtype.itemsize  # of one layer
    return token * sum(map(sum, held)) / len(lens)


def policy(method, config, schedule, heads, n, keep=0.0):
    """A method's Schedule, None for dense: its stages, with the shares at which a prompt of n tokens costs the budget.

    schedule, heads: sdtp's; training-free scorers have its stages (the last at FLOOR where sdtp has a LateKV), or one of their
    own, and its span, peers spans of 1.
    keep: the budget is the paper's stages' with that share; at 0 it is what sdtp costs.
    self_information, whose filtering pass alone costs more than dense, has the budget beside it; KV compression, which
    comes after a prefill, has what it scores by beside it too.
    ValueError where these stages cannot be had for it.
    """
    (name, span, at), layers = parse(method), config.num_hidden_layers
    if name == "dense":
        return None
    own = {
        "lazyllm": paper_stages(layers),  # dropping more and more
        "fastkv": {layers // 2: 0.5},  # one cut in the middle
        "gemfilter": {0: 0.5},  # of what its second pass reads
        "self_information": {0: 0.5},
        "floor": {min(schedule): 0.0},
    }
    late, shares = schedule.late and name in (*WITH_HEADS, *LATE), schedule
    if schedule.late and not late:
        floor = min(round(FLOOR * layers), layers - 1)
        shares = {layer if share else max(floor, layer): share for layer, share in schedule.items()}
    shares = dict(zip(at, (0.5, 0.0))) if at else own.get(name, shares)
    stages = Schedule(layers, shares, span=span or (1 if name in PEERS else schedule.span), late=late)
    if name == "floor":
        return stages

    def cost(method, stages):
        return flops_share(method, config, [n], [stages.alive(n)], heads)

    budget = cost("dense", paper_stages(layers, keep)) if keep else cost("sdtp", schedule)
    if name == "self_information":
        budget += cost(name, stages) - cost("dense", stages)
    try:
        return stages.fitted(partial(cost, name), budget)
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None


def adapted(method, model, stages, heads, prompts):
    """A method's Schedule: its stages, of an adaptive one with the thresholds by which these prompts, lists of ids, together keep their shares.

    So methods are compared at about equal compute. The thresholds are the same for all prompts, and no response is looked at.
    """
    name = parse(method)[0]
    if name not in ADAPTIVE:
        return stages
    name = ranking(name)
    rankers = heads if name == "sdtp" else dict.fromkeys(stages, SCORERS[name])
    return calibrate(model, prompts, rankers, stages).as_adaptive()


def given_scores(name, model, batch, layers, teacher, label_loss):
    """{layer: (N,) scores by position for each example}: the teacher's at these layers, self-information, or GemFilter's at 0."""
    parts = [e.prompt + e.response if name == "teacher" else e.prompt for e in batch]
    ids, seqlens = torch.tensor([t for part in parts for t in part], device=model.device), [len(p) for p in parts]
    if name == "teacher":
        starts = [len(e.prompt) for e in batch] if label_loss == "response" else None
        labels = saliency.label(model, ids, layers, teacher, seqlens, starts)
        return {layer: s.split(seqlens) for layer, s in labels.items()}
    scored = scorers.self_information if name == "self_information" else gemfilter_scores
    return {0: scored(model, ids, seqlens).split(seqlens)}


@torch.no_grad()
def gemfilter_scores(model, ids, seqlens):
    """(T,) scores of GemFilter (Shi et al. 2024) after a first pass through some layers."""
    x, positions, depth = model.embed(ids), model.positions(seqlens), filter_depth(model.config)
    for block in model.layers[:depth]:
        x = block(x, positions, seqlens)
    return scorers.last_query(x, positions, seqlens, model.layers[depth])


def gemfilter(example, scores, stages):
    """The Example whose prompt is what the scores have chosen, to be read by a second pass at new positions."""
    n = [len(example.prompt)]
    keep, _ = select(scores, torch.arange(n[0], device=scores.device), stages[0], n, n, stages.span)
    return Example([example.prompt[i] for i in keep.tolist()], example.response)


def run_method(run, method, model, examples, stages, keys, heads, given):
    """Results of a batch by one method; keys: the random state of each; given: given_scores() of these examples, or None."""
    name, kv = parse(method)[0], compressed(method)
    run = partial(run, kv=kv) if kv else run
    late, name = own_heads(name, heads) if name in LATE else {}, ranking(name)
    if name == "gemfilter":
        return run(model, [gemfilter(e, scores, stages) for e, scores in zip(examples, given[0])])
    if name in WITH_HEADS:
        return run(model, examples, heads, stages)
    if given:
        return run(model, examples, {layer: scorers.from_labels(given[layer]) for layer in stages} | late, stages)
    draws = scorers.random(*(torch.Generator().manual_seed(int(key[:15], 16)) for key in keys))
    ranked = SCORERS | PEERS | {"floor": scorers.most_recent, "random": draws}
    return run(model, examples, dict.fromkeys(stages or (), ranked.get(name)) | late, stages)


# ---------------------------------------------------------------------------- every prompt's result


class Results(dict):
    """{key: result of one prompt by one method}, each appended to a .jsonl file (none without a path) as it comes.

    A torn last line, of a run that was killed, is cut off. ValueError names another line that is no result.
    """

    def __init__(self, path=""):
        super().__init__()
        self.path = path
        if not path:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if not Path(path).exists():
            return
        *lines, torn = Path(path).read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                self[result["key"]] = result
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}: not a result of eval_tasks.py") from None
        if torn:
            os.truncate(path, sum(len(line) + 1 for line in lines))

    def add(self, result):
        self[result["key"]] = result
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(result) + "\n")


def policies(config, examples, methods, schedule, heads=None, keeps=(0.0,)):
    """{(keep, method): Schedule} by policy() at the median prompt, dense first; a method that cannot meet a budget is left out of it, and says so.

    ValueError for an unknown method or layer, no example, or no heads for sdtp.
    """
    if outside := [method for method in methods if max(parse(method)[2], default=0) >= config.num_hidden_layers]:
        raise ValueError(f"method {outside[0]!r}: the model has layers 0 to {config.num_hidden_layers - 1}")
    if not examples:
        raise ValueError("no prompt to evaluate on")
    if needs_heads(methods) and not heads:
        first = next(method for method in methods if needs_heads([method]))
        raise ValueError(f"method {first} needs heads: give --heads FOLDER, or train some with train.py")
    check_late(methods, schedule)
    n, found = int(statistics.median(len(e.prompt) for e in examples)), {}
    for keep in keeps:
        for method in dict.fromkeys(["dense", *methods]):
            try:
                found[keep, method] = policy(method, config, schedule, heads, n, keep)
            except ValueError as error:
                print(f"{error} (left out{f' of --keep {keep:g}' * bool(keep)})", flush=True)
    return found


def result_keys(task, model, examples, plan, digest, seed, labels):
    """{(keep, method): a key per example}: a hash of all that its result depends on, and of nothing else, then any +KV; digest: the heads' own."""
    base = [task, fingerprint(model), str(model.norm.weight.dtype), model.device.type]
    own = {"random": seed, "teacher": [saliency.LABELS, *labels]}
    own |= {name: [digest, own.get(ranking(name))] for name in LATE} | dict.fromkeys(WITH_HEADS, digest)
    keys = {}
    for (keep, method), stages in plan.items():
        name, kv, keys[keep, method] = parse(method)[0], compressed(method), []
        for example in examples:
            kept = stages and [[layer, alive_count(len(example.prompt), share)] for layer, share in stages.items()]
            if stages and stages.adaptive:
                kept = stages.threshold | {layer: 0.0 for layer, share in stages.items() if not share}
            parts = json.dumps([*base, example[:2], name, stages and [stages.span, kept], own.get(name)])
            keys[keep, method].append(hashlib.sha256(parts.encode()).hexdigest() + (f"+{kv}" if kv else ""))
    return keys


def evaluate(
    run, task, model, examples, methods, schedule, heads=None, *, keeps=(0.0,), teacher=saliency.TEACHER,
    label_loss=saliency.LABEL_LOSS, seed=0, batch_size=1, rows="",
):  # fmt: skip
    """{(keep, method): a result per example}: every batch is run by every method in turn, dense first.

    run: perplexity_results, needle_results of a tokenizer, or eval_harness's; task: its name, in the keys of the file `rows` (see
    Results); methods, keeps, and errors: see policies(); adaptive methods: see adapted().
    """
    plan = policies(model.config, examples, methods, schedule, heads, keeps)
    for (keep, method), stages in plan.items():
        plan[keep, method] = adapted(method, model, stages, heads, [e.prompt for e in examples])
    digest = heads_sha256(heads)
    keys = result_keys(task, model, examples, plan, digest, seed, [teacher, label_loss])
    layers = sorted({layer for (_, m), stages in plan.items() if ranking(parse(m)[0]) == "teacher" for layer in stages})
    results = Results(rows)
    if any(key not in results for column in keys.values() for key in column):
        run(model, examples[:1])  # a warm-up
    for start in tqdm(range(0, len(examples), batch_size), desc=task, disable=None):
        batch, shared = examples[start : start + batch_size], {}  # shared: what methods rank by, once a batch
        for (keep, method), stages in plan.items():
            name, given = ranking(parse(method)[0]), None
            column = keys[keep, method][start : start + batch_size]
            todo = {key: i for i, key in enumerate(column) if key not in results}
            if not todo:
                continue
            if name in ("teacher", "self_information", "gemfilter"):
                if name not in shared:
                    shared[name] = given_scores(name, model, batch, layers, teacher, label_loss)
                given = {layer: [scores[i] for i in todo.values()] for layer, scores in shared[name].items()}
            found = run_method(run, method, model, [batch[i] for i in todo.values()], stages, todo, heads, given)
            how = {"keep": keep, "method": method}
            if name in WITH_HEADS:  # as in their heads.json
                how |= {"sha256": digest, "span": stages.span, "schedule": dict(stages)}
            if stages and stages.adaptive:
                how["threshold"] = stages.threshold
            for key, result in zip(todo, found):
                results.add({"key": key, **how, **result})
    return {which: [results[key] for key in column] for which, column in keys.items()}


# ---------------------------------------------------------------------------- tables


def perplexity(model, examples, methods, schedule, heads=None, **settings):
    """One flat row per method and budget: see table(), and evaluate() for the settings.

    loss in nats per response token, pooled over all tokens; ppl = exp(loss); ppl_diff = ppl / dense ppl - 1, with
    its interval low, high; over_sdtp: ppl / sdtp's ppl - 1 likewise, or sdtp_adaptive's (see table()).
    """
    results = evaluate(perplexity_results, "perplexity", model, examples, methods, schedule, heads, **settings)
    rows = table(results, model, examples, heads, np.expm1)
    for row in rows:
        loss, diff = row.pop("value"), row.pop("diff")
        row |= {"loss": loss, "ppl": math.exp(loss), "ppl_diff": diff, "loss_diff": math.log1p(diff)}
        row["scored_tokens"] = sum(len(e.response) for e in examples)
    return rows


def needle(tokenizer, model, examples, methods, schedule, heads=None, **settings):
    """One flat row per method and budget: see table(), and evaluate() for the settings.

    accuracy: share of the prompts with an exact match; accuracy_diff = accuracy - dense's, with its interval low, high;
    over_sdtp: accuracy - sdtp's likewise; dense_fails: dense finds fewer than half, so that nothing is to be learnt.
    """
    run = partial(needle_results, tokenizer)
    results = evaluate(run, "needle", model, examples, methods, schedule, heads, **settings)
    rows = table(results, model, examples, heads, lambda difference: difference)
    fails = rows[0]["value"] < 0.5
    for row in rows:
        row |= {"accuracy": row.pop("value"), "accuracy_diff": row.pop("diff"), "dense_fails": fails}
    return rows


def costs(method, model, lens, found, dense, heads):
    """What a method's results of prompts of `lens` tokens cost.

    mean_alive: share of the prompts alive, mean over layers; compression: its inverse (the paper's 1/tau); flops_share:
    see flops_share(); kv_bytes: see kv_bytes(); prefill_speedup: median over prompts of dense seconds / method's seconds,
    filtering passes aside.
    """
    alive = [r["alive"] for r in found]
    mean_alive = sum(sum(counts) / len(counts) for counts in alive) / sum(lens)
    return {
        "mean_alive": mean_alive,
        "compression": 1 / mean_alive,
        "flops_share": flops_share(method, model.config, lens, alive, heads),
        "kv_bytes": kv_bytes(method, model, lens, alive, heads),
        "prefill_speedup": statistics.median(d["seconds"] / r["seconds"] for d, r in zip(dense, found)),
    }


def table(results, model, examples, heads, difference):
    """Rows from evaluate()'s results, one budget after the other, each with dense first.

    value: sum of the results' values over that of their counts; diff, low, high: see compare(), with dense;
    over_sdtp, over_sdtp_low, over_sdtp_high: likewise with sdtp or sdtp_adaptive, whichever comes first; and costs().
    at_floor: share of the examples of which the first stage leaves the protected tokens alone.
    """
    lens, rows = [len(e.prompt) for e in examples], []
    ours = next((method for _, method in results if method in WITH_HEADS), None)
    for (keep, method), found in results.items():
        dense = results[keep, "dense"]
        row = {"method": method, "keep": keep, "prompts": len(lens), "prompt_tokens": sum(lens)}
        row["value"] = sum(r["value"] for r in found) / sum(r["count"] for r in found)
        pruned = [layer for r, n in zip(found, lens) for layer, count in enumerate(r["alive"]) if count < n]
        first = min(pruned, default=0)
        row["at_floor"] = sum(r["alive"][first] == protected_count(n) < n for r, n in zip(found, lens)) / len(lens)
        row |= costs(method, model, lens, found, dense, heads)
        row |= zip(("diff", "low", "high"), compare(found, dense, difference))
        if sdtp := results.get((keep, ours)):
            row |= zip(("over_sdtp", "over_sdtp_low", "over_sdtp_high"), compare(found, sdtp, difference))
        rows.append(row)
    return rows


def compare(found, base, difference):
    """difference() of two methods' means of value over count, with the bounds of its 95 % percentile bootstrap interval.

    found, base: results of the same examples, which are drawn together.
    """

    def statistic(a, b, count, axis=-1):
        return difference((a.sum(axis) - b.sum(axis)) / count.sum(axis))

    columns = [[r["value"] for r in found], [r["value"] for r in base], [r["count"] for r in base]]
    samples = [np.array(column, dtype=float) for column in columns]
    value = low = high = float(statistic(*samples))
    if len(found) > 1 and columns[0] != columns[1]:
        drawn = bootstrap(samples, statistic, paired=True, n_resamples=2000, method="percentile", rng=0)
        low, high = map(float, drawn.confidence_interval)
    return value, low, high


def needs_heads(methods):
    return any(parse(method)[0] in (*WITH_HEADS, *LATE) for method in methods)


def print_table(rows):
    """The rows of perplexity() or needle(), aligned, budget by budget."""
    found, bounds = "accuracy" in rows[0], "[{:+.1%}, {:+.1%}]".format
    width = max(map(len, ["method", *(row["method"] for row in rows)]))
    value = f"{'accuracy':>9} {'diff':>9}" if found else f"{'loss':>7} {'ppl':>8} {'ppl diff':>9}"
    for keep, part in groupby(rows, lambda row: row["keep"]):
        if keep:
            print(f"at the FLOPs of the paper's stages with r = {keep:g}")
        print(
            f"{'method':<{width}} {value} {'95 % interval':>18} {'over sdtp':>10} {'95 % interval':>18}"
            f" {'mean alive':>11} {'1/tau':>6} {'FLOPs':>6} {'prefill':>8} {'KV MiB':>8}"
        )
        for r in part:
            over = f"{r['over_sdtp']:+.1%}" if "over_sdtp" in r else ""
            span = bounds(r["over_sdtp_low"], r["over_sdtp_high"]) if over else ""
            cells = f"{r['accuracy']:9.1%} {r['accuracy_diff']:+9.1%}" if found else ""
            cells = cells or f"{r['loss']:7.3f} {r['ppl']:8.2f} {r['ppl_diff']:+9.1%}"
            print(
                f"{r['method']:<{width}} {cells} {bounds(r['low'], r['high']):>18} {over:>10} {span:>18}"
                f" {r['mean_alive']:11.3f} {r['compression']:5.2f}x {r['flops_share']:6.3f} {r['prefill_speedup']:7.2f}x"
                f" {r['kv_bytes'] / 2**20:8.2f}" + " at the floor" * (r["at_floor"] == 1)
            )
    first = rows[0]
    scored = ", dense below 50 %" * first["dense_fails"] if found else f", {first['scored_tokens']} tokens scored"
    mean = first["prompt_tokens"] / first["prompts"]
    print(f"{first['prompts']} prompts of {mean:.0f} tokens on average{scored}", flush=True)


def draw(rows, path):
    """PPL difference with its interval against executed FLOPs, in per cent of dense's: a line for each method."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5))
    axis.set_prop_cycle(plt.cycler(linestyle=["-", "--"]) * plt.cycler(color=plt.get_cmap("tab10").colors))
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
        part = sorted((row for row in rows if row["method"] == method), key=lambda row: row["flops_share"])
        x, y, low, high = ([100 * row[name] for row in part] for name in ("flops_share", "ppl_diff", "low", "high"))
        (line,) = axis.plot(x, y, marker="o", label=method)
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.08, linewidth=0)
    axis.axhline(0, color="gray", linewidth=0.8)
    mean = rows[0]["prompt_tokens"] / rows[0]["prompts"]
    axis.set(title=f"{rows[0]['prompts']} prompts of {mean:.0f} tokens on average")
    axis.set(xlabel="executed prefill FLOPs, % of dense", ylabel="PPL difference, %")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.set_layout_engine("constrained")
    cli.save_figure(figure, path)


# ---------------------------------------------------------------------------- the command


def prompts(config, tokenizer):
    """{length, or 0 for perplexity: Examples} by the flags."""
    if config.tasks == "needle":
        text, lengths = data.read_text(config.text), cli.numbers("lengths", config.lengths, int, lambda n: n > 0)
        return {n: data.needle_examples(text, tokenizer, n, config.limit, held_out=True, overlap=True) for n in lengths}
    if config.text:
        windows = data.text_windows(data.read_text(config.text), tokenizer, config.prompt_len, config.score_len)
        count = min(config.limit, len(windows))
        return {0: [windows[i * len(windows) // count] for i in range(count)]}
    _, held_out = data.load(
        config.data, tokenizer, config.prompt_len, config.score_len, config.min_prompt, config.max_prompt
    )
    return {0: held_out[: config.limit]}


def check_flags(config, harness):
    """ValueError for a flag out of its range, or flags that do not go together; harness: the tasks are lm-eval's."""
    cli.one_of(config, teacher=saliency.TEACHERS, label_loss=saliency.LABEL_LOSSES)
    cli.at_least(0, config, "limit")
    cli.at_least(-1, config, "num_fewshot")
    cli.at_least(1, config, "prompt_len", "score_len", "batch_size")
    if config.figure and config.tasks != "ppl":
        raise ValueError(f"--figure draws perplexities: leave it out with --tasks {config.tasks}")
    if harness:
        return
    if config.data_dir or config.num_fewshot >= 0:
        more = f"leave them out with --tasks {config.tasks}"
        raise ValueError(f"--data_dir and --num_fewshot are for tasks of lm-eval: {more}")
    if config.tasks == "needle" and config.data or bool(config.text) == bool(config.data):
        raise ValueError("give --text FILE" + " or --data SOURCE" * (config.tasks == "ppl"))


def main():
    config = cli.parse(EvalConfig, __doc__)
    harness, methods = config.tasks not in ("ppl", "needle"), config.methods.split(",")
    check_flags(config, harness)
    keeps = cli.numbers("keep", config.keep, float, lambda keep: 0 < keep <= 1) if config.keep else [0.0]
    needed = needs_heads(methods)  # refuses an unknown method before anything is loaded
    if harness:
        import eval_harness  # needs lm-eval, as nothing else here does

        tasks = eval_harness.check(config, methods)
    model, folder = cli.load_model(config)
    tokenizer, rows = Tokenizer(folder), []
    heads, schedule = cli.heads_and_schedule(config, model, needed=needed)
    names = ("teacher", "label_loss", "seed", "batch_size", "rows")
    settings = {name: getattr(config, name) for name in names} | {"keeps": keeps}
    if harness:
        make_lm = partial(eval_harness.HarnessLM, model, tokenizer, methods, schedule, heads, **settings)
        return eval_harness.run(config, tasks, make_lm)
    config.limit = config.limit or 64
    sets = prompts(config, tokenizer)
    longest = max((len(e.prompt) + len(e.response) for examples in sets.values() for e in examples), default=1)
    model.positions([longest + MORE_TOKENS * (config.tasks == "needle")])  # refuses one that is too long now
    for length, examples in sets.items():
        run = partial(needle, tokenizer) if config.tasks == "needle" else perplexity
        new = run(model, examples, methods, schedule, heads, **settings)
        print_table(new)
        rows += [row | ({"length": length} if length else {}) for row in new]
        cli.write_rows(config.json, rows, source=config.text or config.data, seed=config.seed)  # so far
    if config.figure:
        draw(rows, config.figure)


if __name__ == "__main__":
    cli.run(main)
