"""What else can rank tokens: scorers without training, and the peers that rank by them.

A scorer is called as scorer(x, positions, seqlens, block), like a PruneHead. To add one, write
under @each_prompt a function of one prompt, x: (T, hidden_size), the input of `block`, -> (T,),
larger is kept, and name it in SCORERS: every script then knows it.
"""

from functools import partial

import torch
import torch.nn.functional as F

from flops import executed_flops, meet_budget, schedule_flops
from model import Extras, attention_weights
from parallel import over_heads
from sdtp import dense, paper_schedule, prefill, pruned, select

FILTER_DEPTH = 0.4  # of the layers: GemFilter's first pass (its paper: 13 of 32)


def each_prompt(score):
    """A scorer of packed prompts from score(x, positions, block) of a single one."""

    def scorer(x, positions, seqlens, block):
        parts = zip(x.split(seqlens), positions.split(seqlens))
        return torch.cat([score(x, p, block) for x, p in parts]).float()

    return scorer


most_recent = each_prompt(lambda x, positions, block: positions)
earliest = each_prompt(lambda x, positions, block: -positions)


def last_attention(w=8, pool=1):
    """Mean attention from the last w tokens, over all heads; its maximum over `pool` neighbours."""

    @each_prompt
    def scorer(x, positions, block):
        attention, x = block.self_attn, block.input_layernorm(x)
        q, (k, _) = attention.q(x[-w:], positions[-w:]), attention.kv(x, positions)
        weights = attention_weights(q, k, positions[-w:], positions, attention.extras)  # (Hq, w, T)
        return F.max_pool1d(over_heads(weights.mean((0, 1)))[None], pool, 1, pool // 2)[0]

    return scorer


def accumulated(q, k, positions, extras=Extras()):
    """Attention that each key gets, summed over queries and the heads of its group, by blocks of
    queries. q: (T, Hq, D), k: (T, Hkv, D), positions: (T,) of one prompt -> (Hkv, T), float32."""
    (T, Hq, _), Hkv = q.shape, k.shape[1]
    rows = max(1, min(64, 2**25 // (Hq * T)))
    total = torch.zeros(Hkv, T, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for start in range(0, T, rows):
        part, seen = slice(start, start + rows), slice(start + rows)
        weights = attention_weights(q[part], k[seen], positions[part], positions[seen], extras)
        total[:, seen] += weights.sum(1).unflatten(0, (Hkv, -1)).sum(1)
    return total


@each_prompt
def accumulated_attention(x, positions, block):
    """accumulated(), summed over the heads: the score of H2O (Zhang et al. 2023)."""
    attention, x = block.self_attn, block.input_layernorm(x)
    q, (k, _) = attention.q(x, positions), attention.kv(x, positions)
    return over_heads(accumulated(q, k, positions, attention.extras).sum(0))


@each_prompt
def last_query(x, positions, block):
    """GemFilter's: the last query times each key, summed over heads, mean over 5 neighbours."""
    attention, x = block.self_attn, block.input_layernorm(x)
    q, (k, _) = attention.q(x[-1:], positions[-1:]), attention.kv(x, positions)
    q = q[0].unflatten(0, (k.shape[1], -1))  # (Hkv, G, D)
    dots = over_heads(torch.einsum("hgd,khd->k", q.float(), k.float()))
    return F.avg_pool1d(dots[None], 5, stride=1, padding=2)[0]


def random(*generators):
    """Uniform scores, drawn anew at every stage; generators: a CPU torch.Generator per prompt."""

    def scorer(x, positions, seqlens, block):
        pairs = zip(seqlens, generators, strict=True)
        return torch.cat([torch.rand(n, generator=g) for n, g in pairs]).to(x.device)

    return scorer


def by_position(scores):
    """Given scores, (N,) by position of each prompt: a teacher's labels, or an earlier pass."""

    def scorer(x, positions, seqlens, block):
        pairs = zip(scores, positions.split(seqlens), strict=True)
        return torch.cat([score[p] for score, p in pairs]).float()

    return scorer


def filter_flops(name, config, n):
    """FLOPs of the first of TWO_PASSES over a prompt of n tokens."""
    share, logit_rows = (FILTER_DEPTH, 0) if name == "gemfilter" else (1, n)
    depth = round(share * config.num_hidden_layers)
    return sum(executed_flops(config, n, [n] * depth, logit_rows=logit_rows))


@torch.no_grad()
def gemfilter(share, model, ids, seqlens, cache):
    """Shi et al. 2024 (arXiv 2409.17422): what last_query chooses is read again as a new prompt."""
    x, positions = model.embed(ids), model.positions(seqlens)
    *first, last = model.layers[: round(FILTER_DEPTH * len(model.layers)) + 1]
    for block in first:
        x = block(x, positions, seqlens)
    scores = last_query(x, positions, seqlens, last)
    keep, kept = select(scores, positions, share, seqlens, seqlens)
    cache.extra_flops += sum(filter_flops("gemfilter", model.config, n) for n in seqlens)
    return prefill(model, ids[keep], seqlens=kept, cache=cache)[0]


@torch.no_grad()
def self_information(share, model, ids, seqlens, cache):
    """Prompt compression by -log p(token | those before it): Selective Context (Li et al. 2023)."""
    nats = F.cross_entropy(model(ids, seqlens=seqlens)[:-1].float(), ids[1:], reduction="none")
    first = model.positions(seqlens) == 0  # which nothing predicts
    nats = F.pad(nats, (1, 0)).masked_fill(first, torch.inf)
    cache.extra_flops += sum(filter_flops("self_information", model.config, n) for n in seqlens)
    return prefill(model, ids, {0: by_position(nats.split(seqlens))}, {0: share}, seqlens, cache)[0]


SCORERS = {
    "most_recent": most_recent,
    "earliest": earliest,
    "last_attention": last_attention(),
    "accumulated_attention": accumulated_attention,
    "lazyllm": last_attention(w=1),  # Fu et al. 2024, arXiv 2407.14057
    "fastkv": last_attention(w=8, pool=7),  # Jo et al. 2025, arXiv 2502.01068
}
TWO_PASSES = {"gemfilter": gemfilter, "self_information": self_information}
PEERS = {  # stages of their own, by the number of layers; meet_budget sets the shares
    "lazyllm": paper_schedule,
    "fastkv": lambda layers: {layers // 2: 0.5},
    "gemfilter": lambda layers: {0: 0.5},
    "self_information": lambda layers: {0: 0.5},
}
METHODS = "dense", "sdtp", "teacher", "random", *SCORERS, *TWO_PASSES


def stages(name, config, schedule, span, n):
    """(schedule, span) of a method at the FLOPs of sdtp's schedule, for a prompt of n tokens.

    Scorers have sdtp's own, PEERS theirs, token by token. GemFilter's first pass is paid from the
    budget; that of self_information, dearer than dense, is not. ValueError for a budget too small.
    """
    if name == "dense":
        return {}, 1
    if name not in PEERS:
        return schedule, span
    budget = schedule_flops(config, schedule, n)
    if name == "gemfilter":
        budget -= filter_flops(name, config, n)
    return meet_budget(config, PEERS[name](config.num_hidden_layers), budget, n), 1


def method(name, schedule, span=1, heads=None, labels=None, generators=None):
    """A method by its name in METHODS, else ValueError; with the stages() of that name.

    heads: sdtp's; labels: the teacher's, {layer: scores by position (N,) of each prompt};
    generators: random's, one for each prompt.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r} (known: {', '.join(METHODS)})")
    if name == "dense":
        return dense
    if name in TWO_PASSES:
        return partial(TWO_PASSES[name], schedule[0])
    scored = [layer for layer, share in schedule.items() if share]
    if name == "teacher":
        heads = {layer: by_position(labels[layer]) for layer in scored}
    elif name != "sdtp":
        heads = dict.fromkeys(scored, random(*generators) if name == "random" else SCORERS[name])
    return pruned(heads, schedule, span)
