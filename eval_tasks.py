"""What pruning costs: loss and perplexity of responses after a dense and after a pruned prompt.

python eval_tasks.py --tasks ppl --text FILE.txt      # windows of plain text
python eval_tasks.py --tasks ppl --data FILE.jsonl    # held-out rows in Dolly's fields
python eval_tasks.py --text FILE.txt --methods dense,sdtp --kv h2o    # the paper's table 6
"""

import math
import statistics
from dataclasses import dataclass

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
from kv import compression
from model import KVCache
from sdtp import Schedule, prefill, protected_count, select
from tokenizer import Tokenizer

SCORERS = {  # training-free, at the stages of the heads
    "most_recent": scorers.most_recent,
    "norm": scorers.norm,
    "last_attention": scorers.last_attention(),  # the last 8 tokens, mean over heads
    "last_attention_w1": scorers.last_attention(1),
    "last_attention_w32": scorers.last_attention(32),
    "last_attention_max": scorers.last_attention(8, "max"),
    "last_attention_best3": scorers.last_attention(8, 3),
    "accumulated_attention": scorers.accumulated_attention,
}
PEERS = ("lazyllm", "fastkv", "gemfilter", "self_information")  # whole policies, at stages of their own
METHODS = ("dense", "sdtp", "random", "most_recent", "last_attention", "teacher", "floor")  # the default
KNOWN = (*METHODS, *SCORERS, *PEERS)


@dataclass
class EvalConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT)
    tasks: str = "ppl"  # ppl
    text: str = ""  # text file: windows of prompt_len + score_len tokens, spread over the file
    data: str = ""  # or a source of train.py (its held-out part): pydoc, dolly, FILE.jsonl, FILE.txt
    methods: str = ",".join(METHODS)  # in one run; NAME@16 has spans of 16; floor: only protected tokens stay
    keep: float = 0.0  # compute of the paper's stages with that share each (0: the heads' own schedule, or 0.9)
    kv: str = ""  # run each method also with the KV cache compressed after the prefill: h2o or snapkv
    kv_keep: float = 0.0  # share of the prompt whose keys and values it keeps (0: 0.4, the paper's)
    teacher: str = "grad_norm"  # the labels that method teacher ranks by
    label_loss: str = "response"  # and their loss: over the response, or all next tokens
    limit: int = 64  # prompts at most
    prompt_len: int = 1024  # text: tokens of a prompt, which are pruned
    score_len: int = 128  # tokens scored after it (rows: at most, lest a few that repeat their prompt outweigh all)
    min_prompt: int = 200  # rows: shorter prompts are left out
    max_prompt: int = 800  # rows: longer prompts are left out
    batch_size: int = 1  # prompts of different lengths in one forward
    seed: int = 0  # of method random
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the table's rows


def score(model, examples, rankers=None, schedule=None, kv=None):
    """Prefill the prompts of a batch of Examples, then score their responses exactly.

    Returns (nats per response token, (S,) per example; tokens alive per layer, a list per example; seconds of
    the prefill; tokens per layer that a Compression kv has left in the cache, a list per example).
    """
    prompts, responses = ([torch.tensor(ids, device=model.device) for ids in part] for part in zip(*examples))
    prompt_lens, scored = [len(p) for p in prompts], [len(r) for r in responses]
    sizes = [n + s for n, s in zip(prompt_lens, scored)]
    positions = [p[n:] for p, n in zip(model.positions(sizes).split(sizes), prompt_lens)]
    cache = KVCache(len(model.layers), extra=max(scored))
    start = clock(model)
    first, cache = prefill(model, torch.cat(prompts), rankers, schedule, prompt_lens, cache, kv)
    seconds = clock(model) - start
    alive, held = ([list(counts) for counts in zip(*found)] for found in (cache.alive, cache.seqlens()))
    with torch.no_grad():  # the row after each last token is not used, and spares a case for answers of one token
        rest = model(torch.cat(responses), torch.cat(positions), scored, cache).split(scored)
    logits = (torch.cat((one[None], more[:-1])).float() for one, more in zip(first, rest))
    return [F.cross_entropy(x, r, reduction="none") for x, r in zip(logits, responses)], alive, seconds, held


