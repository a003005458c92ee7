"""Speed, FLOPs and memory: dense, pruned and other programs in turn in one run, beside what the FLOPs promise.

python bench.py --lengths 1024,2048,4096 --keep 0.9,0.8
python bench.py --kv h2o                                         # each of ours also with 40 % of the KV cache
python bench.py --transformers                                   # transformers' dense model in the same run
python bench.py --peers peers                                    # llama.cpp and kvpress, from their own environments
python bench.py --shape llama2-7b --layers 4 --lengths 16384     # random weights of that shape
python bench.py --batches 1,4,16                                 # throughput of prompts of 200 to 2,000 tokens
python bench.py --marking --shape 1b                             # labels, as a multiple of one dense forward
python bench.py --profile                                        # where the time goes, and what the machine can do
python bench.py --paper_table                                    # the paper's table 2 beside our count of its FLOPs
"""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import cli
import saliency
import train
from cli import clock
from data import Example, read_text
from download import DEFAULT
from kv import compression
from model import Config, RoPE, Transformer, auto_dtype
from sdtp import PruneHead, Schedule, executed_flops, fingerprint, generate, held_counts, prefill
from tokenizer import Tokenizer


@dataclass
class BenchConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    shape: str = ""  # or random weights of a shape: 10m, 135m, 360m, 1b, llama2-7b, mistral-7b, qwen2-7b, gemma-7b
    layers: int = 0  # shape: that many layers (0: all it has)
    heads: str = ""  # folder of trained heads (default: untrained heads, as fast as trained ones)
    keep: str = ""  # variants, with commas: the compute of the paper's stages at that share (default: heads' own)
    kv: str = ""  # run each of ours also with the KV cache compressed after the prefill: h2o or snapkv
    kv_keep: float = 0.0  # share of the prompt whose keys and values it keeps (0: 0.4, the paper's)
    text: str = ""  # text file to read (default: random tokens)
    lengths: str = "1024,2048,4096"  # prompt lengths in tokens
    new_tokens: int = 128  # tokens generated after each prompt, the first of them by the prefill
    repeats: int = 5  # runs of each variant after a warm-up, in turn
    transformers: bool = False  # also run transformers, dense (needs it installed)
    peers: str = ""  # folder of the peers' own virtual environments: run llama.cpp and kvpress from it too
    batches: str = ""  # batch sizes, with commas: only measure the throughput of prompts of mixed lengths
    marking: bool = False  # only measure what labels cost, with and without recomputed blocks
    profile: bool = False  # only show where the time of a prefill goes, by operator, beside the machine's limits
    paper_table: bool = False  # print the paper's table 2 beside our count of its FLOPs, and nothing else
    seed: int = 0  # of the random tokens, heads and weights
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the rows
    figure: str = ""  # PNG file for speedup and peak memory against length


def shape(model_type, vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads, **more):
    """The config.json fields of a shape."""
    return {
        "model_type": model_type, "vocab_size": vocab_size, "hidden_size": hidden_size,
        "intermediate_size": intermediate_size, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, **more,
    }  # fmt: skip


