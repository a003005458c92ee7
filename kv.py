"""KV-cache compression on top of a prefill, dense or pruned: H2O and SnapKV (the paper's table 6).

Each layer attends with all of its tokens; then each of its key-value heads keeps the keys and
values of those that were looked at most. What comes after the prompt all stays, where H2O's own
code goes on dropping.

    compressed(pruned(heads, schedule, span), "h2o", 0.4)(model, ids, seqlens, cache)
"""

import torch
import torch.nn.functional as F

import parallel
from flops import pairs
from model import attend, attention_weights, by_sequence
from scorers import accumulated
from sdtp import keep_count

KINDS = ("h2o", "snapkv")
WINDOW, POOL = 32, 7  # SnapKV's, as in its LongBench runs


def compressed(method, kind="h2o", keep=0.4):
    """A method that leaves a share `keep` of each prompt's keys and values (the paper: 0.4).

    keep: of the prompt's tokens, dropped ones included: where pruning leaves fewer, nothing more
    goes, so that the same keep is the same memory with and without pruning.
    h2o: half of them the most recent, the others those with the most attention from all queries
    (Zhang et al. 2023, arXiv 2306.14048). snapkv: the last 32, and those with the most attention
    from these, maximum over 7 neighbours (Li et al. 2024, arXiv 2404.14469).
    ValueError for another kind, a keep out of (0, 1], or a layer with a sliding window or sinks.
    """
    if kind not in KINDS:
        raise ValueError(f"KV compression {kind!r}: choose {', '.join(KINDS)}")
    if not 0 < keep <= 1:
        raise ValueError(f"a share of {keep} of the KV cache: above 0 and at most 1 is needed")

    def run(model, ids, seqlens, cache):
        if parallel.DIVIDED and parallel.WORLD > model.config.num_key_value_heads:
            raise ValueError(f"{kind}: not with more processes than key-value heads")
        counts = [keep_count(n, keep, WINDOW if kind == "snapkv" else 0) for n in seqlens]
        return method(CompressingModel(model, kind, counts, cache), ids, seqlens, cache)

    return run


class CompressingModel:
    """A Transformer whose blocks, in a prefill, leave in the cache what select() keeps."""

    def __init__(self, model, kind, counts, cache):
        self.model = model
        self.layers = [CompressingBlock(block, kind, counts, cache) for block in model.layers]

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, ids, **how):
        return self.model(ids, **how)


class CompressingBlock:
    def __init__(self, block, kind, counts, notes):
        if any(extra is not None for extra in block.self_attn.extras):
            raise ValueError(f"{kind}: not with a sliding window or attention sinks")
        self.block, self.kind, self.counts, self.notes = block, kind, counts, notes

    def __getattr__(self, name):
        return getattr(self.block, name)

    def __call__(self, x, positions, seqlens, cache=None):
        def attend_and_keep(*packed):
            kept = []
            for (q, k, v, p, _), count in zip(by_sequence(*packed[:-1]), self.counts):
                index = select(self.kind, q, k, p, count)  # (m, Hkv)
                k, v = (t.take_along_dim(index[..., None], 0) for t in (k, v))
                # a cache has one position for all heads: the latest is enough to be causal
                kept.append((k, v, p[index].amax(1)))
                self.notes.extra_flops += score_flops(self.kind, q[0].numel(), len(q), count)
            cache.append(*map(torch.cat, zip(*kept)), [len(k) for k, _, _ in kept])
            return attend(*packed)

        how = {} if cache is None else {"attend": attend_and_keep}  # a first pass fills no cache
        return self.block(x, positions, seqlens, **how)


def select(kind, q, k, positions, count):
    """The tokens of one prompt that each key-value head keeps, (m, Hkv), ascending; of equal scores
    the later. q: (T, Hq, D), k: (T, Hkv, D), positions: (T,). Heads of a group are summed.
    """
    T, Hkv, _ = k.shape
    everything = torch.arange(T, device=k.device).expand(Hkv, T)
    if T <= count:
        return everything.T
    if kind == "h2o":
        recent = (count + 1) // 2
        scores = accumulated(q, k, positions)[:, : T - recent]
    else:
        recent = WINDOW
        weights = attention_weights(q[-recent:], k, positions[-recent:], positions)
        seen = weights[..., :-recent].sum(1).unflatten(0, (Hkv, -1)).sum(1)
        scores = F.max_pool1d(seen, POOL, stride=1, padding=POOL // 2)
    order = scores.flip(1).argsort(descending=True, stable=True)[:, : count - recent]
    return torch.cat((T - recent - 1 - order, everything[:, T - recent :]), 1).sort().values.T


def score_flops(kind, width, n, count):
    """FLOPs of select()'s scores: products of queries and keys once more; width: Hq * D."""
    if n <= count:
        return 0
    return 2 * width * (pairs(n) if kind == "h2o" else pairs(n) - pairs(n - WINDOW))
