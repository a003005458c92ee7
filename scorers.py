"""What else can rank tokens: training-free scorers with the call of a pruning head, and whole methods.

A scorer is called as scorer(x, positions, seqlens, block), with x: (T, hidden_size), the input of
`block`, and returns (T,) float32 scores: larger is kept. To add one, write the function and name it in
SCORERS; every script then knows it. A method fills a cache: method(model, ids, seqlens, cache) ->
logits (B, vocab_size). `method` makes one by its name.
"""

import torch
import torch.nn.functional as F

from flops import executed_flops, meet_budget, schedule_flops
from model import Extras, attention_weights
from sdtp import dense, paper_schedule, prefill, pruned, select

# ---------------------------------------------------------------------------- scorers


def random(*generators):
    """Uniform scores, drawn anew at every stage; generators: a CPU torch.Generator for each prompt."""

    def scorer(x, positions, seqlens, block):
        draws = zip(seqlens, generators, strict=True)
        return torch.cat([torch.rand(n, generator=generator) for n, generator in draws]).to(
            x.device
        )

    return scorer


def most_recent(x, positions, seqlens, block):
    """Later tokens first."""
    return torch.cat([p - p[-1] for p in positions.split(seqlens)]).float()


def earliest(x, positions, seqlens, block):
    """Earlier tokens first."""
    return -positions.float()