SMALL = {"tie_word_embeddings": True}
SHAPES = {
    "10m": shape("llama", 8192, 256, 768, 10, 4, 2, **SMALL),
    "135m": shape("llama", 49152, 576, 1536, 30, 9, 3, **SMALL),  # SmolLM2's
    "360m": shape("llama", 49152, 960, 2560, 32, 15, 5, **SMALL),
    "1b": shape("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, **SMALL),  # Llama 3.2's
    "llama2-7b": shape("llama", 32000, 4096, 11008, 32, 32, 32),
    "mistral-7b": shape("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=None),  # v0.2, as the paper
    "qwen2-7b": shape("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "gemma-7b": shape("gemma", 256000, 3072, 24576, 28, 16, 16, head_dim=256),
}
# Table 2, Mistral-7B: thousands of tokens -> TFLOPs of the dense and of the pruned prefill
PAPER_TABLE = {4: (72.51, 47.81), 8: (158.22, 102.01), 16: (369.22, 229.41), 32: (949.54, 560.40),
               64: (2743.46, 1526.98), 128: (8864.49, 4678.81)}  # fmt: skip


# ---------------------------------------------------------------------------- FLOPs


def paper_flops(config, lengths):
    """The count that reproduces the paper's table 2 (found by matching it), lengths: tokens alive per layer.

    No GQA; 3 d per pair of the full square; the embedding counted as a product beside an LM head on every row.
    """
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    return sum(2 * (4 * d * d + 3 * d * f) * n + 3 * d * n * n for n in lengths) + 4 * v * d * lengths[0]


def paper_table():
    """Rows of the paper's table 2: its TFLOPs, ours by paper_flops with the paper's stages, and the differences."""
    config, rows = Config.from_dict(SHAPES["mistral-7b"] | {"max_position_embeddings": 1}), []
    for thousands, published in PAPER_TABLE.items():
        n = thousands * 1024
        row = {"length": n}
        for name, paper, alive in zip(("dense", "sdtp"), published, ([n] * 32, Schedule(32).alive(n))):
            ours = paper_flops(config, alive) / 1e12
            row |= {f"{name}_paper": paper, f"{name}_ours": ours, f"{name}_diff": ours / paper - 1}
        rows.append(row)
    return rows


def print_paper_table(rows):
    """The rows of paper_table(), aligned."""
    print(
        "TFLOPs of the prefill, Mistral-7B: the paper's table 2, and ours by the formula that matches its dense column"
    )
    print(f"{'tokens':>7} " + " ".join(f"{m + ' paper':>12} {'ours':>9} {'diff':>7}" for m in ("dense", "SDTP")))
    for r in rows:
        cells = (f"{r[m + '_paper']:12.2f} {r[m + '_ours']:9.2f} {r[m + '_diff']:+7.2%}" for m in ("dense", "sdtp"))
        print(f"{r['length']:7d} " + " ".join(cells))


def fit(rows):
    """time = a * linear FLOPs + b * attention FLOPs over the rows of our own methods.

    Least squares of the relative error, as lengths differ a hundredfold in time. Returns (1 / a and 1 / b in
    GFLOP/s, the largest |predicted / measured - 1|), or None where the rows cannot tell the two apart.
    """
    rows = [r for r in rows if r["method"] in ("dense", "sdtp")]
    if len(rows) < 3:
        return None
    flops = torch.tensor([[r["linear_flops"], r["attention_flops"]] for r in rows], dtype=torch.float64) / 1e9
    relative = flops / torch.tensor([[r["prefill_s"]] for r in rows], dtype=torch.float64)
    a, b = solution = torch.linalg.lstsq(relative, torch.ones(len(rows), 1, dtype=torch.float64)).solution
    return None if min(a, b) <= 0 else (1 / a.item(), 1 / b.item(), (relative @ solution - 1).abs().max().item())


# ---------------------------------------------------------------------------- memory


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
    """peak_bytes on the CPU: torch.profiler notes every allocation and free of the CPU allocator in its order.

    The peak is the maximum of their running sum; tensors from before the call are not in it, freed or not. Not seen
    is what is not allocated as a tensor (oneDNN's packed weights and scratch, Python): that is in rss_bytes.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else two lines on stderr at each run
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # profiler.events() would show only what is left of each operator when it ends, not its peak
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def rss_bytes(call):
    """Highest resident size of this process while call() runs; Linux's VmHWM, None elsewhere.

    All that is loaded counts, transformers' copy of the weights too: compare rows of one run, not of two.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that glibc keeps of the methods before are none of this one's
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc(5)
    except (AttributeError, OSError):
        return None
    call()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


# ---------------------------------------------------------------------------- models


def random_model(fields, dtype="auto", device="cpu"):
    """A Transformer of a config.json's fields with weights normal * 0.02, made in dtype (as from_pretrained's)."""
    dtype = auto_dtype(device) if dtype == "auto" else dtype
    with torch.device("meta"):
        model = Transformer(Config.from_dict(fields))
    state = {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in model.state_dict().items()}
    for name, p in state.items():
        if "norm" in name:
            p.fill_(1)
        else:
            p.normal_(0, 0.02)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).to(device, dtype)


def shape_fields(name, layers, positions):
    """The config.json fields of --shape with that many layers (0: its own) and positions. ValueError names the flag."""
    if name not in SHAPES:
        raise ValueError(f"--shape {name}: choose {', '.join(SHAPES)}")
    fields = SHAPES[name] | {"max_position_embeddings": positions}
    return fields | ({"num_hidden_layers": layers} if layers else {})


def extend_positions(model, positions):
    """Let a model count to that many positions: what it generates after a full prompt is timed, not read."""
    if positions > model.config.max_position_embeddings:
        model.config.max_position_embeddings = positions
        rope = RoPE(model.config).to(model.device, model.norm.weight.dtype)
        for block in model.layers:
            block.self_attn.rope = rope


def transformers_model(model, folder=None, fields=None):
    """transformers' model of the same checkpoint folder, or of a shape with random weights: same dtype, SDPA."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError("--transformers: it is not installed; pip install -r requirements-dev.txt") from None
    how = {"dtype": model.norm.weight.dtype, "attn_implementation": "sdpa"}
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, **how).to(model.device)
    with model.device:  # made where it runs: 7B of random numbers take the CPU minutes
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), **how).eval()


@torch.inference_mode()
def transformers_generate(reference, ids, max_new_tokens, on_token=None):
    """Greedy tokens of transformers' model with the call of sdtp.generate; last row's logits. Returns its cache."""
    out = reference(ids[None], logits_to_keep=1, use_cache=True)
    for step in range(max_new_tokens):
        token = out.logits[:, -1].argmax(-1)
        if on_token:
            on_token(token.tolist())
        if step + 1 < max_new_tokens:
            out = reference(token[None], past_key_values=out.past_key_values, logits_to_keep=1, use_cache=True)
    return out.past_key_values


# ---------------------------------------------------------------------------- peers, in their own environments

PEERS = {  # what bench_peer.py can run -> the packages of its virtual environment
    "llama.cpp": "llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6",
    "kvpress": "kvpress==0.5.5 transformers==5.2.0 torch==2.13.0",
}


class Peer:
    """A bench_peer.py that waits for requests. One that fails says so in one line, and answers None from then on."""

    def __init__(self, name, python, *arguments):
        self.name, self.errors = name, tempfile.TemporaryFile("w+", errors="replace")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        script = Path(__file__).with_name("bench_peer.py")  # -I: none of our modules hides one of theirs
        self.process = subprocess.Popen([python, "-I", script, name, *map(str, arguments)], **pipes)

    def ask(self, **request):
        """The dict that bench_peer.py answers to {"ids": token ids, "new_tokens": n, ...}, or None."""
        if self.process.stdin.closed:
            return None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):  # a broken pipe; no line, or none of JSON
            self.stop()
            self.errors.seek(0)
            said = [line for line in self.errors.read().splitlines() if line.strip()] or ["it wrote nothing"]
            tqdm.write(f"no {self.name} from here on: it ended with status {self.process.returncode}: {said[-1]}")

    def stop(self):
        """Close its stdin, which ends it, and wait."""
        self.process.communicate()


def start_peers(where, model, folder, positions, text_ids):
    """{name: Peer} of the environments in the folder --peers; one line for each that is missing or does not start.

    text_ids: a text, after which a peer's first token should be ours.
    """
    peers, threads = {}, ["--threads", torch.get_num_threads()]
    first = generate(model, text_ids.to(model.device), 1)[0][0]
    gguf = Path(where) / f"{folder.resolve().name}-{fingerprint(model)[:12]}.gguf"
    more = {
        "llama.cpp": ["--positions", positions, "--gguf", gguf],
        "kvpress": ["--dtype", str(model.norm.weight.dtype).removeprefix("torch.")],
    }
    for name, packages in PEERS.items():
        place = Path(where) / name
        if not (python := place / "bin" / "python").exists():
            print(f"no {name}: {python} is not there; python -m venv {place} && {place}/bin/pip install {packages}")
            continue
        try:
            peers[name] = Peer(name, python.absolute(), folder, *threads, *more[name])
        except OSError as error:
            print(f"no {name}: {error}")
            continue
        answer = peers[name].ask(ids=text_ids.tolist(), new_tokens=1)
        if answer and answer["first_token"] != first:
            print(f"warning: after {len(text_ids)} tokens of LICENSE {name} says {answer['first_token']}, we {first}")
    return peers


def requests(peers, ids, schedules, heads):
    """{(method, keep): Peer.ask(new_tokens=...)}; kvpress once for each sdtp, to keep as many keys and values as that."""
    n = len(ids)
    ratios = {keep: 1 - statistics.mean(held_counts(s.alive(n), n, heads)) / n for keep, s in schedules.items()}
    asked = {}
    for name, peer in peers.items():
        for keep in ratios if name == "kvpress" else [None]:
            more = {"compression_ratio": ratios[keep]} if keep is not None else {}
            asked[name, keep] = partial(peer.ask, ids=ids.tolist(), **more)
    return asked


# ---------------------------------------------------------------------------- one length


def timed(model, run, new_tokens, repeats, asked=None):
    """Interleaved timing of {key: generate(new_tokens, on_token=...)} and of peers, after one warm-up each.

    asked: {key: Peer.ask(new_tokens=...)}; a peer times itself.
    Returns {key: (seconds to the first token, per later token, to the last token) of each repeat}.
    """
    asked = asked or {}
    seconds = {key: [] for key in run | asked}
    for repeat in tqdm(range(repeats + 1), desc="rounds", leave=False, disable=None):
        for key, call in run.items():
            ticks = [clock(model)]
            call(new_tokens if repeat else 2, on_token=lambda _: ticks.append(clock(model)))
            start, first, *_, last = ticks
            if repeat:
                seconds[key].append((first - start, (last - first) / (new_tokens - 1), last - start))
        for key, ask in asked.items():
            answer = ask(new_tokens=new_tokens if repeat else 2)
            if answer and repeat:
                seconds[key].append((answer["first_s"], answer["per_token_s"], answer["total_s"]))
    return seconds


def speed(seconds, dense):
    """The timed fields of a row, from timed()'s seconds of a method and of dense; ratios are medians over repeats."""

    def ratio(above, below):  # per repeat, as the machine's speed drifts from one to the next
        return statistics.median(a / b for a, b in zip(above, below))

    prefill_s, decode_s, total_s = zip(*seconds)
    dense_prefill, dense_decode, dense_total = zip(*dense)
    return {
        "prefill_s": statistics.median(prefill_s),
        "prefill_spread": (max(prefill_s) - min(prefill_s)) / statistics.median(prefill_s),
        "decode_s": statistics.median(decode_s),
        "total_s": statistics.median(total_s),
        "speedup": ratio(dense_prefill, prefill_s),
        "decode_ratio": ratio(decode_s, dense_decode),
        "total_speedup": ratio(dense_total, total_s),
    }


def work(model, ids, heads=None, schedule=None, kv=None):
    """The counted fields of a row, from one prefill with a cache for the prompt alone; linear: LM and pruning heads and LateKV too.

    A Compression's scores count as attention, and the bytes are those that it leaves.
    """
    cache = prefill(model, ids, heads, schedule)[1]
    alive, held = [counts[0] for counts in cache.alive], [layer.rows()[2] for layer in cache.layers]
    # a LateKV's layers hold more than is alive
    positions = [p if len(p) == count else count for p, count in zip(held, alive)]
    linear, attention, head = executed_flops(model.config, len(ids), positions, heads)
    if kv:
        attention += kv.flops(model.config, alive, len(ids), [len(p) for p in held])
        cache = prefill(model, ids, heads, schedule, kv=kv)[1]
    return {
        "linear_flops": linear + head,
        "attention_flops": attention,
        "prefill_flops": linear + attention + head,
        "paper_flops": paper_flops(model.config, alive),
        "mean_alive": sum(alive) / len(alive) / len(ids),
        "alive": alive,
        "held": [lengths[0] for lengths in cache.seqlens()],
        "kv_bytes": cache.nbytes(),
    }


def heads_seconds(model, ids, heads, schedule):
    """Seconds of one pruned prefill from each head's call to its block's: scores, selection and gather there, a LateKV aside."""
    ticks = []

    def started(head, *args):
        ticks.append(-clock(model))
        return head(*args)

    timed_heads = {layer: partial(started, heads[layer]) for layer in schedule.scored()}
    ended = [
        model.layers[layer].register_forward_pre_hook(lambda *_: ticks.append(clock(model))) for layer in timed_heads
    ]
    prefill(model, ids, heads | timed_heads, schedule)
    for hook in ended:
        hook.remove()
    return sum(ticks)


def measure(model, ids, heads, schedules, reference, new_tokens, repeats, peers=None, kv=None):
    """Rows of one prompt length: dense, sdtp by each of {keep: Schedule}, both again with a Compression, with a
    reference transformers, and {name: Peer}.

    A peer has dense's work and its own keys and values; its peak of live tensors is not known.
    heads_share: seconds of heads, selection and gather (heads_seconds(), not interleaved) over dense's prefill_s.
    """
    stages = {("dense", None): (None, None, None)} | {("sdtp", keep): (heads, s, None) for keep, s in schedules.items()}
    if kv:
        stages |= {(f"{method}+{kv}", keep): (h, s, kv) for (method, keep), (h, s, _) in stages.items()}
    run = {key: partial(generate, model, ids, scorers=h, schedule=s, kv=c) for key, (h, s, c) in stages.items()}
    if reference:
        run["transformers", None] = partial(transformers_generate, reference, ids)
    asked = requests(peers or {}, ids, schedules, heads)
    seconds, dense, rows = timed(model, run, new_tokens, repeats, asked), work(model, ids), []
    for (method, keep), call in run.items():
        row = {"length": len(ids), "method": method, "keep": keep, **dense, "heads_share": 0.0}
        row |= speed(seconds[method, keep], seconds["dense", None])
        scorers, schedule, compressed = stages.get((method, keep), (None, None, None))
        if scorers or compressed:
            row |= work(model, ids, scorers, schedule, compressed)
        if scorers:
            cost = statistics.median(heads_seconds(model, ids, scorers, schedule) for _ in range(3))
            row["heads_share"] = cost / rows[0]["prefill_s"]
        if method == "transformers":  # dense's work, but its own cache
            row["kv_bytes"] = sum(t.untyped_storage().nbytes() for c in call(1).layers for t in (c.keys, c.values))
        row["flops_ratio"] = dense["prefill_flops"] / row["prefill_flops"]
        row["reached"] = row["speedup"] / row["flops_ratio"]
        row["peak_bytes"] = peak_bytes(model.device, partial(call, 1))  # apart from the timed runs
        row["rss_bytes"] = rss_bytes(partial(call, 1))
        rows.append(row)
    for (method, keep), ask in asked.items():
        if not (answer := ask(new_tokens=1)):  # it has failed, here or before
            continue
        row = {"length": len(ids), "method": method, "keep": keep, **dense, "heads_share": 0.0}
        row |= speed(seconds[method, keep], seconds["dense", None]) | {"flops_ratio": 1.0, "peak_bytes": None}
        row |= {field: answer[field] for field in ("kv_bytes", "rss_bytes")}
        rows.append(row | {"reached": row["speedup"]})
    return rows


def print_header():
    print(
        f"{'':28}|{'prefill':^25}|{'decode':^15}|{'end to end':^17}|{'executed FLOPs':^24}|{'alive':^7}|{'MiB':^26}|{'heads':^7}\n"
        f"{'tokens':>7} {'method':<20}|{'ms':>9} {'spread':>7} {'speedup':>7} |{'ms':>7} {'ratio':>6} |{'s':>8} {'speedup':>7} "
        f"|{'GFLOPs':>8} {'ratio':>6} {'reached':>7} |{'mean':>6} |{'KV':>8} {'peak':>8} {'RSS':>7} |{'share':>6}"
    )


def print_row(r):
    name = r["method"] + ("" if r["keep"] is None else f" {r['keep']:.3g}")
    peak, rss = ("-" if r[b] is None else f"{r[b] / 2**20:.{d}f}" for b, d in (("peak_bytes", 1), ("rss_bytes", 0)))
    print(
        f"{r['length']:7d} {name:<20}|{r['prefill_s'] * 1e3:9.1f} {r['prefill_spread']:7.1%} {r['speedup']:6.2f}x "
        f"|{r['decode_s'] * 1e3:7.2f} {r['decode_ratio']:6.3f} |{r['total_s']:8.2f} {r['total_speedup']:6.2f}x "
        f"|{r['prefill_flops'] / 1e9:8.1f} {r['flops_ratio']:5.2f}x {r['reached']:7.3f} |{r['mean_alive']:6.3f} "
        f"|{r['kv_bytes'] / 2**20:8.2f} {peak:>8} {rss:>7} |{r['heads_share']:6.2%}",
        flush=True,
    )


def draw(rows, path):
    """Prefill speedup, with the executed FLOPs' ratio, and peak memory of the prefill, against prompt length."""
    import matplotlib.pyplot as plt

    figure, (speedups, memory) = plt.subplots(1, 2, figsize=(11, 4))
    for variant in dict.fromkeys((r["method"], r["keep"]) for r in rows):
        of = [r for r in rows if (r["method"], r["keep"]) == variant]
        lengths, name = [r["length"] for r in of], " ".join(f"{part}" for part in variant if part is not None)
        (line,) = speedups.plot(lengths, [r["speedup"] for r in of], marker="o", label=name)
        if of[0]["peak_bytes"] is not None:
            peaks = [r["peak_bytes"] / 2**20 for r in of]
            memory.plot(lengths, peaks, marker="o", color=line.get_color(), label=name)
        if variant[0] == "sdtp":
            ratios = [r["flops_ratio"] for r in of]
            speedups.plot(lengths, ratios, "--", color=line.get_color(), label=f"{name}: executed FLOPs")
    speedups.set_ylabel("prefill, times faster than our dense")
    memory.set_ylabel("peak of live tensors above weights (MiB)")
    for axis in (speedups, memory):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks := sorted({r["length"] for r in rows}), ticks)
        axis.set(xlabel="prompt tokens", ylim=(0, 1.4 * axis.get_ylim()[1]))  # room for the legend
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", ncols=2)
    cli.save_figure(figure, path)


# ---------------------------------------------------------------------------- batches, and marking


def throughput(model, prompts, variants, sizes, new_tokens, repeats):
    """Rows of {batch size} x {method: (heads, schedule)}: all prompts by generate(), that many at a time, in turn.

    decode_tokens_s: new tokens per second after each prompt's first; tokens_s: new tokens per second of all the time;
    of_first: decode_tokens_s over that of the first batch size of the same method. Medians over repeats, after a warm-up.
    """
    runs = [(size, name) for size in sizes for name in variants]
    seconds = {run: [] for run in runs}
    for repeat in tqdm(range(repeats + 1), desc="rounds", leave=False, disable=None):
        for size, name in runs:
            heads, schedule = variants[name]
            prefill_s = decode_s = 0.0
            for batch in (prompts[i : i + size] for i in range(0, len(prompts), size)):
                ticks, lens = [clock(model)], [len(p) for p in batch]
                note = lambda _, ticks=ticks: ticks.append(clock(model))
                generate(model, torch.cat(batch), new_tokens, heads, schedule, seqlens=lens, on_token=note)
                prefill_s, decode_s = prefill_s + ticks[1] - ticks[0], decode_s + ticks[-1] - ticks[1]
            if repeat:
                seconds[size, name].append((prefill_s, decode_s))
    rows, count = [], len(prompts)
    for size, name in runs:
        prefills, decodes = zip(*seconds[size, name])
        first = [decode_s for _, decode_s in seconds[sizes[0], name]]
        rows.append({
            "batch_size": size, "method": name, "prompts": count, "prompt_tokens": sum(map(len, prompts)),
            "prefill_s": statistics.median(prefills), "decode_s": statistics.median(decodes),
            "decode_tokens_s": statistics.median(count * (new_tokens - 1) / s for s in decodes),
            "tokens_s": statistics.median(count * new_tokens / (a + b) for a, b in zip(prefills, decodes)),
            "of_first": statistics.median(a / b for a, b in zip(first, decodes)),
        })  # fmt: skip
    return rows


def marking(model, ids, layers, repeats, response=64):
    """Rows of one length: seconds and peak bytes of a dense prefill, of the labels of all stages, and of whole steps of train.py.

    The label's loss is that of the last `response` tokens; multiple: median over repeats of seconds over the prefill's.
    Steps, labels included: by imitation with one stage, train.py's default, and with --paper's losses at all of them.
    """
    run = {"dense prefill": partial(prefill, model, ids)}
    for name, again in (("label", False), ("label, blocks recomputed", True)):
        starts = [max(1, len(ids) - response)]
        run[name] = partial(saliency.label, model, ids, layers, "grad_norm", [len(ids)], starts, again)
    example, depth = Example(ids[:-response].tolist(), ids[-response:].tolist()), len(model.layers)
    for name, flags, stages in (("step", {}, layers[:1]), ("step, --paper", train.PAPER, layers)):
        config = train.TrainConfig(**flags, checkpoint_blocks="off")
        schedule = Schedule(depth, dict.fromkeys(stages, 0.5), span=config.span)
        heads = {layer: train.new_head(model, config) for layer in stages}
        optimizer = torch.optim.AdamW(train.parameters(heads).values())
        run[name] = partial(train.train_step, model, heads, optimizer, [[example]], schedule, config)
    seconds = {name: [] for name in run}
    for repeat in tqdm(range(repeats + 1), desc="rounds", leave=False, disable=None):  # the first is a warm-up
        for name, call in run.items():
            start = clock(model)
            call()
            took = clock(model) - start
            if repeat:
                seconds[name].append(took)
    return [
        {
            "length": len(ids), "method": name, "seconds": statistics.median(seconds[name]),
            "multiple": statistics.median(s / d for s, d in zip(seconds[name], seconds["dense prefill"])),
            "peak_bytes": peak_bytes(model.device, call),
        }
        for name, call in run.items()
    ]  # fmt: skip


def machine_limits(model, size=2**26):
    """(GFLOP/s of the MLP's matrix product at 2,048 rows in the model's dtype, GB/s of a copy of `size` floats: read and written)."""
    rows = torch.randn(2048, model.config.hidden_size, device=model.device).to(model.norm.weight.dtype)
    weight = model.layers[0].mlp.gate_proj.weight
    big, other = torch.ones(size, device=model.device), torch.empty(size, device=model.device)

    def best(call):
        return min(-(clock(model) - (call(), clock(model))[1]) for _ in range(20))

    product = best(lambda: torch.nn.functional.linear(rows, weight))
    return 2 * rows.numel() * len(weight) / product / 1e9, 8 * size / best(lambda: other.copy_(big)) / 1e9


GROUPS = {  # operators by what they do, first match: a name that is none of these is "other"
    "linear products": ("aten::addmm", "aten::mm", "aten::linear"),
    "attention products": ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "flash_attn"),
    "softmax": ("aten::_softmax", "aten::softmax"),
    "copies, casts, gathers": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::masked_fill_", "aten::empty"),
    "element-wise": ("aten::mul", "aten::add", "aten::silu", "aten::pow", "aten::mean", "aten::rsqrt", "aten::neg"),
}  # fmt: skip


