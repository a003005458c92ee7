"""The teacher: how much each prompt token matters at each layer, from one dense forward and, for some, one backward.

python saliency.py --prompt_file README.md      # heat map and sparsity curve (paper figures 1 and 2)
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import cli
from download import DEFAULT
from model import attend, attention_weights, by_sequence, visible

TEACHERS = ("grad_x_input", "grad_norm", "response_attention", "attention_entropy")
LABEL_LOSSES = "response", "all"
TEACHER, LABEL_LOSS = "response_attention", "response"  # the default of train.py and eval_tasks.py
LABELS = 3  # to be raised when what a teacher gives changes: in the keys of all that is cached


def scored_rows(seqlens, starts):
    """Rows whose next token is scored: those that predict token starts[i] and all later ones of sequence i.

    Rows index the packed sequences; the target of row r is ids[r + 1]. Returns (R,) int64.
    """
    ends = torch.tensor(seqlens).cumsum(0).tolist()
    return torch.cat([torch.arange(e - n + s - 1, e - 1) for e, n, s in zip(ends, seqlens, starts)])


def label(model, ids, layers, teacher=TEACHER, seqlens=None, prompt_lens=None, checkpoint_blocks=False):
    """Saliency of every token at the input of each layer: {layer: (T,) float32, at least 0}.

    ids: (T,) one or more packed sequences of a prompt and a response; seqlens: tokens of each;
    prompt_lens: prompt tokens of each, to score the response only, or None to score all next tokens;
    checkpoint_blocks: recompute each block in the backward pass instead of keeping what it needs.
    The loss T is the sum of cross-entropies in nats (a factor per sequence does not change a ranking).

    grad_x_input       |sum_d dT/dx_d * x_d|       paper eq. 3, with the absolute value
    grad_norm          (sum_d (dT/dx_d)^2)^(1/2)
    response_attention how much the response reads of a token: the scored rows' attention to it times its value's norm,
                       the largest head's, mean over the layers of READING from that layer on (a layer behind READING:
                       its own alone). Value norms: Kobayashi et al. 2020; tokens attended to for want of another have
                       small ones. No backward pass, and no gradient, which would vanish where copying goes well.
    attention_entropy  1 - mean over heads of H_i / log(visible tokens of i), H_i the entropy of token
                       i's attention at that layer: a token that looks somewhere in particular matters.
                       A token that sees only itself has entropy 0. Needs no loss.
    ValueError for an unknown teacher.
    """
    return mark(model, ids, layers, teacher, seqlens, prompt_lens, checkpoint_blocks)[0]


def mark(
    model, ids, layers, teacher=TEACHER, seqlens=None, prompt_lens=None, checkpoint_blocks=False,
    noisy_copies=0, noise=None,
):  # fmt: skip
    """label(), and the states that it labels: ({layer: (T,)}, {layer: (T, hidden_size)}).

    noisy_copies: labels are the mean over so many passes with noise on the embeddings (SmoothGrad, Smilkov et al.
    2017), the states those without; noise: the torch.Generator of one such pass.
    """
    if teacher not in TEACHERS:
        raise ValueError(f"unknown teacher {teacher!r} (known: {', '.join(TEACHERS)})")
    seqlens = [len(ids)] if seqlens is None else seqlens
    if noisy_copies:  # a generator of its own: what a run draws must not depend on what its label cache holds
        noise, how = torch.Generator().manual_seed(0), (teacher, seqlens, prompt_lens, checkpoint_blocks)
        copies = [mark(model, ids, layers, *how, noise=noise)[0] for _ in range(noisy_copies)]
        with torch.no_grad():
            states, _ = hidden_states(model, ids, layers, seqlens)
        labels = {layer: torch.stack([c[layer] for c in copies]).mean(0) for layer in states}
    elif teacher == "attention_entropy":
        labels, states = entropy_labels(model, ids, layers, seqlens, noise)
    elif teacher == "response_attention":
        labels, states = response_labels(model, ids, layers, seqlens, prompt_lens, noise)
    else:
        labels, states = gradient_labels(model, ids, layers, teacher, seqlens, prompt_lens, checkpoint_blocks, noise)
    return labels, {layer: x.detach() for layer, x in states.items()}


def gradient_labels(model, ids, layers, teacher, seqlens, prompt_lens=None, checkpoint_blocks=False, noise=None):
    """grad_x_input and grad_norm of mark(), ({layer: (T,)}, {layer: (T, hidden_size)}); prompt_lens None: of all next tokens."""
    with torch.enable_grad():
        states, last = hidden_states(model, ids, layers, seqlens, checkpoint_blocks, noise)
        rows = scored_rows(seqlens, [1] * len(seqlens) if prompt_lens is None else prompt_lens)
        loss = F.cross_entropy(model.logits(last[rows]).float(), ids[rows + 1], reduction="sum")
        gradients = torch.autograd.grad(loss, list(states.values()))
    wide = torch.float64 if last.dtype == torch.float64 else torch.float32
    labels = {}
    for (layer, x), gradient in zip(states.items(), gradients):
        x, gradient = x.detach().to(wide), gradient.to(wide)
        labels[layer] = gradient.norm(dim=-1) if teacher == "grad_norm" else (gradient * x).sum(-1).abs()
    return labels, states


# Of noisy copies, in standard deviations of the embeddings. One copy's labels rank the tokens of a prompt of 512 as those
# without noise do with rho 0.98 at 0.2, 0.90 at 0.5 and 0.47 at 1.0, where it is hardly the same text.
NOISE = 0.5


def hidden_states(model, ids, layers, seqlens, checkpoint_blocks=False, noise=None, attend=None, depth=None):
    """Dense forward; returns ({layer: input of that block, (T, hidden_size)}, output of the last block that ran).

    The graph starts at the first of the layers: no gradient is needed before it, nor of any parameter.
    noise: a torch.Generator of Gaussian noise on the embeddings; depth: only so many blocks run.
    """
    x, positions, states = model.embed(ids), model.positions(seqlens), {}
    if noise:
        x = x + NOISE * x.std() * torch.randn(x.shape, generator=noise).to(x)
    for layer, block in enumerate(model.layers[:depth]):
        if layer in layers:
            states[layer] = x = x if states else x.detach().requires_grad_()
        run = partial(checkpoint, block, use_reentrant=False) if checkpoint_blocks and states else block
        x = run(x, positions, seqlens, attend=attend or attend_by_weights)
    return states, x


def attend_by_weights(q, k, v, positions, k_positions, seqlens, k_seqlens, window=None, longest=1024):
    """attend() with a fast backward pass on the CPU: two matrix products and a softmax in q's dtype.

    Forward and backward, SDPA takes twice as long at 300 tokens and as long at 1,024 (results/LOG.md, session 2), with
    gradients no closer to float64's. Batches with a longer sequence, CUDA, and layers without a gradient go to attend().
    """
    if q.is_cuda or not q.requires_grad or max(k_seqlens) > longest:
        return attend(q, k, v, positions, k_positions, seqlens, k_seqlens, window)
    out, kv_heads = [], k.shape[1]
    q = q.unflatten(1, (kv_heads, -1)) * q.shape[-1] ** -0.5
    for q, k, v, p, k_p in by_sequence(q, k, v, positions, k_positions, seqlens, k_seqlens):
        scores = q.permute(1, 2, 0, 3).flatten(1, 2) @ k.permute(1, 2, 0)  # (Hkv, G * T, K): keys are never repeated
        scores = scores.unflatten(1, (-1, len(q))).masked_fill(~visible(p, k_p, window), -torch.inf)
        mixed = scores.softmax(-1).flatten(1, 2) @ v.transpose(0, 1)
        out.append(mixed.unflatten(1, (-1, len(q))).permute(2, 0, 1, 3).flatten(1, 2))  # (T, Hq, D)
    return torch.cat(out)


# Of the layers, the part whose reading response_attention counts: from 5/6 on little is read, and early layers foretell
# less of what dropping a span costs (Spearman's rho on 160 prompts at shares of 0.786 and 0.55: layers 10 to 24 of 30
# 0.583 and 0.709, 0 to 24 0.567 and 0.708, all 0.550 and 0.679; results/LOG.md, session 10).
READING = 1 / 3, 5 / 6


@torch.no_grad()
def response_labels(model, ids, layers, seqlens, prompt_lens=None, noise=None, block=256):
    """response_attention of mark(), ({layer: (T,)}, {layer: (T, hidden_size)}), by blocks of query rows.

    prompt_lens None: attention from every row but the last. No block runs that no label reads.
    """
    starts, received = [1] * len(seqlens) if prompt_lens is None else prompt_lens, []
    first, end = (round(share * len(model.layers)) for share in READING)
    depth = max([end, *(layer + 1 for layer in layers)])

    def reading(q, k, v, positions, seqlens, window):
        parts, sizes = [], v.float().norm(dim=-1).repeat_interleave(q.shape[1] // v.shape[1], 1).T  # (Hq, T)
        each = zip(q.split(seqlens), k.split(seqlens), positions.split(seqlens), sizes.split(seqlens, 1), starts)
        for q_, k_, p, size, start in each:
            scoring = slice(start - 1, -1)  # the rows that predict a scored token
            rows = zip(q_[scoring].split(block), p[scoring].split(block))
            seen = sum(attention_weights(qs, k_, ps, p, window).sum(1) for qs, ps in rows)
            parts.append((seen * size).amax(0))
        return torch.cat(parts)

    def gather(q, k, v, positions, k_positions, seqlens, k_seqlens, window=None):
        counts = len(received) >= first  # in some label
        received.append(reading(q, k, v, positions, seqlens, window) if counts else None)
        return attend(q, k, v, positions, k_positions, seqlens, k_seqlens, window)

    states, _ = hidden_states(model, ids, layers, seqlens, noise=noise, attend=gather, depth=depth)
    labels = {layer: torch.stack(received[max(layer, first) : max(layer + 1, end)]).mean(0) for layer in states}
    return labels, states


@torch.no_grad()
def entropy_labels(model, ids, layers, seqlens, noise=None, block=256):
    """attention_entropy of mark(), by blocks of query rows: never a whole T x T map."""
    states, _ = hidden_states(model, ids, layers, seqlens, noise=noise)
    positions, labels = model.positions(seqlens), {}
    for layer, x in states.items():
        attention, parts = model.layers[layer].self_attn, []
        q_all, k_all, _ = attention.qkv(model.layers[layer].input_layernorm(x), positions)
        for q, k, p in zip(q_all.split(seqlens), k_all.split(seqlens), positions.split(seqlens)):
            for q_rows, p_rows in zip(q.split(block), p.split(block)):
                weights = attention_weights(q_rows, k, p_rows, p, attention.window)  # (Hq, rows, K)
                seen = (p_rows + 1).clamp(max=attention.window or len(p))  # visible tokens
                entropy = torch.special.entr(weights).sum(-1).mean(0) / seen.clamp(min=2).log()
                parts.append((1 - entropy).clamp(min=0))  # rounding may leave it a hair below
        labels[layer] = torch.cat(parts)
    return labels, states


# ---------------------------------------------------------------------------- figures 1 and 2


@dataclass
class SaliencyConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    prompt: str = ""  # the text to label
    prompt_file: str = ""  # or a file that holds it
    max_tokens: int = 512  # tokens of it that are read
    teacher: str = "grad_x_input"  # grad_x_input, grad_norm, response_attention or attention_entropy
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    out_dir: str = "out/saliency"  # where the figures go
    json: str = ""  # file for the share of salient tokens per layer


def sparsity(labels):
    """Share of tokens whose saliency exceeds 10 % of the layer's maximum (paper figure 2), per layer."""
    return [(s > 0.1 * s.max()).float().mean().item() for s in labels.values()]


