"""Speed of the prefill, dense against pruned, interleaved in one run, beside what the FLOPs promise.

python bench.py --lengths 1024,2048,4096
python bench.py --transformers          # transformers' dense prefill in the same run
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch

import cli
from data import read_text
from download import DEFAULT
from eval_tasks import clock
from sdtp import PruneHead, prefill
from tokenizer import Tokenizer


@dataclass
class BenchConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: untrained heads, as fast as trained ones)
    keep: float = 0.0  # share kept at each stage (0: the heads' own schedule, or 0.9)
    text: str = ""  # text file to read (default: random tokens)
    lengths: str = "1024,2048,4096"  # prompt lengths in tokens
    repeats: int = 5  # runs of each variant after a warm-up, in turn
    transformers: bool = False  # also time transformers' dense prefill (needs it installed)
    seed: int = 0  # of the random tokens
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the rows


def linear_flops(config, rows):
    """FLOPs of one block's matrix products without attention, for that many rows."""
    d, width, kv_width = (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    return 2 * rows * (2 * d * width + 2 * d * kv_width + 3 * d * config.intermediate_size)


def pairs(positions, window=None):
    """(query, key) pairs that causal attention over these ascending positions computes."""
    n = len(positions)
    if window is None:
        return n * (n + 1) // 2
    first = torch.searchsorted(positions, positions - window + 1)
    return int((torch.arange(n, device=positions.device) - first + 1).sum())


def executed_flops(config, cache, schedule=None):
    """(linear, attention, heads) FLOPs that a prefill ran, from the positions its cache holds (one prompt).

    GQA widths, causal (or windowed) pairs at 4 D Hq each, LM head on the last row, pruning heads on the
    rows that they scored.
    """
    alive = [layer.rows()[2] for layer in cache.layers]
    linear = sum(linear_flops(config, len(p)) for p in alive) + 2 * config.vocab_size * config.hidden_size
    attention = sum(
        4 * config.head_dim * config.num_attention_heads * pairs(p, config.window(layer))
        for layer, p in enumerate(alive)
    )
    per_row = 2 * config.hidden_size * (config.hidden_size // 4) + 4 * (config.hidden_size // 4)
    heads = sum(per_row * (len(alive[layer - 1]) if layer else int(alive[0][-1]) + 1) for layer in schedule or ())
    return linear, attention, heads


def paper_flops(config, lengths):
    """The paper's count (table 2), lengths: tokens alive per layer: no GQA, full squares, LM head on every row."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    return sum(2 * (4 * d * d + 3 * d * f) * n + 3 * d * n * n for n in lengths) + 4 * v * d * lengths[0]


def timed(model, run, repeats):
    """Interleaved timing, {name: seconds of each repeat} of {name: callable}, after one warm-up each."""
    seconds = {name: [] for name in run}
    for repeat in range(repeats + 1):
        for name, call in run.items():
            start = clock(model)
            call()
            if repeat:
                seconds[name].append(clock(model) - start)
    return seconds


def transformers_prefill(model, folder):
    """A call ids -> transformers' prefill of the same checkpoint: SDPA, last row's logits, inference mode."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--transformers: it is not installed; pip install -r requirements-dev.txt") from None
    dtype = model.norm.weight.dtype
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(
        model.device
    )
    return torch.inference_mode()(lambda ids: reference(ids[None], logits_to_keep=1))


def measure(model, ids, heads, schedule, reference, repeats):
    """Rows of one prompt length: dense, sdtp and, with a reference, transformers."""
    n, run, caches, flops = (
        len(ids),
        {"dense": partial(prefill, model, ids), "sdtp": partial(prefill, model, ids, heads, schedule)},
        {},
        {},
    )
    for name, stages in (("dense", None), ("sdtp", schedule)):
        caches[name] = run[name]()[1]
        flops[name] = sum(executed_flops(model.config, caches[name], stages))
    if reference:
        run["transformers"], caches["transformers"], flops["transformers"] = (
            partial(reference, ids),
            caches["dense"],
            flops["dense"],
        )
    seconds, rows = timed(model, run, repeats), []
    for name, values in seconds.items():
        alive = [lengths[0] for lengths in caches[name].seqlens()]
        # per repeat, as the machine's speed drifts from one to the next
        speedup, ratio = (
            statistics.median(d / s for d, s in zip(seconds["dense"], values)),
            flops["dense"] / flops[name],
        )
        rows.append({
            "length": n,
            "method": name,
            "prefill_s": statistics.median(values),
            "spread": (max(values) - min(values)) / statistics.median(values),
            "speedup": speedup,
            "prefill_flops": flops[name],
            "paper_flops": paper_flops(model.config, alive),
            "flops_ratio": ratio,
            "reached": speedup / ratio,
            "mean_alive": sum(alive) / len(alive) / n,
            "kv_bytes": caches[name].nbytes(),
        })  # fmt: skip
    return rows


def main():
    config = cli.parse(BenchConfig, __doc__)
    lengths = config.lengths.split(",")
    if not all(n.isdecimal() and int(n) for n in lengths):
        raise ValueError(f"--lengths {config.lengths}: whole numbers with commas between them are needed")
    lengths = [int(n) for n in lengths]
    cli.at_least(1, config, "repeats")
    model, folder = cli.load_model(config)
    heads, schedule = cli.heads_and_schedule(config, model, config.keep, needed=False)
    torch.manual_seed(config.seed)
    if not heads:
        heads = {layer: PruneHead(model.config.hidden_size).to(config.device) for layer in schedule}
    text = (
        torch.tensor(Tokenizer(folder).encode(read_text(config.text)))
        if config.text
        else torch.randint(model.config.vocab_size, (max(lengths),))
    )
    if len(text) < max(lengths):
        raise ValueError(f"{config.text} has only {len(text)} tokens")
    reference, rows = transformers_prefill(model, folder) if config.transformers else None, []
    print(
        f"{'tokens':>7} {'method':<13} {'prefill ms':>11} {'spread':>7} {'speedup':>8} {'GFLOPs':>8} {'ratio':>6} {'reached':>8} {'mean alive':>11} {'KV MiB':>7}"
    )
    for n in lengths:
        rows += (new := measure(model, text[:n].to(config.device), heads, schedule, reference, config.repeats))
        for r in new:
            print(
                f"{n:7d} {r['method']:<13} {r['prefill_s'] * 1000:11.1f} {r['spread']:7.1%} {r['speedup']:7.2f}x {r['prefill_flops'] / 1e9:8.1f}"
                f" {r['flops_ratio']:5.2f}x {r['reached']:8.2f} {r['mean_alive']:11.3f} {r['kv_bytes'] / 2**20:7.2f}",
                flush=True,
            )
    cli.write_rows(config.json, rows, seed=config.seed)


if __name__ == "__main__":
    cli.run(main)