def breakdown(model, call):
    """{group of operators: its share of the seconds in call()}, by torch.profiler's self times; after a warm-up."""
    call()
    cuda = [ProfilerActivity.CUDA] * (model.device.type == "cuda")
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
        call()
    spent = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in profiler.key_averages():
        group = next((g for g, names in GROUPS.items() if event.key.startswith(names)), "other")
        spent[group] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {group: time / sum(spent.values()) for group, time in spent.items()}


def measure_profile(config, model, text, lengths, heads, schedules):
    """--profile: prints and returns, for each of --lengths and each variant, the shares of breakdown()."""
    product, copy = machine_limits(model)
    print(f"matrix product of the MLP at 2,048 rows: {product:.0f} GFLOP/s | copy: {copy:.1f} GB/s")
    rows, variants = [], {"dense": (None, None)} | {f"sdtp {keep:.3g}": (heads, s) for keep, s in schedules.items()}
    print(f"{'tokens':>7} {'method':<10} " + " ".join(f"{g:>22}" for g in [*GROUPS, "other"]))
    for n in lengths:
        for name, (scorers, schedule) in variants.items():
            shares = breakdown(model, partial(prefill, model, text[:n].to(config.device), scorers, schedule))
            print(f"{n:7d} {name:<10} " + " ".join(f"{share:22.1%}" for share in shares.values()), flush=True)
            rows.append({"length": n, "method": name, "product_gflops": product, "copy_gb_s": copy, **shares})
    return rows


