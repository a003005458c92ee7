"""What pruning costs: loss and perplexity of responses after a dense and after a pruned prompt.

    python eval_tasks.py --tasks ppl --text FILE.txt      # windows of plain text
    python eval_tasks.py --tasks ppl --data FILE.jsonl    # held-out rows in Dolly's fields
"""

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
from model import KVCache
from sdtp import Schedule, prefill
from tokenizer import Tokenizer

METHODS = ("dense", "sdtp", "random", "most_recent", "last_attention", "teacher", "floor")


@dataclass
class EvalConfig:
    ckpt: str = "smollm2-135m-q4"  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT)
    tasks: str = "ppl"  # ppl
    text: str = ""  # text file: windows of prompt_len + score_len tokens, spread over the file
    data: str = ""  # or a source of train.py (its held-out part): pydoc, dolly, FILE.jsonl, FILE.txt
    methods: str = "dense,sdtp,random,most_recent,last_attention"  # also: teacher, floor (only protected tokens stay)
    keep: float = 0.0  # share kept at each stage (0: the heads' own schedule, or 0.9)
    teacher: str = "grad_norm"  # the labels that method teacher ranks by
    limit: int = 64  # prompts at most
    prompt_len: int = 1024  # text: tokens of a prompt, which are pruned
    score_len: int = 128  # tokens scored after it (rows: at most)
    min_prompt: int = 200  # rows: shorter prompts are left out
    max_prompt: int = 800  # rows: longer prompts are left out
    seed: int = 0  # of method random
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the table's rows


def score(model, example, rankers=None, schedule=None):
    """Prefill the prompt, then score the response exactly.

    Returns (nats per response token (S,), tokens alive per layer, seconds of the prefill).
    """
    prompt, response = (torch.tensor(ids, device=model.norm.weight.device) for ids in example)
    positions = model.positions([len(prompt) + len(response)])[len(prompt) :]
    cache = KVCache(len(model.layers), extra=len(response))
    start = clock(model)
    logits, cache = prefill(model, prompt, rankers, schedule, cache=cache)
    seconds = clock(model) - start
    alive = [lengths[0] for lengths in cache.seqlens()]
    if len(response) > 1:
        with torch.no_grad():
            logits = torch.cat((logits, model(response[:-1], positions[:-1], None, cache)))
    return F.cross_entropy(logits.float(), response, reduction="none"), alive, seconds


def clock(model):
    """Seconds, after all queued work is done."""
    if model.norm.weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def perplexity(model, examples, methods, schedule, heads=None, teacher="grad_norm", seed=0):
    """One flat row per method: every example is run by every method in turn, dense first.

    loss in nats per response token, pooled over all tokens; ppl = exp(loss); ppl_diff = ppl / dense ppl - 1;
    mean_alive: share of the prompt alive, mean over layers; compression: its inverse (the paper's 1/tau);
    prefill_speedup: median over examples of dense seconds / method's seconds.
    ValueError for an unknown method or no example.
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not examples:
        raise ValueError(f"unknown method {unknown[0]!r} (known: {', '.join(METHODS)})" if unknown else "no prompt to evaluate on")
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
    methods = ["dense"] + [m for m in methods if m != "dense"]
    results = {m: [] for m in methods}
    for example in tqdm([examples[0], *examples], desc="perplexity", disable=None):  # the first run is a warm-up
        if "teacher" in methods:
            ids = torch.tensor(example.prompt + example.response, device=model.norm.weight.device)
            labels = saliency.label(model, ids, list(schedule), teacher, prompt_lens=[len(example.prompt)])
            rankers["teacher"] = {layer: scorers.from_labels(s) for layer, s in labels.items()}
        for method in methods:
            stages = {"dense": None, "floor": floor}.get(method, schedule)
            results[method].append(score(model, example, rankers.get(method), stages))
    return [summary(method, results[method][1:], results["dense"][1:], examples) for method in methods]


def summary(method, results, dense, examples):
    """The table row of one method; results and dense: score() of each example."""
    loss, dense_loss = (torch.cat([r[0] for r in rs]).mean().item() for rs in (results, dense))
    alive = sum(sum(r[1]) / len(r[1]) for r in results) / sum(len(e.prompt) for e in examples)
    return {
        "method": method,
        "prompts": len(examples),
        "prompt_tokens": sum(len(e.prompt) for e in examples),
        "scored_tokens": sum(len(e.response) for e in examples),
        "loss": loss,
        "loss_diff": loss - dense_loss,
        "ppl": torch.tensor(loss).exp().item(),
        "ppl_diff": torch.tensor(loss - dense_loss).expm1().item(),
        "mean_alive": alive,
        "compression": 1 / alive,
        "prefill_speedup": statistics.median(d[2] / r[2] for d, r in zip(dense, results)),
    }


def print_table(rows):
    print(f"{'method':<15} {'loss':>7} {'diff':>7} {'ppl':>8} {'ppl diff':>9} {'mean alive':>11} {'1/tau':>6} {'prefill':>8}")
    for r in rows:
        print(
            f"{r['method']:<15} {r['loss']:7.3f} {r['loss_diff']:+7.3f} {r['ppl']:8.2f} {r['ppl_diff']:+9.1%}"
            f" {r['mean_alive']:11.3f} {r['compression']:5.2f}x {r['prefill_speedup']:7.2f}x"
        )
    first = rows[0]
    print(f"{first['prompts']} prompts of {first['prompt_tokens'] / first['prompts']:.0f} tokens on average, {first['scored_tokens']} tokens scored", flush=True)


def main():
    config = cli.parse(EvalConfig, __doc__)
    if config.tasks != "ppl":
        raise ValueError(f"--tasks {config.tasks}: choose ppl")
    if bool(config.text) == bool(config.data):
        raise ValueError("give --text FILE or --data SOURCE")
    model, folder = cli.load_model(config)
    tokenizer, methods = Tokenizer(folder), config.methods.split(",")
    heads, schedule = cli.heads_and_schedule(config, model, config.keep, needed="sdtp" in methods)
    if config.text:
        windows = data.text_windows(data.read_text(config.text), tokenizer, config.prompt_len, config.score_len)
        count = min(config.limit, len(windows))
        examples = [windows[i * len(windows) // count] for i in range(count)]
    else:
        _, held_out = data.load(config.data, tokenizer, config.prompt_len, config.score_len, config.min_prompt, config.max_prompt)
        examples = held_out[: config.limit]
    rows = perplexity(model, examples, methods, schedule, heads, config.teacher, config.seed)
    print_table(rows)
    cli.write_rows(config.json, rows, source=config.text or config.data, seed=config.seed)


if __name__ == "__main__":
    cli.run(main)
