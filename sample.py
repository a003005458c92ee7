"""Generate from a prompt, with tokens dropped on the way; compare with dense; see what was dropped.

python sample.py --prompt "The capital of France is"
python sample.py --prompt_file sdtp.py --compare                # dense, then pruned
python sample.py --prompt_file sdtp.py --picture dropped.png    # where each token was dropped
python sample.py --prompt_file sdtp.py --kv h2o                 # then 40 % of the KV cache is kept
"""

from dataclasses import dataclass

import torch

import cli
import flops
from data import prompt_text
from download import DEFAULT
from kv import KINDS, compressed
from model import KVCache
from sdtp import dense, generate, prefill, protected_count, pruned
from tokenizer import Tokenizer

KV_KEEP = 0.4  # of the prompt's keys and values, the paper's


@dataclass
class SampleConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT)
    prompt: str = ""  # the prompt
    prompt_file: str = ""  # or a file that holds it
    chat: bool = False  # wrap the prompt in the checkpoint's chat template
    keep: float = 0.0  # compute of the paper's stages at this ratio (0: the heads' own schedule)
    dense: bool = False  # drop nothing
    compare: bool = False  # first dense, then pruned
    kv: str = ""  # h2o or snapkv: keep 40 % of the prompt's keys and values after the prefill
    picture: str = ""  # .png file: the prompt, coloured by the layer where each token was dropped
    max_new_tokens: int = 100  # at most
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of sampling
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the figures


def check(config):
    """ValueError for a flag out of range or without effect."""
    cli.at_least(1, config, "max_new_tokens")
    cli.at_least(0, config, "temperature")
    cli.one_of(config, kv=("", *KINDS))
    if not 0 <= config.keep <= 1:
        raise ValueError(f"--keep {config.keep}: a number of at most 1 is needed")
    for flag in ("heads", "keep", "compare", "picture"):
        if config.dense and getattr(config, flag):
            raise ValueError(f"--{flag} has no effect with --dense")
    if config.kv and config.picture:
        raise ValueError("--picture: not with --kv, by which each head keeps other tokens")
    if "seed" in config.given and not config.temperature:
        raise ValueError("--seed has no effect without --temperature")


def run(model, tokenizer, ids, config, name, method, heads):
    """Generate once and show it as it comes; returns (row of what it cost, the KVCache)."""
    if config.kv:
        name, method = f"{name}+{config.kv}", compressed(method, config.kv, KV_KEEP)
    cache = KVCache(len(model.layers), extra=config.max_new_tokens)
    new, times, shown = [], [], ""
    start = cli.clock(model)

    def stream(tokens):
        nonlocal shown
        times.append(cli.clock(model) - start)
        new.append(tokens[0])
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text

    generator = torch.Generator(config.device).manual_seed(config.seed)
    sampling = dict(temperature=config.temperature, generator=generator)
    how = dict(eos_token_ids=tokenizer.eos_token_ids, on_token=stream, **sampling)
    generate(model, ids, config.max_new_tokens, method, cache=cache, **how)
    print(tokenizer.decode(new)[len(shown) :])
    return cost(name, model.config, cache, len(ids), heads, times), cache


def cost(name, config, cache, n, heads, times):
    """Print and return what a prompt of n tokens cost; times: seconds until each new token."""
    alive = [counts[0] for counts in cache.alive]
    # compressed, the cache no longer says who was alive, and no layer has a window
    kept = alive if cache.extra_flops else prompt_positions(cache, n)
    executed = sum(flops.executed_flops(config, n, kept, heads)) + cache.extra_flops
    seconds = times[-1] - times[0]
    row = {
        "method": name,
        "prompt_tokens": n,
        "mean_alive": sum(alive) / len(alive) / n,
        "flops_share": executed / sum(flops.executed_flops(config, n, [n] * len(alive))),
        "first_token_s": times[0],
        "tokens_per_s": (len(times) - 1) / seconds if seconds else 0.0,
        "kv_bytes": cache.nbytes(),
        "alive": " ".join(map(str, alive)),
        "held": " ".join(str(held[0] - len(times) + 1) for held in cache.seqlens()),
    }
    floor = " (at the end the protected alone)" if alive[-1] == protected_count(n) < n else ""
    print(f"\n[{name}] tokens alive per layer: {row['alive']}{floor}")
    if row["held"] != row["alive"]:
        print(f"[{name}] tokens in the KV cache per layer: {row['held']}")
    print(
        f"[{name}] mean alive {row['mean_alive']:.1%} of {n} | FLOPs {row['flops_share']:.1%} of "
        f"dense | first token {1000 * times[0]:.0f} ms | {row['tokens_per_s']:.1f} tokens/s | "
        f"KV {row['kv_bytes'] / 2**20:.2f} MiB\n",
        flush=True,
    )
    return row