def measure_batches(config, model, text, lengths, heads, schedules):
    """--batches: prints and returns the rows of throughput() for prompts of these lengths, the text's beginnings."""
    sizes = cli.numbers("batches", config.batches, int, lambda n: n > 0)
    prompts = [text[:n].to(config.device) for n in lengths]
    variants = {"dense": (None, None)} | {f"sdtp {keep:.3g}": (heads, s) for keep, s in schedules.items()}
    rows = throughput(model, prompts, variants, sizes, config.new_tokens, config.repeats)
    print(
        f"{'batch':>6} {'method':<10} {'prefill s':>10} {'decode s':>9} {'decode tok/s':>13} {'of first':>9} {'tok/s':>7}"
    )
    for r in rows:
        print(
            f"{r['batch_size']:6d} {r['method']:<10} {r['prefill_s']:10.2f} {r['decode_s']:9.2f}"
            f" {r['decode_tokens_s']:13.1f} {r['of_first']:8.2f}x {r['tokens_s']:7.1f}"
        )
    return rows


def measure_marking(config, model, text, lengths, heads, schedules):
    """--marking: prints and returns the rows of marking() for each of --lengths, at the schedules' layers; heads: not used."""
    if min(lengths) < 80:
        raise ValueError(f"--lengths {min(lengths)}: --marking needs at least 80 tokens, of which 64 are the response")
    rows, layers = [], next(iter(schedules.values())).scored()  # the same in all
    print(f"{'tokens':>7} {'':<25} {'seconds':>8} {'multiple':>9} {'peak MiB':>9}")
    for n in lengths:
        rows += (new := marking(model, text[:n].to(config.device), layers, config.repeats))
        for r in new:
            peak = r["peak_bytes"] / 2**20
            print(f"{n:7d} {r['method']:<25} {r['seconds']:8.3f} {r['multiple']:8.2f}x {peak:9.1f}", flush=True)
    return rows


