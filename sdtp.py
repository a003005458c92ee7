"""Saliency-driven Dynamic Token Pruning (Tao et al. 2025, arXiv 2504.04514): the method.

While a frozen LLM reads a prompt, tiny heads score the tokens at a few layers (the stages), the lowest
are dropped, and every later layer runs on fewer tokens. `prefill` below is the whole of it.

    heads, schedule, span, _ = load_heads("heads/smollm2-135m-q4", model)
    logits, cache = prefill(model, torch.tensor(ids), heads, schedule, span=span)
    cache.alive  # tokens alive, [layer][prompt]

A token is alive until a stage drops it. Protected tokens are never dropped: the first 4 of a prompt and
its last 10 %. A schedule is a dict {layer: share of the prompt alive from that layer on}.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from model import KVCache, read_json

FIRST_TOKENS, LAST_SHARE = 4, 0.1  # of a prompt, always kept
HEADS_FORMAT = 2  # of heads.json


# ---------------------------------------------------------------------------- how many, and where


def keep_count(n, share, protected=0):
    """Tokens kept of a prompt of n: n * share rounded half up, at least `protected`, at least 1."""
    return min(n, max(protected, math.floor(n * share + 0.5), 1))


def protected_count(n):
    """How many tokens of a prompt of n are always kept."""
    return min(n, FIRST_TOKENS + keep_count(n, LAST_SHARE))


def is_protected(positions, n):
    """(T,) bool: which positions of a prompt of n tokens are always kept."""
    return (positions < FIRST_TOKENS) | (positions >= n - keep_count(n, LAST_SHARE))


def alive_count(n, share):
    """Tokens of a prompt of n alive after a stage with that share; the protected ones at least."""
    return keep_count(n, share, protected_count(n))


def paper_schedule(num_hidden_layers, ratio=0.9, first_layer=4, step=3, stages=10):
    """The paper's: stages at layers 4, 7, 10, ..., at most 10; after stage s a share ratio**s is alive.

    Layers count from 0, and a stage at layer l drops before block l runs. ValueError where none fits.
    """
    layers = range(first_layer, num_hidden_layers, step)[:stages]
    if not layers:
        raise ValueError(
            f"no stage fits: the first would be at layer {first_layer}, and the model has "
            f"{num_hidden_layers} layers; train heads with another --first_layer"
        )
    return {layer: ratio ** (s + 1) for s, layer in enumerate(layers)}


def check_schedule(schedule, heads, num_hidden_layers):
    """ValueError for a layer outside the model, a share out of [0, 1] or above the one before, a stage
    without a head, or heads without a stage."""
    before = 1.0
    for layer, share in sorted(schedule.items()):
        if not 0 <= layer < num_hidden_layers:
            last = num_hidden_layers - 1
            raise ValueError(f"a stage at layer {layer}: the model has layers 0 to {last}")
        if not 0 <= share <= before:
            raise ValueError(f"share {share} at layer {layer}: it must lie between 0 and {before}")
        if share and layer not in heads:
            raise ValueError(f"no head for the stage at layer {layer}")
        before = share
    if heads and not schedule:
        raise ValueError("heads without a schedule would drop nothing")


# ---------------------------------------------------------------------------- which


def span_means(scores, positions, free, span):
    """Each token's score becomes the mean over the free tokens of its span that have a row here.

    scores, positions, free: (T,) of one prompt; span i holds positions span * i to span * (i + 1) - 1.
    """
    last = positions[-1] // span + 1  # one bin more, for those that are not free
    bins = (positions // span).where(free, last)
    both = torch.stack((scores, torch.ones_like(scores)))
    sums = scores.new_zeros(2, int(last) + 1).index_add(1, bins, both)
    return (sums[0] / sums[1])[bins]


def select(scores, positions, share, seqlens, prompt_lens, span=1):
    """The rows to keep at a stage: the protected, then the highest scores; ties go to the later token.

    scores: (T,) float32; positions: (T,); share: of each prompt; seqlens: rows alive per prompt;
    prompt_lens: tokens of each prompt, dropped ones included. span (not the paper's): neighbouring
    tokens are kept or dropped together, by the mean score of those that are not protected; of the last
    span as many tokens as the count allows, the later ones.

    Returns ((K,) ascending row indices, rows kept per prompt).
    """
    keep, kept, start = [], [], 0
    parts = zip(scores.split(seqlens), positions.split(seqlens), prompt_lens)
    for score, here, n in parts:
        free, count = ~is_protected(here, n), min(len(here), alive_count(n, share))
        if span > 1:
            score = span_means(score, here, free, span)
        # the protected: nothing else is infinite, and NaN comes last
        ranked = score.nan_to_num(nan=-math.inf).masked_fill(~free, math.inf)
        # reversed, as a stable sort keeps the order of equal scores: the later comes first
        order = ranked.flip(0).argsort(descending=True, stable=True)[:count]
        keep.append((start + len(here) - 1 - order).sort().values)
        kept.append(count)
        start += len(here)
    return torch.cat(keep), kept


class PruneHead(nn.Module):
    """Paper eq. 1: pi = Linear(d/4 -> 2)(GELU(Linear(d -> d/4)(x))), logits of keep and of drop.

    divisor: the hidden layer has hidden_size / divisor units (the paper: 4).
    """

    def __init__(self, hidden_size, divisor=4):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden_size // divisor)
        self.fc2 = nn.Linear(hidden_size // divisor, 2)

    def logits(self, x, positions=None, seqlens=None, block=None):
        """x: (T, hidden_size) -> pi: (T, 2) float32. The large product runs in x's dtype."""
        hidden = F.linear(x, self.fc1.weight.to(x.dtype), self.fc1.bias.to(x.dtype))
        return self.fc2(F.gelu(hidden.float()))

    def forward(self, x, positions=None, seqlens=None, block=None):
        """The call of every scorer: x: (T, hidden_size), the input of `block` -> (T,) float32.

        positions: (T,) and seqlens: rows of each of the packed prompts, for scorers that need them.
        """
        keep, drop = self.logits(x, positions, seqlens, block).unbind(-1)
        return keep - drop


# ---------------------------------------------------------------------------- prefill and generate


@torch.no_grad()
def prefill(model, ids, heads=None, schedule=None, seqlens=None, cache=None, span=1):
    """Read prompts, dropping tokens on the way.

    ids: (T,) token ids of one or more packed prompts, seqlens: tokens of each (default: one prompt);
    heads: {layer: PruneHead, or any scorer with its call}; schedule: {layer: share}, None or {} for
    dense; cache: an empty KVCache to fill; span: see select().

    Returns (logits of each prompt's last token (B, vocab_size), cache). cache.alive: the tokens alive,
    [layer][prompt]. ValueError for a cache in use, a bad schedule, or a stage without a scorer (a
    share of 0 needs none: the protected tokens alone go on).
    """
    heads, schedule = heads or {}, schedule or {}
    seqlens = prompt_lens = [len(ids)] if seqlens is None else list(seqlens)
    cache = KVCache(len(model.layers)) if cache is None else cache
    check_schedule(schedule, heads, len(model.layers))
    if cache[0].seqlens:
        raise ValueError("prefill needs an empty cache")
    x, positions = model.embed(ids), model.positions(seqlens)
    for layer, block in enumerate(model.layers):
        if layer in schedule:
            score = positions.float()  # at a share of 0 the protected alone are kept, by any score
            if schedule[layer]:
                score = heads[layer](x, positions, seqlens, block)
            keep, seqlens = select(score, positions, schedule[layer], seqlens, prompt_lens, span)
            x, positions = x[keep], positions[keep]  # in order, at their own positions
        x = block(x, positions, seqlens, cache[layer])
        cache.alive.append(seqlens)
    last = torch.tensor(seqlens, device=x.device).cumsum(0) - 1
    return model.logits(x[last]), cache


def pruned(heads=None, schedule=None, span=1):
    """A prefill as a method: a function method(model, ids, seqlens, cache) -> logits (B, vocab_size)."""

    def method(model, ids, seqlens, cache):
        return prefill(model, ids, heads, schedule, seqlens, cache, span)[0]

    return method


dense = pruned()


def sample_token(logits, temperature=0.0, top_p=1.0, generator=None):
    """logits: (B, vocab_size) -> (B,) token ids: greedy at temperature 0, else of the top_p nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits.float() / temperature).softmax(-1).sort(descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # the first always stays
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(-1)


@torch.no_grad()
def generate(
    model,
    ids,
    max_new_tokens,
    method=dense,
    *,
    seqlens=None,
    cache=None,
    temperature=0.0,
    top_p=1.0,
    eos_token_ids=(),
    min_new_tokens=0,
    generator=None,
    on_token=None,
):
    """Prefill by a method, then decode from the true position (not from the number of tokens kept).

    ids: (T,) of one or more packed prompts, seqlens: tokens of each; cache: an empty KVCache, to look
    at afterwards; min_new_tokens: of which none is an end-of-sequence token; on_token: called with the
    list of the B new ids after every step. Returns one list of new ids per prompt, ended by (and with)
    an end-of-sequence token. ValueError where prompt and new tokens exceed the model's positions, and
    for a temperature or top_p out of range.
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature} must be a number of at least 0, top_p {top_p} lie in (0, 1]"
        )
    seqlens = [len(ids)] if seqlens is None else list(seqlens)
    limit, longest = model.config.max_position_embeddings, max(seqlens)
    if longest + max_new_tokens > limit:
        asked = f"a prompt of {longest} tokens and {max_new_tokens} new ones"
        raise ValueError(f"{asked} are beyond the model's {limit} positions")
    cache = KVCache(len(model.layers), extra=max_new_tokens) if cache is None else cache
    logits = method(model, ids, seqlens, cache)
    positions = cache.next_positions()
    outputs, done = [[] for _ in seqlens], [False] * len(seqlens)
    for step in range(max_new_tokens):
        if step < min_new_tokens:
            logits[:, list(eos_token_ids)] = -torch.inf
        token = sample_token(logits, temperature, top_p, generator)
        for i, t in enumerate(token.tolist()):
            if not done[i]:
                outputs[i].append(t)
                done[i] = t in eos_token_ids
        if on_token:
            on_token(token.tolist())
        if all(done) or step + 1 == max_new_tokens:
            break
        logits = model(token, positions + step, [1] * len(seqlens), cache)
    return outputs


