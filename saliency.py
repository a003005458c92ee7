"""The teacher: how much each prompt token matters at the input of each layer (paper eq. 3).

One dense forward and one backward give the labels of all layers at once. Nothing is trained here.

    python saliency.py --prompt_file README.md    # figures 1 and 2, by the loss of all its tokens
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

import cli
import memory
import parallel
from data import prompt_text
from download import DEFAULT
from model import attention_weights
from sdtp import fingerprint, is_protected, write_atomic
from tokenizer import Tokenizer

TEACHERS = ("grad_x_input", "grad_norm", "attention_entropy")
OVER = ("response", "all")


def label(model, ids, n, layers, teacher="grad_x_input", over="response"):
    """Saliency of each token of a prompt at the input of each layer: {layer: (n,) float32, >= 0}.

    ids: (T,) the prompt's n tokens, then its response; layers: the layers to label. The loss L
    (the paper's T), of the dense model, is the sum of the cross-entropies, in nats, of the
    response's tokens or, over "all", of all tokens but the first.

    grad_x_input       |sum_d dL/dx_d * x_d|: eq. 3, which is by how much the loss would change to
                       first order without the token; we take its size, as up or down it matters
    grad_norm          (sum_d (dL/dx_d)^2)^(1/2)
    attention_entropy  see entropy_label(); needs no loss and no backward

    ValueError for another teacher or loss, or where there is no token to predict.
    """
    if teacher not in TEACHERS or over not in OVER:
        raise ValueError(f"teacher {teacher!r} over {over!r}: choose {TEACHERS} over {OVER}")
    if teacher == "attention_entropy":
        return entropy_label(model, ids, n, layers)
    first = n if over == "response" else 1  # of the tokens that are predicted
    if len(ids) <= first:
        raise ValueError("nothing to label by: no token to predict")
    with torch.enable_grad():
        states, x = dense_states(model, ids, layers, gradients=True)
        logits = model.logits(x[first - 1 : -1]).float()
        loss = F.cross_entropy(logits, ids[first:], reduction="sum")
        gradients = torch.autograd.grad(loss, list(states.values()))
    labels = {}
    for (layer, x), gradient in zip(states.items(), gradients):
        x, gradient = x.detach()[:n].float(), gradient[:n].float()
        products = (gradient * x).sum(-1).abs()  # eq. 3
        labels[layer] = gradient.norm(dim=-1) if teacher == "grad_norm" else products
    return labels


def identity(model):
    """All of a model that a stored result depends on, for JSON."""
    return [fingerprint(model), asdict(model.config), str(model.dtype)]


def stored_label(model, example, layers, config, folder):
    """label() of an Example over the largest of its free tokens, {layer: (n,)}, kept in a folder.

    Protected tokens may be larger: the first, to which all attend, often is by far.
    config: has teacher and over; a prompt is labelled once. ValueError for a damaged file.
    """
    what = [*identity(model), example, config.teacher, config.over, sorted(layers)]
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
    path, n = Path(folder) / f"{name}.safetensors", len(example.prompt)
    if not path.is_file():
        ids = torch.tensor(example.prompt + example.response, device=model.device)
        labels = label(model, ids, n, layers, config.teacher, config.over)
        free = ~is_protected(torch.arange(n, device=model.device), n)
        tensors = {}
        for layer, s in labels.items():
            tensors[str(layer)] = (s / s[free].max().clamp(min=1e-30)).cpu()
            if not s.isfinite().all():
                raise ValueError(f"layer {layer}: labels are not finite; try --dtype float32")
        write_atomic(path, safetensors.torch.save(tensors))
    try:
        tensors = safetensors.torch.load_file(path, device=str(model.device))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from None
    return {layer: tensors[str(layer)] for layer in layers}


def dense_states(model, ids, layers, gradients=False):
    """Dense forward: ({layer: input of that block (T, hidden_size)}, the last block's output).

    gradients: the graph starts at the first of the layers: nothing before it needs one.
    """
    x, positions, states = model.embed(ids), model.positions([len(ids)]), {}
    recompute = gradients and memory.must_recompute(model, len(ids))
    for layer, block in enumerate(model.layers):
        if layer in layers:
            if gradients and not states:
                x = x.detach().requires_grad_()
            states[layer] = x
        run = partial(checkpoint, block, use_reentrant=False) if recompute and states else block
        x = run(x, positions, [len(ids)])
    return states, x


@torch.no_grad()
def entropy_label(model, ids, n, layers, rows=256):
    """1 - H_i / log(tokens that i sees), mean over attention heads; H_i: entropy of i's attention.

    A token that looks somewhere in particular matters. One that sees only itself has entropy 0.
    ids, n, layers, and what is returned: as in label(). rows: of the attention map that are held.
    """
    states, _ = dense_states(model, ids[:n], layers)
    positions, labels = model.positions([n]), {}
    for layer, x in states.items():
        block, parts = model.layers[layer], []
        attention, x = block.self_attn, block.input_layernorm(x)
        q, (k, _) = attention.q(x, positions), attention.kv(x, positions)
        for q_rows, p in zip(q.split(rows), positions.split(rows)):
            weights = attention_weights(q_rows, k, p, positions, attention.extras)  # (Hq, rows, n)
            visible = (p + 1).clamp(max=attention.extras.window or n)
            entropy = parallel.over_heads(torch.special.entr(weights).sum(-1).mean(0))
            entropy = entropy / visible.clamp(min=2).log()
            parts.append((1 - entropy).clamp(min=0).float())  # rounding may leave it a hair below
        labels[layer] = torch.cat(parts)
    return labels


# ---------------------------------------------------------------------------- figures 1 and 2


@dataclass
class SaliencyConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    prompt: str = ""  # the text to label
    prompt_file: str = ""  # or a file that holds it
    max_tokens: int = 512  # tokens of it that are read
    teacher: str = "grad_x_input"  # grad_x_input, grad_norm or attention_entropy
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    out_dir: str = "out/saliency"  # where the figures go
    json: str = ""  # file for the share of salient tokens per layer


def sparsity(saliency):
    """Share of the tokens whose saliency is above 10 % of the largest: paper figure 2."""
    return (saliency > 0.1 * saliency.max()).float().mean().item()


def draw_heat_map(labels, texts, path, width=48):
    """Paper figure 1: layers x tokens, each layer over its maximum; lines of `width` tokens."""
    import matplotlib.pyplot as plt

    parts = [s / s.max().clamp(min=1e-30) for s in labels.values()]
    saliency, starts = torch.stack(parts).sqrt().cpu().numpy(), range(0, len(texts), width)
    size = (16, 0.9 + len(starts) * (1.2 + 0.13 * len(labels)))
    figure, axes = plt.subplots(len(starts), figsize=size, squeeze=False, layout="constrained")
    for axis, start in zip(axes[:, 0], starts):
        image = axis.imshow(saliency[:, start : start + width], aspect="auto", vmin=0, vmax=1)
        shown = [t.replace("$", r"\$").replace("\n", "\\n") for t in texts[start : start + width]]
        axis.set_xticks(range(len(shown)), [t[:14] for t in shown], rotation=90, fontsize=7)
        axis.set(xlim=(-0.5, width - 0.5), ylabel="layer")
    figure.colorbar(image, ax=axes, label="square root of saliency / layer's maximum", shrink=0.5)
    cli.save_figure(figure, path)


def main():
    config = cli.parse(SaliencyConfig, __doc__)
    cli.at_least(1, config, "max_tokens")
    text, (model, folder) = prompt_text(config), cli.load_model(config)
    tokenizer = Tokenizer(folder)
    ids = torch.tensor(tokenizer.encode(text)[: config.max_tokens], device=config.device)
    labels = label(model, ids, len(ids), range(len(model.layers)), config.teacher, over="all")
    rows = [{"layer": layer, "share": sparsity(s)} for layer, s in labels.items()]
    what, out = "share of tokens above 10 % of the maximum", Path(config.out_dir)
    cli.print_table(rows, {"layer": "{layer}", what: "{share:.1%}"})
    draw_heat_map(labels, tokenizer.token_texts(ids.tolist()), out / "heat_map.png")
    curve = {config.teacher: [(r["layer"], r["share"], r["share"], r["share"]) for r in rows]}
    cli.draw_lines(curve, out / "sparsity.png", xlabel="layer", ylabel=what)
    print(f"figures in {out}/")
    cli.write_rows(config.json, rows)


if __name__ == "__main__":
    cli.run(main)