# ---------------------------------------------------------------------------- the command


def load(config, positions):
    """(model, its checkpoint folder or None, a shape's config.json fields or None, heads, {keep: Schedule})."""
    keeps = cli.numbers("keep", config.keep, float, lambda keep: 0 < keep <= 1) if config.keep else []
    folder = fields = heads = None
    if config.layers and not config.shape:
        raise ValueError("--layers is for --shape; a checkpoint runs whole")
    if config.shape:
        if config.heads or config.text:
            raise ValueError("--shape has random weights and no tokenizer: leave out --heads and --text")
        fields = shape_fields(config.shape, config.layers, positions)
        model = random_model(fields, cli.device_and_dtype(config), config.device)
        depth = len(model.layers)
        schedule = Schedule(depth) if depth > 4 else Schedule(depth, first_layer=1, step=1)
        name = f"{config.shape}, {depth} layers, random weights"
        cli.describe(model, name, name)
    else:
        model, folder = cli.load_model(config)
        heads, schedule = cli.heads_and_schedule(config, model, needed=False)
    if not heads:
        heads = {layer: PruneHead(model.config.hidden_size).to(config.device) for layer in schedule}
    schedules = {schedule[min(schedule)]: schedule}  # the share of the first stage names a heads' own schedule
    if keeps:
        schedules = {keep: schedule.with_ratio(keep) for keep in keeps}
    return model, folder, fields, heads, schedules


