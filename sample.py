"""Generate from a prompt, with and without pruning.

python sample.py --prompt "The capital of France is"
python sample.py --prompt_file scorers.py --compare      # dense, then pruned
python sample.py --prompt_file scorers.py --kv h2o       # pruned, then only 40 % of the prompt's keys and values kept
"""

import time
from dataclasses import dataclass

import torch

import cli
from data import prompt_text
from download import DEFAULT
from kv import compression
from model import KVCache
from sdtp import generate, prefill, protected_count
from tokenizer import Tokenizer


@dataclass
class SampleConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT)
    prompt: str = ""  # the prompt
    prompt_file: str = ""  # or a file that holds it
    chat: bool = False  # wrap the prompt in the checkpoint's chat template
    keep: float = 0.0  # compute of the paper's stages with that share each (0: the heads' own schedule)
    adaptive: bool = False  # keep the spans that score above the heads' own threshold, whatever share that is
    dense: bool = False  # no pruning
    kv: str = ""  # compress the KV cache after the prefill: h2o or snapkv
    kv_keep: float = 0.0  # share of the prompt whose keys and values it keeps (0: 0.4, the paper's)
    compare: bool = False  # first dense, then pruned
    max_new_tokens: int = 100  # at most
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # nucleus sampling
    seed: int = 0  # of sampling
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the figures


def run(model, tokenizer, ids, config, heads=None, schedule=None, kv=None):
    """Generate once, streaming; prints and returns what it cost."""
    cache = KVCache(len(model.layers), extra=config.max_new_tokens)
    new, shown, times = [], "", []

    def stream(tokens):
        nonlocal shown
        times.append(time.perf_counter())
        new.append(tokens[0])
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text

    start = time.perf_counter()
    generate(
        model, ids, config.max_new_tokens, heads, schedule, cache=cache, kv=kv,
        on_token=stream, temperature=config.temperature, top_p=config.top_p, eos_token_ids=tokenizer.eos_token_ids,
        generator=torch.Generator(config.device).manual_seed(config.seed),
    )  # fmt: skip
    print(tokenizer.decode(new)[len(shown) :], end="")
    return report(len(ids), len(new), [t - start for t in times], cache, schedule, kv)


def report(n, new_tokens, times, cache, schedule, kv):
    """Print and return what a prompt of n tokens cost; times: seconds until each new token."""
    alive = [lengths[0] for lengths in cache.alive]
    held = [lengths[0] - (new_tokens - 1) for lengths in cache.seqlens()]  # the last new token is in no cache
    seconds = times[-1] - times[0]
    name = ("sdtp" + "_adaptive" * schedule.adaptive if schedule else "dense") + (f"+{kv}" if kv else "")
    row = {
        "method": name,
        "prompt_tokens": n,
        "mean_alive": sum(alive) / len(alive) / n,
        "first_token_s": times[0],
        "tokens_per_s": (new_tokens - 1) / seconds if seconds else 0.0,
        "kv_bytes": cache.nbytes(),
    }
    floor = schedule and alive[min(schedule)] == protected_count(n)
    print(
        f"\n\n[{name}] tokens alive per layer: {' '.join(map(str, alive))}"
        + " (the floor: protected tokens only)" * bool(floor)
    )
    if held != alive:  # KV compression, or a LateKV
        print(f"[{name}] tokens in the KV cache per layer: {' '.join(map(str, held))}")
    print(
        f"[{name}] mean alive {row['mean_alive']:.1%} of {n} | first token {row['first_token_s'] * 1000:.0f} ms"
        f" | {row['tokens_per_s']:.1f} tokens/s | KV {row['kv_bytes'] / 2**20:.2f} MiB\n",
        flush=True,
    )
    return row | {"alive": " ".join(map(str, alive)), "held": " ".join(map(str, held))}


def main():
    config = cli.parse(SampleConfig, __doc__)
    cli.at_least(1, config, "max_new_tokens")
    if config.adaptive and (config.keep or config.dense):
        raise ValueError(
            "--adaptive: the heads have a threshold for their own schedule alone, leave out --keep and --dense"
        )
    kv = compression(config)
    text = prompt_text(config)
    model, folder = cli.load_model(config)
    tokenizer = Tokenizer(folder)
    if config.chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    ids, rows = torch.tensor(tokenizer.encode(text), dtype=torch.long, device=config.device), []
    prefill(model, ids[:64])  # warm-up: the first call is slow whatever it does
    if config.dense or config.compare:
        rows.append(run(model, tokenizer, ids, config, kv=kv))
    if not config.dense:
        heads, schedule = cli.heads_and_schedule(config, model)
        if config.keep:
            schedule = schedule.with_ratio(config.keep)
        if config.adaptive:
            if not schedule.threshold:
                raise ValueError(
                    "--adaptive: these heads have no threshold; train.py gives them one with --level_weight"
                )
            schedule = schedule.as_adaptive()
        rows.append(run(model, tokenizer, ids, config, heads, schedule, kv))
    cli.write_rows(config.json, rows, seed=config.seed)


if __name__ == "__main__":
    cli.run(main)
