"""Speed, memory and FLOPs of a prefill, and of decoding after it: all methods in turn in one run.
Medians, also of each round's speedup; memory_diff: of weights and peak; keep 0: dense, as trained.

python bench.py --lengths 1024,2048,4096 --keep 0.9,0.8
python bench.py --methods sdtp,sdtp+h2o,fastkv,transformers
python bench.py --shape llama2-7b --layers 8 --lengths 16384  # random weights, untrained heads
python bench.py --batches 1,4,16                              # tokens per second of more prompts
python bench.py --marking --shape 1b                          # what labels cost
python bench.py --paper_table                                 # the paper's table 2, and ours
"""

import itertools
import json
import os
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import cli
import kv
import parallel
import saliency
import scorers
from cli import clock
from download import DEFAULT
from eval_tasks import parse, plans
from flops import alive_per_layer, executed_flops, paper_flops
from memory import empty_model, shape_fields, weight_bytes
from model import Config, KVCache, auto_dtype
from sdtp import PruneHead, generate, paper_schedule, prefill, write_atomic


@dataclass
class BenchConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    shape: str = ""  # or random weights of a shape: 10m, 135m, 360m, 1b, llama2-7b, mistral-7b, ...
    layers: int = 0  # --shape: with so many layers (0: all it has)
    heads: str = ""  # folder of trained heads, several with commas (default: heads/CKPT)
    methods: str = "dense,sdtp"  # as eval_tasks.py's, but teacher; transformers: its dense model
    keep: str = ""  # budgets, with commas: compute of the paper's stages at that ratio
    lengths: str = "1024,2048,4096"  # tokens of a prompt; they are random
    new_tokens: int = 128  # generated after each prompt, the first of them by the prefill
    repeats: int = 5  # runs of each method, after a warm-up
    batches: str = "1"  # prompts at once, all of one length, with commas
    marking: bool = False  # only what labels cost, as a multiple of one dense prefill
    paper_table: bool = False  # only the FLOPs of the paper's table 2
    seed: int = 0  # of the random tokens, weights and heads
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the rows


DENSE = "dense", 0.0  # the method and budget that others are compared with
RESPONSE = 64  # --marking: so many of the last tokens are the response

# ---------------------------------------------------------------------------- models


def random_tensor(name, p, dtype, device="cpu"):
    """A weight of a model on the meta device: normal * 0.02, of a norm 1."""
    if p.dtype == torch.uint8:  # MXFP4: scales of about 2^-7
        return torch.empty(p.shape, dtype=p.dtype, device=device).random_(118, 123)
    tensor = torch.ones(p.shape, dtype=dtype, device=device)
    return tensor if "norm" in name else tensor.normal_(0, 0.02)