def measure_lengths(config, model, folder, fields, text, lengths, heads, schedules):
    """The run by length: prints and writes the rows of measure(), then the fit and the figure."""
    reference, rows, peers = transformers_model(model, folder, fields) if config.transformers else None, [], {}
    if config.peers:
        if model.device.type != "cpu":
            raise ValueError(f"--peers run on the CPU only, not on --device {config.device}")
        page = Tokenizer(folder).encode(Path(__file__).with_name("LICENSE").read_text())[: max(lengths)]
        peers = start_peers(config.peers, model, folder, max(lengths) + config.new_tokens, torch.tensor(page))
    how = (heads, schedules, reference, config.new_tokens, config.repeats, peers, compression(config))
    print_header()
    for n in lengths:
        rows += (new := measure(model, text[:n].to(config.device), *how))
        for row in new:
            print_row(row)
        cli.write_rows(config.json, rows, seed=config.seed)  # after each length: a long run may be cut short
    for peer in peers.values():
        peer.stop()
    if found := fit(rows):
        said = "linear FLOPs at {:.1f} GFLOP/s, attention at {:.1f} GFLOP/s, largest deviation {:.1%}"
        print("one fit of all rows:", said.format(*found))
    else:
        print("no fit: these rows cannot tell the time of linear FLOPs from that of attention")
    if config.figure:
        draw(rows, config.figure)