def draw_heat_map(labels, texts, path, width=48):
    """Paper figure 1: layers x tokens, each layer over its maximum; the text wraps every `width` tokens."""
    import matplotlib.pyplot as plt

    saliency = torch.stack([s / s.max().clamp(min=1e-30) for s in labels.values()]).cpu()  # (L, T)
    panels = range(0, len(texts), width)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(16, 0.9 + len(panels) * (1.2 + 0.13 * len(labels))), squeeze=False
    )
    for axis, start in zip(axes[:, 0], panels):
        part = saliency[:, start : start + width]
        image = axis.imshow(
            part.sqrt(), aspect="auto", cmap="viridis", vmin=0, vmax=1, extent=(0, part.shape[1], len(labels), 0)
        )
        axis.set_xlim(0, width)
        shown = [t.replace("$", r"\$").replace("\n", "\\n")[:14] for t in texts[start : start + width]]
        axis.set_xticks([i + 0.5 for i in range(len(shown))], shown, rotation=90, fontsize=7)
        axis.set_yticks([0.5 + i for i in range(0, len(labels), 4)], list(labels)[::4], fontsize=7)
        axis.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="square root of saliency / layer's maximum", shrink=0.5)
    cli.save_figure(figure, path)


def draw_sparsity(labels, path):
    """Paper figure 2: the share of salient tokens against depth."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5))
    axis.plot(list(labels), sparsity(labels), marker=".")
    axis.set(xlabel="layer", ylabel="share of tokens above 10 % of the maximum", ylim=(0, None))
    axis.grid(alpha=0.3)
    cli.save_figure(figure, path)


def main():
    from data import prompt_text
    from tokenizer import Tokenizer

    config = cli.parse(SaliencyConfig, __doc__)
    text = prompt_text(config)
    model, folder = cli.load_model(config)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(text)[: config.max_tokens]
    if len(ids) < 2:
        raise ValueError(f"nothing to label: {len(ids)} tokens, at least two are needed")
    labels = label(model, torch.tensor(ids, device=config.device), range(len(model.layers)), config.teacher)
    out = Path(config.out_dir)
    draw_heat_map(labels, tokenizer.token_texts(ids), out / "heat_map.png")
    draw_sparsity(labels, out / "sparsity.png")
    rows = [{"layer": layer, "share": share} for layer, share in zip(labels, sparsity(labels))]
    for row in rows:
        print(f"layer {row['layer']:3d} | {row['share']:6.1%} of {len(ids)} tokens above 10 % of the maximum")
    print(f"figures in {out}/")
    cli.write_rows(config.json, rows, seed=None)  # nothing here is random


if __name__ == "__main__":
    cli.run(main)