def prompt_positions(cache, n):
    """The positions of the prompt's tokens alive at each layer, from a cache of one prompt of n."""
    found = [cache[layer].rows()[2] for layer in range(len(cache.layers))]
    return [positions[positions < n] for positions in found]


def draw_dropped(texts, alive, path):
    """Write a picture of the prompt, each token coloured by the layer before which it was dropped.

    texts: of the tokens; alive: their positions at each layer, as prompt_positions() gives them.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    layers = torch.zeros(len(texts), dtype=torch.long)  # dropped at layer 7: alive at seven layers
    for positions in alive:
        layers[positions.cpu()] += 1
    stages = sorted({*layers.tolist(), len(alive)})
    shades = plt.get_cmap("YlOrRd")(torch.linspace(0.65, 0.05, len(stages) - 1).tolist())
    colors = dict(zip(stages, [*shades, "white"]))

    figure = plt.figure()
    axis = figure.add_axes((0, 0, 1, 1))
    for layer, color in colors.items():
        fate = "alive" if layer == len(alive) else f"dropped at layer {layer}"
        label = f"{fate}: {int((layers == layer).sum())}"
        axis.add_patch(Rectangle((0, 0), 0, 0, facecolor=color, edgecolor="black", label=label))
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0), ncols=4)
    columns, x, y = 110, 0, 0
    for text, layer in zip(texts, layers.tolist()):
        for i, line in enumerate(text.replace("\n", " \n").split("\n")):
            if i or x + len(line) > columns:
                x, y = 0, y + 1
            line = "".join(c if c.isprintable() else " " for c in line)
            axis.add_patch(Rectangle((x, y), len(line), 1, color=colors[layer], linewidth=0))
            axis.text(x, y + 0.7, line, family="monospace", fontsize=8, parse_math=False)
            x += len(line)
    axis.set(xlim=(0, columns), ylim=(y + 1, 0))
    axis.axis("off")
    figure.set_size_inches(columns * 0.067, (y + 1) * 0.16)  # of a character of 8 points
    cli.save_figure(figure, path)


def main():
    config = cli.parse(SampleConfig, __doc__)
    check(config)
    text = prompt_text(config)
    model, folder = cli.load_model(config)
    tokenizer = Tokenizer(folder)
    if config.chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.long, device=config.device)
    methods = ["dense"] * (config.dense or config.compare) + ["sdtp"] * (not config.dense)
    (heads, schedule, span), *more = cli.given_stages(config, model, methods).values()
    if more:
        raise ValueError(f"--heads {config.heads}: one folder is needed")
    if config.keep:
        schedule = flops.at_keep(model.config, schedule, config.keep, len(ids))
    prefill(model, ids[:64], heads, schedule, span=span)  # warm-up: first calls are slow
    rows = []
    for name in methods:
        method = dense if name == "dense" else pruned(heads, schedule, span)
        used = None if name == "dense" else heads
        print(f"[{name}]\n" * config.compare, end="")
        row, cache = run(model, tokenizer, ids, config, name, method, used)
        rows.append(row)
    if config.picture:
        texts = tokenizer.token_texts(ids.tolist())
        draw_dropped(texts, prompt_positions(cache, len(ids)), config.picture)
    cli.write_rows(config.json, rows, seed=config.seed)


if __name__ == "__main__":
    cli.run(main)