def policy(method, model, schedule, heads, generator):
    """({layer: scorer}, Schedule) of a method NAME or NAME@SPAN, by default with the span of the schedule."""
    name, _, span = method.partition("@")
    layers, mean = len(model.layers), schedule.mean_share()
    if name == "lazyllm":  # the last token's attention, dropping more and more
        schedule, scorer = Schedule(layers).with_mean_share(mean), scorers.last_attention(1)
    elif name == "fastkv":  # one cut in the middle by the last 8 tokens' attention, maximum over 7 neighbours
        schedule, scorer = Schedule(layers, {layers // 2: 0.5}).with_mean_share(mean), scorers.last_attention(8, pool=7)
    elif name == "self_information":
        schedule, scorer = Schedule(layers, {0: mean}), None
    elif name == "floor":
        schedule, scorer = Schedule(layers, {min(schedule): 0.0}), scorers.most_recent
    else:
        scorer = scorers.random(generator) if name == "random" else SCORERS.get(name)
    if name in PEERS or span:
        schedule = Schedule(layers, schedule, span=int(span or 1))
    return heads if name == "sdtp" else dict.fromkeys(schedule, scorer), schedule


def perplexity(
    model, examples, methods, schedule, heads=None, teacher="grad_norm", label_loss="response", seed=0, batch_size=1, kv=None
):  # fmt: skip
    """One flat row per method: every batch of batch_size examples is run by every method in turn, dense first.

    With a Compression kv each method has a second row, METHOD+h2o or METHOD+snapkv.

    loss in nats per response token, pooled over all tokens; ppl = exp(loss); ppl_diff = ppl / dense ppl - 1;
    mean_alive: share of the prompt alive, mean over layers; compression: its inverse (the paper's 1/tau);
    prefill_speedup: median over batches of dense seconds / method's seconds; at_floor: share of the examples
    of which only the protected tokens are left at the last layer. low, high: 95 % bootstrap interval of ppl_diff
    over the examples, paired; over_sdtp, over_sdtp_low, over_sdtp_high: ppl / sdtp's ppl - 1 likewise.
    flops_share: block FLOPs of the prefill over dense's, a filtering pass and kv's scores included. held: share of the
    prompt in the KV cache, mean over layers.
    ValueError for an unknown method or no example.
    """
    check_methods(methods)
    if not examples:
        raise ValueError("no prompt to evaluate on")
    if needs_heads(methods) and not heads:
        raise ValueError("method sdtp needs heads: give --heads FOLDER, or train some with train.py")
    if kv and any(method.startswith("gemfilter") for method in methods):
        raise ValueError(
            "gemfilter has no rows with --kv: its prompt is a shorter one, and so would kv_keep's share be"
        )
    methods = list(dict.fromkeys(["dense", *methods]))
    generator = torch.Generator().manual_seed(seed)
    policies = {m: policy(m, model, schedule, heads, generator) for m in methods}
    policies["dense"] = (None, None)
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    compressions = {"": None} | ({f"+{kv.method}": kv} if kv else {})
    results = {m + suffix: [] for m in methods for suffix in compressions}
    for batch in tqdm([batches[0], *batches], desc="perplexity", disable=None):  # the first run is a warm-up
        shared = {}  # what several methods rank by: computed once a batch
        for method in methods:
            rankers, stages = policies[method]
            name, pruned = method.partition("@")[0], batch
            if name in ("teacher", "self_information"):
                if name not in shared:
                    shared[name] = given_labels(name, model, batch, schedule, teacher, label_loss)
                rankers = {layer: scorers.from_labels(shared[name][layer]) for layer in stages}
            if name == "gemfilter":
                pruned = [gemfilter(model, e, schedule.mean_share(), stages.span) for e in batch]
                rankers = stages = None
            for suffix, compressed in compressions.items():
                results[method + suffix].append(score(model, pruned, rankers, stages, compressed))
    table = {method: summary(method, model.config, results[method][1:], examples, kv) for method in results}
    nats = {method: [n.sum().item() for r in results[method][1:] for n in r[0]] for method in results}
    dense_flops = table["dense"]["flops_share"]
    for method, row in table.items():
        row |= compare(row, nats[method], table["dense"], nats["dense"], ("ppl_diff", "low", "high"), examples)
        row["loss_diff"] = row["loss"] - table["dense"]["loss"]
        row["prefill_speedup"] = statistics.median(
            d[2] / r[2] for d, r in zip(results["dense"][1:], results[method][1:])
        )
        row["flops_share"] /= dense_flops
        if "sdtp" in methods:
            fields = ("over_sdtp", "over_sdtp_low", "over_sdtp_high")
            row |= compare(row, nats[method], table["sdtp"], nats["sdtp"], fields, examples)
    return list(table.values())


def given_labels(name, model, batch, schedule, teacher, label_loss):
    """{layer: (N,) scores by position for each example}: the teacher's at the schedule's layers, or self-information at 0."""
    parts = [e.prompt + e.response if name == "teacher" else e.prompt for e in batch]
    ids, seqlens = torch.tensor([t for part in parts for t in part], device=model.device), [len(p) for p in parts]
    if name == "self_information":
        return {0: scorers.self_information(model, ids, seqlens).split(seqlens)}
    starts = [len(e.prompt) for e in batch] if label_loss == "response" else None
    labels = saliency.label(model, ids, list(schedule), teacher, seqlens, starts)
    return {layer: s.split(seqlens) for layer, s in labels.items()}


GEMFILTER_LAYER = 0.4  # share of the layers below the filter (the paper: 13 of 32)


def gemfilter(model, example, mean_share, span=1):
    """GemFilter (Shi et al. 2024): the Example whose prompt is what a first pass through some layers has chosen, at new positions.

    mean_share: compute of both passes together, in dense prefills; what the first leaves of it is kept of the prompt.
    ValueError where it leaves nothing.
    """
    layers, n = len(model.layers), len(example.prompt)
    depth = max(1, round(GEMFILTER_LAYER * layers))
    share = mean_share - depth / layers
    if share <= 0:
        raise ValueError(
            f"gemfilter: its first pass of {depth} of {layers} layers costs more than {mean_share:.2f} prefills"
        )
    ids = torch.tensor(example.prompt, device=model.device)
    x, positions = model.embed(ids), model.positions([n])
    with torch.no_grad():
        for block in model.layers[:depth]:
            x = block(x, positions, [n])
        scores = scorers.last_query()(x, positions, [n], model.layers[depth])
    keep, _ = select(scores, positions, share, [n], [n], span)
    return Example(ids[keep].tolist(), example.response)


def summary(method, config, results, examples, kv=None):
    """The table row of one method but for what compares it with others; results: score() of each batch."""
    name, _, compressed = method.partition("+")
    nats = torch.cat([n for r in results for n in r[0]])
    counts = [layers for r in results for layers in r[1]]  # per example
    prompt_tokens = sum(len(e.prompt) for e in examples)
    alive, held = (sum(sum(c) / len(c) for r in results for c in r[i]) / prompt_tokens for i in (1, 3))
    flops = sum(block_flops(config, n) for layers in counts for n in layers)
    layers = config.num_hidden_layers  # of a filtering pass
    first = {"gemfilter": max(1, round(GEMFILTER_LAYER * layers)), "self_information": layers}
    flops += first.get(name.partition("@")[0], 0) * sum(block_flops(config, len(e.prompt)) for e in examples)
    if compressed:
        flops += sum(kv.flops(config, c, len(e.prompt)) for c, e in zip(counts, examples))
    loss = nats.mean().item()
    return {
        "method": method,
        "prompts": len(examples),
        "prompt_tokens": prompt_tokens,
        "scored_tokens": len(nats),
        "loss": loss,
        "ppl": math.exp(loss),
        "mean_alive": alive,
        "compression": 1 / alive,
        "held": held,
        "flops_share": flops,
        "at_floor": sum(c[-1] == protected_count(len(e.prompt)) for c, e in zip(counts, examples)) / len(examples),
    }


def block_flops(config, n):
    """FLOPs of one block on n rows, causal attention (a window aside)."""
    return config.linear_flops(n) + 2 * config.head_dim * config.num_attention_heads * n * (n + 1)


def compare(row, nats, base, base_nats, fields, examples):
    """{field: ppl / base's ppl - 1, low, high}: the 95 % percentile bootstrap interval over examples, paired."""

    def difference(a, b, tokens, axis):
        return np.expm1((a.sum(axis) - b.sum(axis)) / tokens.sum(axis))

    low = high = value = math.expm1(row["loss"] - base["loss"])
    if len(examples) > 1 and nats != base_nats:
        samples = [np.array(v, dtype=float) for v in (nats, base_nats, [len(e.response) for e in examples])]
        found = bootstrap(samples, difference, paired=True, n_resamples=2000, method="percentile", rng=0)
        low, high = found.confidence_interval
    return dict(zip(fields, (value, float(low), float(high))))


def check_methods(methods):
    """ValueError for a method that is not one of KNOWN, or has a span that is none."""
    for method in methods:
        name, at, span = method.partition("@")
        if name not in KNOWN or (at and (name == "dense" or not span.isdecimal() or int(span) < 1)):
            raise ValueError(f"unknown method {method!r} (known: {', '.join(KNOWN)}; NAME@16 for spans of 16 tokens)")


def needs_heads(methods):
    return any(method.partition("@")[0] == "sdtp" for method in methods)


def print_table(rows):
    """The rows of perplexity(), aligned."""
    compressed = any("+" in r["method"] for r in rows)
    print(
        f"{'method':<24} {'loss':>7} {'ppl':>8} {'ppl diff':>9} {'95 % interval':>18} {'over sdtp':>10} {'95 % interval':>18}"
        f" {'mean alive':>11} {'1/tau':>6} {'FLOPs':>6} {'prefill':>8}" + f" {'KV':>6}" * compressed
    )
    for r in rows:
        over = "" if "over_sdtp" not in r else f"{r['over_sdtp']:+.1%}"
        span = "" if "over_sdtp" not in r else f"[{r['over_sdtp_low']:+.1%}, {r['over_sdtp_high']:+.1%}]"
        print(
            f"{r['method']:<24} {r['loss']:7.3f} {r['ppl']:8.2f} {r['ppl_diff']:+9.1%} "
            f"{'[{:+.1%}, {:+.1%}]'.format(r['low'], r['high']):>18} {over:>10} {span:>18} {r['mean_alive']:11.3f} "
            f"{r['compression']:5.2f}x {r['flops_share']:6.3f} {r['prefill_speedup']:7.2f}x"
            + f" {r['held']:6.3f}" * compressed
            + " at the floor" * (r["at_floor"] == 1)
        )
    first = rows[0]
    print(
        f"{first['prompts']} prompts of {first['prompt_tokens'] / first['prompts']:.0f} tokens on average, {first['scored_tokens']} tokens scored",
        flush=True,
    )


def main():
    config = cli.parse(EvalConfig, __doc__)
    if config.tasks != "ppl":
        raise ValueError(f"--tasks {config.tasks}: choose ppl")
    if bool(config.text) == bool(config.data):
        raise ValueError("give --text FILE or --data SOURCE")
    cli.at_least(1, config, "limit", "prompt_len", "score_len", "batch_size")
    methods = config.methods.split(",")
    check_methods(methods)
    kv = compression(config)
    model, folder = cli.load_model(config)
    tokenizer = Tokenizer(folder)
    heads, schedule = cli.heads_and_schedule(config, model, config.keep, needed=needs_heads(methods))
    if config.text:
        windows = data.text_windows(data.read_text(config.text), tokenizer, config.prompt_len, config.score_len)
        count = min(config.limit, len(windows))
        examples = [windows[i * len(windows) // count] for i in range(count)]
    else:
        _, held_out = data.load(
            config.data, tokenizer, config.prompt_len, config.score_len, config.min_prompt, config.max_prompt
        )
        examples = held_out[: config.limit]
    rows = perplexity(
        model, examples, methods, schedule, heads, config.teacher, config.label_loss, config.seed, config.batch_size, kv
    )
    print_table(rows)
    cli.write_rows(config.json, rows, source=config.text or config.data, seed=config.seed)


if __name__ == "__main__":
    cli.run(main)
