"""Saliency-driven Dynamic Token Pruning (Tao et al. 2025, arXiv 2504.04514): the method.

While a frozen LLM reads a prompt, tiny heads (here always pruning heads) score its tokens at a few
layers (the stages), the lowest are dropped, and every later layer runs on fewer tokens. `prefill`
is the whole of it.

    heads, schedule, span, _ = load_heads("heads/smollm2-135m-q4", model)
    logits, cache = prefill(model, torch.tensor(ids), heads, schedule, span=span)
    cache.alive  # tokens alive, [layer][prompt]

A token is alive until a stage drops it. The first 4 of a prompt and its last 10 % are protected,
never dropped; all others are free. A schedule is a dict {layer: share of the prompt alive from that
layer on}. Not the paper's: spans (see select), and shares of 0, where the protected alone go on.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import read_json
from model import KVCache

FIRST_TOKENS, LAST_SHARE = 4, 0.1  # of a prompt, protected
HEADS_FORMAT = 2  # of heads.json


def keep_count(n, share, protected=0):
    """Tokens kept of a prompt of n: n * share rounded half up, at least `protected`, at least 1."""
    return min(n, max(protected, math.floor(n * share + 0.5), 1))


def is_protected(positions, n):
    """(T,) bool: which positions of a prompt of n tokens are protected."""
    return (positions < FIRST_TOKENS) | (positions >= n - keep_count(n, LAST_SHARE))


def protected_count(n):
    """How many tokens of a prompt of n are protected."""
    return min(n, FIRST_TOKENS + keep_count(n, LAST_SHARE))


def alive_count(n, share):
    """Tokens of a prompt of n alive after a stage with that share, at least the protected ones."""
    return keep_count(n, share, protected_count(n))


def paper_schedule(num_hidden_layers, ratio=0.9, first_layer=4, step=3, stages=10):
    """The paper's: stages at layers 4, 7, 10, ..., at most 10; after stage s ratio**s is alive.

    Layers count from 0, a stage at layer l drops before block l runs. ValueError where none fits.
    """
    layers = range(first_layer, num_hidden_layers, step)[:stages]
    if not layers:
        model = f"a model of {num_hidden_layers} layers"
        raise ValueError(f"no stage fits {model}: lower --first_layer of train.py ({first_layer})")
    return {layer: ratio ** (s + 1) for s, layer in enumerate(layers)}


def check_schedule(schedule, heads, num_hidden_layers):
    """ValueError for stages that prefill cannot run, and for heads without any."""
    if heads and not schedule:
        raise ValueError("heads without a schedule would drop nothing")
    before = 1.0
    for layer, share in sorted(schedule.items()):
        if layer not in range(num_hidden_layers):
            raise ValueError(f"a stage at layer {layer} in a model of {num_hidden_layers} layers")
        if not 0 <= share <= before:
            raise ValueError(f"share {share} at layer {layer}: it must lie between 0 and {before}")
        if share and layer not in heads:
            raise ValueError(f"no head for the stage at layer {layer}")
        before = share


def select(scores, positions, share, seqlens, prompt_lens, span=1):
    """The rows to keep at a stage: the protected, then the highest scores; ties go to the later.

    scores: (T,) float32, NaN the lowest; positions: (T,); share: of each prompt; seqlens: rows of
    each; prompt_lens: tokens of each, dropped ones included. span: tokens of positions span * i to
    span * (i + 1) - 1 are kept or dropped together, by the mean score of those alive that are not
    protected; where the count ends within a span, its later tokens are kept.

    Returns ((K,) ascending row indices, rows kept per prompt).
    """
    keep, kept, start = [], [], 0
    parts = zip(scores.split(seqlens), positions.split(seqlens), prompt_lens)
    for score, here, n in parts:
        free, count = ~is_protected(here, n), min(len(here), alive_count(n, share))
        if span > 1:  # the mean over the free rows of each span; the protected have a bin more
            bins = (here // span).where(free, n // span + 1)
            both = torch.stack((score, torch.ones_like(score))).double()
            sums, counts = both.new_zeros(2, n // span + 2).index_add(1, bins, both)
            score = (sums / counts)[bins].float()  # alike whatever the order of the sums
        ranked = score.nan_to_num(nan=-math.inf).masked_fill(~free, math.inf)
        # reversed, as a stable sort keeps the order of equal scores: the later comes first
        order = ranked.flip(0).argsort(descending=True, stable=True)[:count]
        keep.append((start + len(here) - 1 - order).sort().values)
        kept.append(count)
        start += len(here)
    return torch.cat(keep), kept


class PruneHead(nn.Module):
    """Paper eq. 1; divisor: the hidden layer has hidden_size / divisor units (the paper: 4)."""

    def __init__(self, hidden_size, divisor=4):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden_size // divisor)
        self.fc2 = nn.Linear(hidden_size // divisor, 2)

    def logits(self, x, positions=None, seqlens=None, block=None):
        """x: (T, hidden_size) -> pi: (T, 2) float32, logits of keep and of drop."""
        hidden = F.linear(x, self.fc1.weight.to(x.dtype), self.fc1.bias.to(x.dtype))
        return self.fc2(F.gelu(hidden.float()))  # eq. 1

    def forward(self, x, positions=None, seqlens=None, block=None):
        """Every scorer's call: x: (T, hidden_size), input of `block` -> (T,), larger is kept."""
        keep, drop = self.logits(x, positions, seqlens, block).unbind(-1)
        return keep - drop