# ---------------------------------------------------------------------------- saving and loading


def fingerprint(model):
    """A checkpoint's identity, the same in float32 or bfloat16: SHA-256 over samples of all weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 1024) | 1].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_atomic(path, data):
    """Write bytes so that a reader, or a crash, sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_heads(folder, heads, model, schedule, span=1, **info):
    """Write heads.safetensors and heads.json: schedule, span, the checkpoint's fingerprint, and info.

    heads: {layer: head of one class}.
    """
    tensors = {}
    for layer, head in heads.items():
        for name, p in head.state_dict().items():
            tensors[f"{layer}.{name}"] = p.detach().cpu().contiguous()
    data = safetensors.torch.save(tensors)
    meta = {
        "format": HEADS_FORMAT,
        "head": type(next(iter(heads.values()))).__name__,
        "fingerprint": fingerprint(model),
        "sha256": hashlib.sha256(data).hexdigest(),
        "schedule": {str(layer): share for layer, share in schedule.items()},
        "span": span,
        **info,
    }
    write_atomic(Path(folder) / "heads.safetensors", data)
    write_atomic(Path(folder) / "heads.json", (json.dumps(meta, indent=2) + "\n").encode())


def load_heads(folder, model, head=PruneHead):
    """Returns ({layer: head}, schedule, span, dict of heads.json), on the model's device.

    head: the class, made as head(hidden_size). FileNotFoundError for a missing file; ValueError for a
    damaged one, another format, another class of heads, or heads of another checkpoint.
    """
    folder = Path(folder)
    meta = read_json(folder / "heads.json")
    if meta.get("format") != HEADS_FORMAT:
        raise ValueError(f"{folder}: heads of an older version, which commit 418cf82 runs")
    if meta.get("fingerprint") != fingerprint(model):
        ckpt = meta.get("ckpt", "unnamed")
        raise ValueError(
            f"{folder}: heads of another checkpoint ({ckpt}); train.py trains your own"
        )
    if meta.get("head") != head.__name__:
        raise ValueError(f"{folder}: heads of class {meta.get('head')}, not {head.__name__}")
    data = (folder / "heads.safetensors").read_bytes()  # a missing file is named by its own error
    try:
        if hashlib.sha256(data).hexdigest() != meta["sha256"]:
            raise ValueError("heads.safetensors is not the file that heads.json was written with")
        schedule = {int(layer): float(share) for layer, share in meta["schedule"].items()}
        span, tensors, heads = int(meta["span"]), safetensors.torch.load(data), {}
        for layer in (layer for layer, share in schedule.items() if share):
            heads[layer] = head(model.config.hidden_size).requires_grad_(False)
            names = heads[layer].state_dict()
            heads[layer].load_state_dict({name: tensors.pop(f"{layer}.{name}") for name in names})
            heads[layer].to(model.device)
        check_schedule(schedule, heads, len(model.layers))
    except (
        SafetensorError,
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        error = " ".join(str(error).split())
        raise ValueError(f"{folder}: damaged, or its files do not fit: {error}") from None
    return heads, schedule, span, meta
