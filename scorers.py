"""What else can rank tokens: training-free scorers with the call of a pruning head.

A scorer is called as scorer(x, positions, seqlens, block) with x: (T, hidden_size), the input of
`block`, and returns (T,) float32 scores, larger meaning keep. prefill takes a dict {layer: scorer}.
Spans (Schedule.span) are prefill's, so every scorer here can be had token by token or span by span.
"""

import torch
import torch.nn.functional as F

from model import attention_weights


def random(*generators):
    """Independent uniform scores, drawn anew at every stage; generators: one for each prompt."""
    return lambda x, positions, seqlens, block: torch.cat(
        [torch.rand(n, generator=generator) for generator, n in zip(generators, seqlens, strict=True)]
    ).to(x.device)


def most_recent(x, positions, seqlens, block):
    """Later tokens first, by their distance to the prompt's end."""
    return torch.cat([p - p[-1] for p in positions.split(seqlens)]).float()


def earliest(x, positions, seqlens, block):
    """Earlier tokens first: what accumulated attention comes to before the first block (results/LOG.md, session 10)."""
    return -positions.float()


def norm(x, positions, seqlens, block):
    """L2 norm of the hidden state."""
    return x.float().norm(dim=-1)


def last_attention(w=8, heads="mean", pool=1):
    """Attention that the last w tokens pay at this layer, mean over them, then over the heads.

    heads: "mean", "max", or the number of heads of which the mean of the largest is taken, token by token;
    pool: maximum over so many neighbours. w=1: LazyLLM's; w=8, pool=7: FastKV's (cf. SnapKV).
    """

    def scorer(x, positions, seqlens, block):
        q, k, _ = block.self_attn.qkv(block.input_layernorm(x), positions)
        out = []
        for q, k, p in zip(q.split(seqlens), k.split(seqlens), positions.split(seqlens)):
            seen = attention_weights(q[-w:], k, p[-w:], p, block.self_attn.window).mean(1)  # (Hq, K)
            best = {"mean": len(seen), "max": 1}.get(heads, heads)
            seen = seen.topk(best, dim=0).values.mean(0)
            out.append(F.max_pool1d(seen[None], pool, stride=1, padding=pool // 2)[0])
        return torch.cat(out)

    return scorer


def accumulated(q, k, positions, k_positions, window=None, rows=64):
    """Attention that each token gets from all later ones and itself, summed over them and the query heads of a key head.

    q: (T, Hq, D), k: (K, Hkv, D) of one sequence -> (Hkv, K), float32 or wider; positions: (T,), k_positions: (K,).
    By blocks of at most `rows` query rows and 2**25 weights: never a whole map; 64 took half the time of 256 (1,024
    tokens of SmolLM2-135M, one core).
    """
    (K, Hkv, _), (T, Hq, _) = k.shape, q.shape
    stops = torch.searchsorted(k_positions, positions, right=True).tolist()  # of the keys that each row may see
    rows = max(1, min(rows, 2**25 // (Hq * K)))
    total = torch.zeros(Hkv, K, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        seen = stops[part][-1]
        weights = attention_weights(q[part], k[:seen], positions[part], k_positions[:seen], window)
        total[:, :seen] += weights.sum(1).unflatten(0, (Hkv, -1)).sum(1)
    return total


def accumulated_attention(x, positions, seqlens, block, rows=64):
    """accumulated(), summed over the heads: the score of H2O (Zhang et al. 2023)."""
    q, k, _ = block.self_attn.qkv(block.input_layernorm(x), positions)
    parts = zip(q.split(seqlens), k.split(seqlens), positions.split(seqlens))
    return torch.cat([accumulated(q, k, p, p, block.self_attn.window, rows).sum(0) for q, k, p in parts])


def last_query(x, positions, seqlens, block, pool=5):
    """GemFilter's score (Shi et al. 2024): the last token's query times the keys, summed over heads, mean over `pool` neighbours."""
    q, k, _ = block.self_attn.qkv(block.input_layernorm(x), positions)
    out = []
    for q, k in zip(q.split(seqlens), k.split(seqlens)):
        dots = torch.einsum("hgd,khd->k", q[-1].unflatten(0, (k.shape[1], -1)).float(), k.float())
        out.append(F.avg_pool1d(dots[None], pool, stride=1, padding=pool // 2)[0])
    return torch.cat(out)


@torch.no_grad()
def self_information(model, ids, seqlens):
    """-log p(token | those before it) under the model itself, (T,): the criterion of Selective Context (Li et al. 2023) and LLMLingua.

    Needs a dense pass of its own; the first token of a sequence, which nothing predicts, scores highest.
    """
    nats = F.cross_entropy(model(ids, seqlens=seqlens)[:-1].float(), ids[1:], reduction="none")
    nats = F.pad(nats, (1, 0), value=torch.inf)
    nats[torch.tensor([0, *seqlens[:-1]]).cumsum(0)] = torch.inf
    return nats


def from_labels(labels):
    """Given scores, labels: (N,) by position for each of the prompts: the teacher's own ranking, or a pass before this one."""
    return lambda x, positions, seqlens, block: torch.cat(
        [label[p] for label, p in zip(labels, positions.split(seqlens), strict=True)]
    ).float()
