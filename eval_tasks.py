"""What pruning costs: loss and perplexity of responses after a dense and after a pruned prompt.

python eval_tasks.py --tasks ppl --text FILE.txt      # windows of plain text
python eval_tasks.py --tasks ppl --data FILE.jsonl    # held-out rows in Dolly's fields
"""

import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cli
import data
import saliency
import scorers
from download import DEFAULT
from model import KVCache
from sdtp import Schedule, prefill, protected_count
from tokenizer import Tokenizer

METHODS = ("dense", "sdtp", "random", "most_recent", "last_attention", "teacher", "floor")


@dataclass
class EvalConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT)
    tasks: str = "ppl"  # ppl
    text: str = ""  # text file: windows of prompt_len + score_len tokens, spread over the file
    data: str = ""  # or a source of train.py (its held-out part): pydoc, dolly, FILE.jsonl, FILE.txt
    methods: str = ",".join(METHODS)  # in one run; floor: only the protected tokens stay
    keep: float = 0.0  # share kept at each stage (0: the heads' own schedule, or 0.9)
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


def score(model, examples, rankers=None, schedule=None):
    """Prefill the prompts of a batch of Examples, then score their responses exactly.

    Returns (nats per response token, (S,) per example; tokens alive per layer, a list per example; seconds of
    the prefill).
    """
    prompts, responses = ([torch.tensor(ids, device=model.device) for ids in part] for part in zip(*examples))
    prompt_lens, scored = [len(p) for p in prompts], [len(r) for r in responses]
    sizes = [n + s for n, s in zip(prompt_lens, scored)]
    positions = [p[n:] for p, n in zip(model.positions(sizes).split(sizes), prompt_lens)]
    cache = KVCache(len(model.layers), extra=max(scored))
    start = clock(model)
    first, cache = prefill(model, torch.cat(prompts), rankers, schedule, prompt_lens, cache)
    seconds = clock(model) - start
    alive = [list(counts) for counts in zip(*cache.seqlens())]
    with torch.no_grad():  # the row after each last token is not used, and spares a case for answers of one token
        rest = model(torch.cat(responses), torch.cat(positions), scored, cache).split(scored)
    logits = (torch.cat((one[None], more[:-1])).float() for one, more in zip(first, rest))
    return [F.cross_entropy(x, r, reduction="none") for x, r in zip(logits, responses)], alive, seconds


def clock(model):
    """Seconds, after all queued work is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def perplexity(
    model, examples, methods, schedule, heads=None, teacher="grad_norm", label_loss="response", seed=0, batch_size=1
):
    """One flat row per method: every batch of batch_size examples is run by every method in turn, dense first.

    loss in nats per response token, pooled over all tokens; ppl = exp(loss); ppl_diff = ppl / dense ppl - 1;
    mean_alive: share of the prompt alive, mean over layers; compression: its inverse (the paper's 1/tau);
    prefill_speedup: median over batches of dense seconds / method's seconds; at_floor: share of the examples
    of which only the protected tokens are left at the last layer.
    ValueError for an unknown method or no example.
    """
    check_methods(methods)
    if not examples:
        raise ValueError("no prompt to evaluate on")
    if "sdtp" in methods and not heads:
        raise ValueError("method sdtp needs heads: give --heads FOLDER, or train some with train.py")
    generator = torch.Generator().manual_seed(seed)
    rankers = {
        "sdtp": heads,
        "random": dict.fromkeys(schedule, scorers.random(generator)),
        "most_recent": dict.fromkeys(schedule, scorers.most_recent),
        "last_attention": dict.fromkeys(schedule, scorers.last_attention()),
        "floor": dict.fromkeys(schedule, scorers.most_recent),
    }
    floor = Schedule(len(model.layers), {min(schedule): 0.0})
    methods = list(dict.fromkeys(["dense", *methods]))
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    results = {m: [] for m in methods}
    for batch in tqdm([batches[0], *batches], desc="perplexity", disable=None):  # the first run is a warm-up
        if "teacher" in methods:
            ids = torch.tensor([t for e in batch for t in e.prompt + e.response], device=model.device)
            seqlens, starts = [len(e.prompt) + len(e.response) for e in batch], [len(e.prompt) for e in batch]
            starts = starts if label_loss == "response" else None
            labels = saliency.label(model, ids, list(schedule), teacher, seqlens, starts)
            rankers["teacher"] = {layer: scorers.from_labels(s.split(seqlens)) for layer, s in labels.items()}
        for method in methods:
            stages = {"dense": None, "floor": floor}.get(method, schedule)
            results[method].append(score(model, batch, rankers.get(method), stages))
    return [summary(method, results[method][1:], results["dense"][1:], examples) for method in methods]


def summary(method, results, dense, examples):
    """The table row of one method; results and dense: score() of each batch."""
    loss, dense_loss = (torch.cat([nats for r in rs for nats in r[0]]).mean().item() for rs in (results, dense))
    counts = [layers for r in results for layers in r[1]]  # per example
    alive = sum(sum(c) / len(c) for c in counts) / sum(len(e.prompt) for e in examples)
    return {
        "method": method,
        "prompts": len(examples),
        "prompt_tokens": sum(len(e.prompt) for e in examples),
        "scored_tokens": sum(len(e.response) for e in examples),
        "loss": loss,
        "loss_diff": loss - dense_loss,
        "ppl": math.exp(loss),
        "ppl_diff": math.expm1(loss - dense_loss),
        "mean_alive": alive,
        "compression": 1 / alive,
        "at_floor": sum(c[-1] == protected_count(len(e.prompt)) for c, e in zip(counts, examples)) / len(examples),
        "prefill_speedup": statistics.median(d[2] / r[2] for d, r in zip(dense, results)),
    }


def check_methods(methods):
    """ValueError for a method that is not one of METHODS."""
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r} (known: {', '.join(METHODS)})")


def print_table(rows):
    """The rows of perplexity(), aligned."""
    print(
        f"{'method':<15} {'loss':>7} {'diff':>7} {'ppl':>8} {'ppl diff':>9} {'mean alive':>11} {'1/tau':>6} {'prefill':>8}"
    )
    for r in rows:
        print(
            f"{r['method']:<15} {r['loss']:7.3f} {r['loss_diff']:+7.3f} {r['ppl']:8.2f} {r['ppl_diff']:+9.1%}"
            f" {r['mean_alive']:11.3f} {r['compression']:5.2f}x {r['prefill_speedup']:7.2f}x"
            + " at the floor"
            * (r["at_floor"] == 1)
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
    model, folder = cli.load_model(config)
    tokenizer = Tokenizer(folder)
    heads, schedule = cli.heads_and_schedule(config, model, config.keep, needed="sdtp" in methods)
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
        model, examples, methods, schedule, heads, config.teacher, config.label_loss, config.seed, config.batch_size
    )
    print_table(rows)
    cli.write_rows(config.json, rows, source=config.text or config.data, seed=config.seed)


if __name__ == "__main__":
    cli.run(main)