def random_model(fields, dtype="auto", device="cpu"):
    """A Transformer of a config.json's fields with random weights, made in dtype."""
    dtype, model = auto_dtype(device) if dtype == "auto" else dtype, empty_model(fields)
    pairs = model.state_dict().items()
    state = {name: random_tensor(name, p, dtype, device) for name, p in pairs}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def write_random(folder, shape, shards=1, positions=4096):
    """A checkpoint folder of a shape in bfloat16, written shard by shard (runs/real_size.sh)."""
    fields, weight_map = shape_fields(shape, 0, positions), {}
    model = empty_model(fields)
    state = model.state_dict()
    names = list(state)
    size = -(-len(names) // shards)
    for i in range(shards):
        part = {}
        for name in names[i * size : (i + 1) * size]:
            key = name if name.startswith("lm_head") else model.prefix + name
            part[key] = random_tensor(name, state[name], torch.bfloat16)
            weight_map[key] = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        safetensors.torch.save_file(part, Path(folder) / weight_map[key], {"format": "pt"})
    for name, content in (
        ("config", fields),
        ("model.safetensors.index", {"weight_map": weight_map}),
    ):
        write_atomic(Path(folder) / f"{name}.json", json.dumps(content).encode())


def load(config, positions):
    """(model, its folder or None): of --ckpt or --shape, with room for so many positions."""
    if config.shape:
        dtype = cli.device_and_dtype(config)
        fields = shape_fields(config.shape, config.layers, positions)
        model = random_model(fields, dtype, config.device)
        name = f"{config.shape}, {len(model.layers)} layers, random weights"
        cli.describe(model, name, name)
        return model, None
    model, folder = cli.load_model(config)
    limit = model.config.max_position_embeddings
    if positions - config.new_tokens > limit:
        raise ValueError(f"--lengths {config.lengths}: the model has {limit} positions")
    # what comes after a prompt of all positions is timed, not read
    model.config.max_position_embeddings = max(limit, positions)
    return model, folder


# ---------------------------------------------------------------------------- methods


def given_stages(config, model, methods):
    """cli.given_stages(); with --shape untrained heads at the paper's stages."""
    if not config.shape or {parse(method)[0] for method in methods} == {"dense"}:
        return cli.given_stages(config, model, methods)
    schedule = paper_schedule(len(model.layers))
    heads = {layer: PruneHead(model.config.hidden_size) for layer in schedule}
    for head in heads.values():
        head.to(model.device).requires_grad_(False)
    return {"": (heads, schedule, 1)}


def variants(config, model, methods, stages, n, size):
    """{(name, keep): (method, heads)} of eval_tasks.plans(), dense first and only once.

    n: tokens of each prompt; size: prompts in a batch; heads: None but for sdtp; keep: 0 for none.
    """
    keeps, found = [0.0], {}
    if config.keep:
        keeps = cli.numbers("keep", config.keep, float, lambda keep: 0 < keep <= 1)
    draws = [torch.Generator().manual_seed(config.seed + i) for i in range(size)]
    for (keep, name), plan in plans(model.config, methods, stages, keeps, n).items():
        made = scorers.method(plan.name, plan.schedule, plan.span, plan.heads, None, draws)
        keep = 0.0 if plan.name == "dense" else keep
        found[name, keep] = kv.compressed(made, plan.kind) if plan.kind else made, plan.heads
    return found


def transformers_model(config, model, folder=None):
    """transformers' model of the same folder, or of --shape: same dtype and device, SDPA."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError(
            "--methods transformers: not installed; pip install -r requirements-dev.txt"
        ) from None
    how = {"dtype": model.dtype, "attn_implementation": "sdpa"}
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, **how).to(model.device)
    positions = model.config.max_position_embeddings
    fields = shape_fields(config.shape, config.layers, positions)
    with model.device:  # made where it runs: 7B of random numbers take the CPU minutes
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), **how).eval()


@torch.inference_mode()
def transformers_generate(reference, ids, max_new_tokens, on_token=None):
    """Greedy tokens after ids: (B, T); on_token as generate()'s. Returns the cache."""
    out = reference(ids, logits_to_keep=1, use_cache=True)
    for step in range(max_new_tokens):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        if on_token:
            on_token(token.flatten().tolist())
        if step + 1 < max_new_tokens:
            out = reference(token, past_key_values=out.past_key_values, use_cache=True)
    return out.past_key_values


# ---------------------------------------------------------------------------- measuring


def peak_bytes(device, call):
    """Peak bytes of live tensors while call() runs, above those alive before it."""
    if device.type != "cuda":
        return cpu_peak_bytes(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak_bytes(call):
    """peak_bytes() on the CPU: the profiler notes every allocation and free, in order.

    Not seen is what is not allocated as a tensor, such as oneDNN's packed weights.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else two lines on stderr at each run
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # profiler.events() shows what is left of each operator when it ends, not its peak
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in memory), initial=0))


def interleaved(run, repeats):
    """{key: results of call() in each repeat} of {key: call}: in turn, after a warm-up round."""
    found = {key: [] for key in run}
    for repeat in tqdm(range(repeats + 1), desc="rounds", leave=False, disable=None):
        for key, call in run.items():
            result = call()
            if repeat:
                found[key].append(result)
    return found


def call_seconds(model, call):
    """Seconds of call()."""
    start = clock(model)
    call()
    return clock(model) - start


def token_seconds(model, new_tokens, call):
    """Seconds of call(new_tokens, on_token=): to the first token, for each later, to the last."""
    ticks = [clock(model)]
    call(new_tokens, on_token=lambda _: ticks.append(clock(model)))
    start, first, *_, last = ticks
    return first - start, (last - first) / (new_tokens - 1), last - start


def speed(seconds, dense_seconds):
    """The timed fields of a row, from token_seconds() of each repeat.

    Times are medians, spreads (largest - smallest) / median. Speedups over dense are medians of the
    ratios in each repeat, as a machine's speed drifts from one to the next.
    """
    row = {}
    for name, own, base in zip(("prefill", "decode", "total"), zip(*seconds), zip(*dense_seconds)):
        row[f"{name}_s"] = statistics.median(own)
        row[f"{name}_spread"] = (max(own) - min(own)) / statistics.median(own)
        row[f"{name}_speedup"] = statistics.median(b / a for a, b in zip(own, base))
    return row


def work(model, ids, seqlens, method, heads=None):
    """The counted fields of a row, from one prefill of prompts of one length.

    prefill_flops: all that is executed, with passes before the one that fills the cache; alive:
    tokens of each prompt at each layer.
    """
    cache, n = KVCache(len(model.layers)), seqlens[0]
    method(model, ids, seqlens, cache)
    alive = rows = [counts[0] for counts in cache.alive]
    if model.config.sliding_window:  # what a row sees depends on the positions of those alive
        rows = [layer.rows()[2][:count] for layer, count in zip(cache.layers, alive)]
    *blocks, head = (len(seqlens) * f for f in executed_flops(model.config, n, rows, heads))
    return {
        "prefill_flops": sum(blocks) + head + cache.extra_flops,
        "heads_flops": head,
        "alive": alive,
        "mean_alive": statistics.mean(alive) / n,
        "kv_bytes": cache.nbytes(),
    }


# ---------------------------------------------------------------------------- the runs


def measure(config, model, ids, seqlens, methods, reference=None):
    """Rows of prompts of one length, by variants() and by transformers, whose FLOPs are dense's.

    peak_bytes: of a prefill's live tensors, above the weights; memory_diff: of weights and peak
    together, to dense's.
    """
    run, counted, rows = {}, {}, []
    for key, (method, heads) in methods.items():
        run[key] = partial(generate, model, ids, method=method, seqlens=seqlens)
        counted[key] = work(model, ids, seqlens, method, heads)
    if reference:
        rows_of_ids = torch.stack(ids.split(seqlens))
        run["transformers", 0.0] = partial(transformers_generate, reference, rows_of_ids)
    calls = {key: partial(token_seconds, model, config.new_tokens, run[key]) for key in run}
    seconds = interleaved(calls, config.repeats)
    weights = weight_bytes(model)
    for key, call in run.items():
        row = {"length": seqlens[0], "batch_size": len(seqlens), "method": key[0], "keep": key[1]}
        row |= counted.get(key, counted[DENSE]) | speed(seconds[key], seconds[DENSE])
        if key[0] == "transformers":
            row["kv_bytes"] = sum(t.nbytes for c in call(1).layers for t in (c.keys, c.values))
        row["tokens_s"] = len(seqlens) * config.new_tokens / row["total_s"]
        row["flops_speedup"] = counted[DENSE]["prefill_flops"] / row["prefill_flops"]
        row["peak_bytes"] = peak_bytes(model.device, partial(call, 1))  # apart from the timed runs
        rows.append(row)
        row["memory_diff"] = (weights + row["peak_bytes"]) / (weights + rows[0]["peak_bytes"]) - 1
    return rows


CELLS = (  # of print_rows(), for the rows of measure()
    "method keep length batch_size prefill_s:.3f prefill_spread:.1% prefill_speedup:.2f "
    "flops_speedup:.2f mean_alive:.3f decode_s:.4f total_s:.2f total_speedup:.2f tokens_s:.1f "
    "kv_bytes:, peak_bytes:, memory_diff:+.1%"
)


def print_rows(rows, cells):
    """Print rows by the names of their fields; cells: "FIELD:FORMAT FIELD ..."."""
    cli.print_table(rows, {cell.split(":")[0]: f"{{{cell}}}" for cell in cells.split()})


def measure_all(config, model, folder, lengths, sizes):
    """Print and write the rows of each length and batch as they come: a run may be cut short."""
    methods = ["dense", *(name for name in config.methods.split(",") if name != "transformers")]
    stages, rows, reference = given_stages(config, model, methods), [], None
    if "transformers" in config.methods.split(","):
        reference = transformers_model(config, model, folder)
    for n, size in itertools.product(lengths, sizes):
        ids = torch.randint(model.config.vocab_size, (n * size,)).to(model.device)
        runs = variants(config, model, methods, stages, n, size)
        rows += (new := measure(config, model, ids, [n] * size, runs, reference))
        print_rows(new, CELLS)
        cli.write_rows(config.json, rows, seed=config.seed)


def measure_marking(config, model, lengths):
    """--marking: print and write what the labels of the paper's stages cost, against a prefill."""
    rows, layers = [], list(paper_schedule(len(model.layers)))
    for n in lengths:
        ids = torch.randint(model.config.vocab_size, (n,)).to(model.device)
        run = {"prefill": partial(prefill, model, ids)}
        run["labels"] = partial(saliency.label, model, ids, n - RESPONSE, layers)
        calls = {name: partial(call_seconds, model, call) for name, call in run.items()}
        found = interleaved(calls, config.repeats)
        for name, seconds in found.items():
            ratios = [s / d for s, d in zip(seconds, found["prefill"])]
            row = {"length": n, "method": name, "seconds": statistics.median(seconds)}
            row["multiple"] = statistics.median(ratios)
            row["peak_bytes"] = peak_bytes(model.device, run[name])
            rows.append(row)
    print_rows(rows, "method length seconds:.3f multiple:.2f peak_bytes:,")
    cli.write_rows(config.json, rows, seed=config.seed)


PAPER_TABLE = {  # its table 2: TFLOPs of Mistral-7B's prefill at 4, 8, ..., 128 thousand tokens
    "dense": (72.51, 158.22, 369.22, 949.54, 2743.46, 8864.49),
    "sdtp": (47.81, 102.01, 229.41, 560.40, 1526.98, 4678.81),
}


def paper_table(config):
    """--paper_table: print and write the paper's TFLOPs beside those of flops.paper_flops()."""
    mistral, rows = Config.from_dict(shape_fields("mistral-7b")), []
    layers = mistral.num_hidden_layers
    for method, schedule in (("dense", {}), ("sdtp", paper_schedule(layers))):
        for power, paper in enumerate(PAPER_TABLE[method]):
            n = 4096 * 2**power
            ours = paper_flops(mistral, alive_per_layer(schedule, n, layers)) / 1e12
            row = {"length": n, "method": method, "paper_tflops": paper, "our_tflops": ours}
            rows.append(row | {"difference": ours / paper - 1})
    print_rows(rows, "method length:, paper_tflops:.2f our_tflops:.2f difference:+.3%")
    cli.write_rows(config.json, rows)


def check_flags(config):
    """ValueError for a flag out of its range, or one without effect beside another."""
    cli.at_least(0, config, "layers")
    if parallel.WORLD > 1 and (config.shape or not parallel.DIVIDED):
        raise ValueError(
            "under torchrun: tensor_parallel.py bench.py --ckpt FOLDER, a divided model"
        )
    cli.at_least(1, config, "repeats")
    cli.at_least(2, config, "new_tokens")
    given, methods = set(config.given), set(config.methods.split(",")) - {"transformers"}
    useless = {  # flag: those without effect beside it
        "paper_table": given - {"paper_table", "json"},
        "marking": {"heads", "methods", "keep", "new_tokens", "batches"},
        "shape": {"ckpt", "heads"},
    }
    for flag, others in useless.items():
        if getattr(config, flag) and (both := others & given):
            raise ValueError(f"--{flag} and --{min(both)} do not go together")
    if config.layers and not config.shape:
        raise ValueError("--layers is for --shape: a checkpoint runs whole")
    names = {parse(method)[0] for method in methods}
    if "teacher" in names:
        raise ValueError("--methods teacher: there is no response to mark tokens by")
    if config.keep and names <= {"dense"}:
        raise ValueError(f"--keep {config.keep}: dense has no budget")


def main():
    config = cli.parse(BenchConfig, __doc__)
    check_flags(config)
    if config.paper_table:
        return paper_table(config)
    lengths = cli.numbers("lengths", config.lengths, int, lambda n: n > 0)
    if config.marking and min(lengths) < RESPONSE + 16:
        raise ValueError(f"--lengths {config.lengths}: --marking needs {RESPONSE + 16} tokens")
    sizes = cli.numbers("batches", config.batches, int, lambda size: size > 0)
    torch.manual_seed(config.seed)
    model, folder = load(config, max(lengths) + config.new_tokens)
    if config.marking:
        return measure_marking(config, model, lengths)
    measure_all(config, model, folder, lengths, sizes)


if __name__ == "__main__":
    cli.run(main)