SPECIAL = {"batches": measure_batches, "marking": measure_marking, "profile": measure_profile}  # flag: what it runs


def check_flags(config):
    """The flag of SPECIAL that is given, or None; ValueError for a flag out of its range, or flags that do not go together."""
    special = [name for name in SPECIAL if getattr(config, name)]
    if len(special) > 1:
        raise ValueError(f"--{special[0]} and --{special[1]} are two runs: give one of them")
    kv = compression(config)
    if special and (config.transformers or config.peers or config.figure or kv):
        flags = "--transformers, --peers, --figure and --kv"
        raise ValueError(f"{flags} are for the run by length, without --{special[0]}")
    if config.peers and config.shape:
        raise ValueError("--peers read the checkpoint's folder; --shape has none")
    cli.at_least(1, config, "repeats")
    cli.at_least(2, config, "new_tokens")  # the first is the prefill's
    cli.at_least(0, config, "layers")
    return special[0] if special else None


def main():
    config = cli.parse(BenchConfig, __doc__)
    if config.paper_table:
        print_paper_table(rows := paper_table())
        return cli.write_rows(config.json, rows)
    special = check_flags(config)
    lengths = cli.numbers("lengths", config.lengths, int, lambda n: n > 0)
    torch.manual_seed(config.seed)
    if config.batches:
        lengths = torch.randint(200, 2001, (16,)).tolist()
        torch.manual_seed(config.seed)
    model, folder, fields, heads, schedules = load(config, max(lengths) + config.new_tokens)
    text = torch.randint(model.config.vocab_size, (max(lengths),))
    if config.text:
        text = torch.tensor(Tokenizer(folder).encode(read_text(config.text)))
    if len(text) < max(lengths):
        raise ValueError(f"{config.text} has only {len(text)} tokens")
    if max(lengths) > (limit := model.config.max_position_embeddings):
        beyond = f"beyond the model's {limit} positions; --shape has random weights for any length"
        raise ValueError(f"--lengths {max(lengths)}: {beyond}")
    extend_positions(model, max(lengths) + config.new_tokens)
    if special:
        rows = SPECIAL[special](config, model, text, lengths, heads, schedules)
        return cli.write_rows(config.json, rows, seed=config.seed)
    measure_lengths(config, model, folder, fields, text, lengths, heads, schedules)


if __name__ == "__main__":
    cli.run(main)