@torch.no_grad()
def prefill(model, ids, heads=None, schedule=None, seqlens=None, cache=None, span=1):
    """Read prompts, dropping tokens on the way.

    ids: (T,) token ids of one or more packed prompts; seqlens: tokens of each, None for one prompt;
    heads: {layer: PruneHead, or any scorer with its call}, one for each share above 0; schedule:
    None or {} for dense; cache: an empty KVCache to fill; span: see select.

    Returns (logits of each prompt's last token (B, vocab_size), cache); cache.alive has the tokens
    alive, [layer][prompt]. ValueError for a cache in use, or heads and schedule that do not fit.
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
            share = schedule[layer]  # at 0 the protected alone are kept, by any score
            score = heads[layer](x, positions, seqlens, block) if share else positions.float()
            keep, seqlens = select(score, positions, share, seqlens, prompt_lens, span)
            x, positions = x[keep], positions[keep]  # in order, at their own positions
        x = block(x, positions, seqlens, cache[layer])
        cache.alive.append(seqlens)
    last = torch.tensor(seqlens, device=x.device).cumsum(0) - 1
    return model.logits(x[last]), cache


def pruned(heads=None, schedule=None, span=1):
    """prefill as a method: method(model, ids, seqlens, cache) -> logits (B, vocab_size)."""

    def method(model, ids, seqlens, cache):
        return prefill(model, ids, heads, schedule, seqlens, cache, span)[0]

    return method


dense = pruned()


def sample_token(logits, temperature=0.0, top_p=1.0, generator=None):
    """logits: (B, vocab_size) -> (B,) ids: greedy at temperature 0, else of the top_p nucleus."""
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

    ids, seqlens, cache: as in prefill; min_new_tokens: of which none is an end-of-sequence token;
    on_token: called with the B new ids after every step. Returns one list of new ids per prompt,
    ended by (and with) an end-of-sequence token. ValueError for more tokens than the model has
    positions, and for a temperature or top_p out of range.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature}: a number of at least 0 is needed")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: a number above 0 and at most 1 is needed")
    seqlens = [len(ids)] if seqlens is None else list(seqlens)
    longest, limit = max(seqlens) + max_new_tokens, model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(f"{longest} prompt and new tokens exceed the model's {limit} positions")
    cache = KVCache(len(model.layers), extra=max_new_tokens) if cache is None else cache
    logits = method(model, ids, seqlens, cache)
    positions = cache.next_positions()
    outputs = [[] for _ in seqlens]
    for step in range(max_new_tokens):
        if step < min_new_tokens:
            logits[:, list(eos_token_ids)] = -torch.inf
        token = sample_token(logits, temperature, top_p, generator)
        for output, t in zip(outputs, token.tolist()):
            if not output or output[-1] not in eos_token_ids:
                output.append(t)
        if on_token:
            on_token(token.tolist())
        if step + 1 == max_new_tokens or all(output[-1] in eos_token_ids for output in outputs):
            break
        logits = model(token, positions + step, [1] * len(seqlens), cache)
    return outputs


def fingerprint(model):
    """A checkpoint's identity in any dtype: SHA-256 over samples of all weights, in bfloat16."""
    if hasattr(model, "known_fingerprint"):  # of the whole, where this is a part
        return model.known_fingerprint
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 1024) | 1].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_atomic(path, data):
    """Write bytes so that a reader, or a killed run, finds the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_heads(folder, heads, model, schedule, span=1, **info):
    """Write {layer: head} of one class: weights to heads.safetensors, the rest to heads.json."""
    state = nn.ModuleDict({str(layer): head for layer, head in heads.items()}).state_dict()
    data = safetensors.torch.save({name: p.cpu().contiguous() for name, p in state.items()})
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

    head: the class, made as head(hidden_size). FileNotFoundError for a missing file; ValueError for
    heads of an older version, another checkpoint or class, and files that do not fit each other.
    """
    folder = Path(folder)
    meta, data = read_json(folder / "heads.json"), (folder / "heads.safetensors").read_bytes()
    if meta.get("format") != HEADS_FORMAT:
        raise ValueError(f"{folder}: heads of another version: train them again")
    if meta.get("fingerprint") != fingerprint(model):
        ckpt = meta.get("ckpt")
        raise ValueError(f"{folder}: heads of other weights: those of --ckpt {ckpt} when trained")
    if meta.get("head") != head.__name__:
        raise ValueError(f"{folder}: heads of class {meta.get('head')}, not {head.__name__}")
    if meta.get("sha256") != hashlib.sha256(data).hexdigest():
        raise ValueError(f"{folder}: heads.safetensors is damaged, or of another heads.json")
    try:
        schedule = {int(layer): float(share) for layer, share in meta["schedule"].items()}
        heads = {layer: head(model.config.hidden_size) for layer in schedule if schedule[layer]}
        check_schedule(schedule, heads, len(model.layers))
        modules = nn.ModuleDict({str(layer): head for layer, head in heads.items()})
        modules.load_state_dict(safetensors.torch.load(data))
        modules.requires_grad_(False).to(model.device)
        return heads, schedule, int(meta["span"]), meta
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: heads.json does not fit heads.safetensors: {reason}") from None