def last_attention(w=8, pool=1):
    """Attention that the last w tokens pay to each at this layer, mean over them and the heads.

    pool: then the maximum over so many neighbours. w=1: LazyLLM's score; w=8, pool=7: FastKV's.
    """

    def scorer(x, positions, seqlens, block):
        attention, out = block.self_attn, []
        k, _ = attention.kv(block.input_layernorm(x), positions)
        for x, k, p in zip(x.split(seqlens), k.split(seqlens), positions.split(seqlens)):
            q = attention.q(block.input_layernorm(x[-w:]), p[-w:])
            seen = attention_weights(q, k, p[-w:], p, attention.extras).mean((0, 1))  # (K,)
            out.append(F.max_pool1d(seen[None], pool, stride=1, padding=pool // 2)[0])
        return torch.cat(out)

    return scorer


def accumulated(q, k, positions, k_positions, extras=Extras(), rows=64):
    """Attention that each key gets from all queries, summed over them and the heads of its group.

    q: (T, Hq, D), k: (K, Hkv, D) of one sequence -> (Hkv, K), float32 or wider; positions: (T,),
    k_positions: (K,). By blocks of query rows, so that the whole map is never there.
    """
    K, Hkv, _ = k.shape
    rows = max(1, min(rows, 2**25 // (q.shape[1] * K)))
    total = torch.zeros(Hkv, K, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for part, p in zip(q.split(rows), positions.split(rows)):
        seen = int(
            torch.searchsorted(k_positions, p[-1], right=True)
        )  # keys that the last row sees
        weights = attention_weights(part, k[:seen], p, k_positions[:seen], extras)
        total[:, :seen] += weights.sum(1).unflatten(0, (Hkv, -1)).sum(1)
    return total


def accumulated_attention(x, positions, seqlens, block):
    """accumulated(), summed over the heads: the score of H2O (Zhang et al. 2023)."""
    attention, x = block.self_attn, block.input_layernorm(x)
    q, (k, _) = attention.q(x, positions), attention.kv(x, positions)
    parts = zip(q.split(seqlens), k.split(seqlens), positions.split(seqlens))
    return torch.cat([accumulated(q, k, p, p, attention.extras).sum(0) for q, k, p in parts])


def by_position(scores):
    """Given scores, (N,) by position for each of the prompts: a teacher's labels, or an earlier pass."""

    def scorer(x, positions, seqlens, block):
        parts = zip(scores, positions.split(seqlens), strict=True)
        return torch.cat([score[p] for score, p in parts]).float()

    return scorer


SCORERS = {
    "most_recent": most_recent,
    "earliest": earliest,
    "last_attention": last_attention(),
    "accumulated_attention": accumulated_attention,
}


# ---------------------------------------------------------------------------- peers


def lazyllm(schedule):
    """Fu et al. 2024 (arXiv 2407.14057): at each stage by the last token's attention."""
    return pruned(dict.fromkeys(schedule, last_attention(1)), schedule)


def fastkv(schedule):
    """Jo et al. 2025 (arXiv 2502.01068): at one layer by the last 8 tokens' attention, pooled over 7."""
    return pruned(dict.fromkeys(schedule, last_attention(8, pool=7)), schedule)


def gemfilter(schedule, pool=5):
    """Shi et al. 2024 (arXiv 2409.17422): the last token's query times the keys of one layer, summed
    over the heads, mean over `pool` neighbours; what it chooses is read again as a new, shorter prompt.

    schedule: {0: share of the prompt that is chosen}.
    """

    def method(model, ids, seqlens, cache):
        x, positions = model.embed(ids), model.positions(seqlens)
        depth, scores = filter_depth(model.config), []
        for block in model.layers[:depth]:
            x = block(x, positions, seqlens)
        block = model.layers[depth]
        x = block.input_layernorm(x)
        q, (k, _) = block.self_attn.q(x, positions), block.self_attn.kv(x, positions)
        for q, k in zip(q.split(seqlens), k.split(seqlens)):
            q = q[-1].unflatten(0, (k.shape[1], -1))  # (Hkv, G, D)
            dots = torch.einsum("hgd,khd->k", q.float(), k.float())
            scores.append(F.avg_pool1d(dots[None], pool, stride=1, padding=pool // 2)[0])
        keep, kept = select(torch.cat(scores), positions, schedule[0], seqlens, seqlens)
        logits, _ = prefill(model, ids[keep], seqlens=kept, cache=cache)
        cache.extra_flops += sum(filter_flops("gemfilter", model.config, n) for n in seqlens)
        return logits

    return torch.no_grad()(method)


def self_information(schedule):
    """Prompt compression: tokens ranked by -log p(token | those before it) under the model itself.

    Selective Context (Li et al. 2023) and LLMLingua go by it. It needs a dense pass of its own; the
    first token, which nothing predicts, ranks highest. schedule: {0: share of the prompt that is read}.
    """

    def method(model, ids, seqlens, cache):
        nats = F.cross_entropy(model(ids, seqlens=seqlens)[:-1].float(), ids[1:], reduction="none")
        nats = F.pad(nats, (1, 0), value=torch.inf)
        nats[torch.tensor([0, *seqlens[:-1]]).cumsum(0)] = torch.inf
        scorer = by_position(nats.split(seqlens))
        logits, _ = prefill(model, ids, {0: scorer}, schedule, seqlens, cache)
        cache.extra_flops += sum(filter_flops("self_information", model.config, n) for n in seqlens)
        return logits

    return torch.no_grad()(method)


PEERS = {
    "lazyllm": lazyllm,
    "fastkv": fastkv,
    "gemfilter": gemfilter,
    "self_information": self_information,
}
METHODS = ("dense", "sdtp", "teacher", "random", *SCORERS, *PEERS)


def filter_depth(config):
    """Layers of GemFilter's first pass: a share of 0.4 (its paper: 13 of 32)."""
    return max(1, round(0.4 * config.num_hidden_layers))


def filter_flops(name, config, n):
    """FLOPs of a peer's pass over a prompt of n tokens before the one that fills the cache."""
    if name == "gemfilter":
        return sum(executed_flops(config, n, [n] * filter_depth(config), logit_rows=0))
    if name == "self_information":
        return sum(executed_flops(config, n, [n] * config.num_hidden_layers, logit_rows=n))
    return 0


def stages(name, config, schedule, span, n):
    """(schedule, span) of a method at the FLOPs of sdtp's schedule, for a prompt of n tokens.

    Scorers have sdtp's own; peers have their own stages, token by token. The pass of GemFilter is paid
    from the budget; that of self_information, which alone costs more than dense, comes on top.
    ValueError where a peer cannot be that cheap.
    """
    if name == "dense":
        return {}, 1
    if name not in PEERS:
        return schedule, span
    layers, budget = config.num_hidden_layers, schedule_flops(config, schedule, n)
    own = {"lazyllm": paper_schedule(layers), "fastkv": {layers // 2: 0.5}}.get(name, {0: 0.5})
    if name == "gemfilter":
        budget -= filter_flops(name, config, n)
    return meet_budget(config, own, budget, n), 1


def method(name, schedule, span=1, heads=None, labels=None, generators=None):
    """A method by its name in METHODS, with the stages() of that name.

    heads: sdtp's; labels: {layer: scores by position (N,) of each prompt}, the teacher's; generators: of
    random, one for each prompt. ValueError for an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r} (known: {', '.join(METHODS)})")
    if name == "dense":
        return dense
    if name in PEERS:
        return PEERS[name](schedule)
    if name == "sdtp":
        return pruned(heads, schedule, span)
    scored = [layer for layer, share in schedule.items() if share]
    if name == "teacher":
        return pruned({layer: by_position(labels[layer]) for layer in scored}, schedule, span)
    scorer = random(*generators) if name == "random" else SCORERS[name]
    return pruned(dict.fromkeys(scored, scorer), schedule, span)
