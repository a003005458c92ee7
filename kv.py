"""KV-cache compression on top of a prefill, dense or pruned: H2O and SnapKV (the paper's table 6).

Each layer attends with all of its tokens; then each of its key-value heads keeps the keys and values of
those that were looked at most. Prefill costs a little more, decoding and its memory less. What comes
after the prompt all stays (H2O's own code goes on dropping).

    method = compressed(pruned(heads, schedule, span), "h2o", 0.4)
    logits = method(model, ids, seqlens, cache)
    cache.seqlens()  # tokens held by every head, per layer; their positions differ from head to head
"""

import torch
import torch.nn.functional as F

from flops import pairs
from model import attend, attention_weights, by_sequence
from scorers import accumulated
from sdtp import keep_count

WINDOW, POOL = 32, 7  # SnapKV's, with the maximum over neighbours, as in its LongBench runs
KINDS = ("h2o", "snapkv")


def compressed(method, kind="h2o", keep=0.4):
    """A method that leaves a share `keep` of each prompt's keys and values (the paper: 0.4).

    keep: of the prompt's N tokens, dropped ones included: where pruning leaves fewer, nothing more goes,
    so that the same keep is the same memory with and without pruning.
    h2o (Zhang et al. 2023, arXiv 2306.14048): half of them the most recent, the others those with the
    most attention from all queries. snapkv (Li et al. 2024, arXiv 2404.14469): the last 32, and those
    with the most attention from these, maximum over 7 neighbours. Query heads of a group share their
    keys: their attention is summed. ValueError for another kind, a keep out of (0, 1], or a layer with
    a sliding window or sinks.
    """
    if kind not in KINDS:
        raise ValueError(f"KV compression {kind!r}: choose {', '.join(KINDS)}")
    if not 0 < keep <= 1:
        raise ValueError(f"a share of {keep} of the KV cache: above 0 and at most 1 is needed")

    def run(model, ids, seqlens, cache):
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
        self.block, self.kind, self.counts, self.notes = block, kind, counts, notes

    def __getattr__(self, name):
        return getattr(self.block, name)

    def __call__(self, x, positions, seqlens, cache=None, attend=attend):
        if cache is None:  # a pass that fills no cache
            return self.block(x, positions, seqlens, None, attend)

        def attend_and_keep(*packed):
            cache.append(*self.kept(*packed))
            return attend(*packed)

        return self.block(x, positions, seqlens, None, attend_and_keep)

    def kept(self, q, k, v, positions, k_positions, seqlens, k_seqlens, extras):
        """LayerCache.append()'s arguments, of what is kept; the arguments are attend()'s.

        A cache has one position for all heads: here the latest of them, which is enough to be causal.
        """
        if extras.window is not None or extras.sinks is not None:
            raise ValueError(
                f"{self.kind}: not for a model with a sliding window or attention sinks"
            )
        parts, packed = [], (q, k, v, positions, k_positions, seqlens, k_seqlens)
        for (q, k, v, positions, k_positions), count in zip(by_sequence(*packed), self.counts):
            index = select(self.kind, q, k, positions, k_positions, count)  # (m, Hkv)
            k, v = (t.take_along_dim(index[..., None], 0) for t in (k, v))
            parts.append((k, v, k_positions[index].amax(1)))
            width = q.shape[1] * q.shape[2]
            self.notes.extra_flops += score_flops(self.kind, width, len(q), count)
        k, v, positions = map(torch.cat, zip(*parts))
        return k, v, positions, [len(p) for *_, p in parts]


def select(kind, q, k, positions, k_positions, count):
    """The keys of one sequence that each head keeps, ascending, (m, Hkv); of equal scores the later.

    q: (T, Hq, D), positions: (T,), k: (K, Hkv, D), k_positions: (K,).
    """
    K, heads = k.shape[:2]
    everything = torch.arange(K, device=k.device).expand(heads, K)
    if K <= count:
        return everything.T
    if kind == "h2o":
        recent = (count + 1) // 2
        scores = accumulated(q, k, positions, k_positions)[:, : K - recent]
    else:
        recent = WINDOW
        weights = attention_weights(q[-recent:], k, positions[-recent:], k_positions)
        seen = weights[..., :-recent].sum(1).unflatten(0, (heads, -1)).sum(1)
        scores = F.max_pool1d(seen, POOL, stride=1, padding=POOL // 2)
    order = scores.flip(1).argsort(descending=True, stable=True)[:, : count - recent]
    return torch.cat((K - recent - 1 - order, everything[:, K - recent :]), 1).sort().values.T


def score_flops(kind, width, n, count):
    """FLOPs of select()'s scores of n tokens: products of queries and keys once more; width: Hq * D."""
    if n <= count:
        return 0
    seen = pairs(n) if kind == "h2o" else pairs(n) - pairs(n - WINDOW)
    return 2 * width * seen
