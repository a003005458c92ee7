"""KV-cache compression after a dense or a pruned prefill: H2O and SnapKV (the paper's table 6).

Each layer attends with all of its tokens; then each of its key-value heads keeps the keys and values of those that were
looked at most. Prefill costs a little more, decoding and its memory less. Nothing is dropped while decoding (H2O's
own code goes on there): what comes after the prompt all stays.

    logits, cache = prefill(model, ids, heads, schedule, kv=Compression("h2o", 0.4))
    cache.seqlens()  # tokens held by every head, per layer; their true positions differ from head to head
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import attend, attention_weights, by_sequence
from scorers import accumulated
from sdtp import FIRST_TOKENS, keep_count, looked_at, pairs

WINDOW, POOL = 32, 7  # SnapKV's, with the maximum over neighbours, as in its LongBench runs
METHODS = ("h2o", "snapkv")


@dataclass(frozen=True)
class Compression:
    """How many tokens of a prompt each head keeps, and which.

    keep: share of the prompt's N tokens, those that a schedule has dropped included: where pruning leaves fewer,
    nothing more goes, so that the same keep is the same memory with and without pruning.
    h2o (Zhang et al. 2023, arXiv 2306.14048): half of them the most recent, the others those with the most attention
    from all queries. snapkv (Li et al. 2024, arXiv 2404.14469): the last 32, however small keep is, and those with the
    most attention from these, maximum over 7 neighbours. Query heads of a group share their keys: their attention is
    summed. ValueError for another method, or a keep out of (0, 1].
    """

    method: str
    keep: float = 0.4  # the paper's

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"--kv {self.method}: choose {', '.join(METHODS)}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"--kv_keep {self.keep}: a number above 0 and at most 1 is needed")

    def __str__(self):
        """h2o@0.4: what eval_tasks.py's methods have after a plus sign."""
        return f"{self.method}@{self.keep}"

    def count(self, n):
        """Tokens of a prompt of n that each head holds, where as many are alive."""
        return keep_count(n, self.keep, WINDOW if self.method == "snapkv" else 0)

    def held(self, alive, n):
        """Tokens of a prompt of n that each head holds per layer, from those alive per layer."""
        return [min(count, self.count(n)) for count in alive]

    def attend(self, cache, prompt_lens):
        """model.attend of one layer's prefill, which then puts into that layer's empty LayerCache what is kept.

        prompt_lens: tokens of each prompt, dropped ones included. ValueError: see kept().
        """

        def attend_and_keep(q, k, v, positions, k_positions, seqlens, k_seqlens, window=None):
            packed = (q, k, v, positions, k_positions, seqlens, k_seqlens)
            cache.append(*self.kept(by_sequence(*packed), prompt_lens, window))
            return attend(*packed)

        return attend_and_keep

    def kept(self, rows, prompt_lens, window=None):
        """LayerCache.append()'s arguments, of what is kept; rows: each sequence's (q, k, v, positions, k_positions), as in model.attend.

        ValueError for a layer with a sliding window: it goes by position, and the cache has one for all heads: here the
        latest of them, which is enough to be causal.
        """
        if window is not None:
            raise ValueError(f"--kv {self.method}: not for a model with a sliding window ({window} positions)")
        kept = []
        for (q, k, v, positions, k_positions), n in zip(rows, prompt_lens):
            index = self.select(q, k, positions, k_positions, n)  # (m, Hkv)
            k, v = (t.take_along_dim(index[..., None], 0) for t in (k, v))
            kept.append((k, v, k_positions[index].amax(1)))
        return *map(torch.cat, zip(*kept)), [len(p) for *_, p in kept]

    def select(self, q, k, positions, k_positions, n):
        """The keys of one sequence that each head keeps, ascending, (m, Hkv); of equal scores the later.

        q: (T, Hq, D), positions: (T,), k: (K, Hkv, D), k_positions: (K,), of a prompt of n.
        """
        K, heads = k.shape[:2]
        count, everything = self.count(n), torch.arange(K, device=k.device).expand(heads, K)
        if K <= count:
            return everything.T
        if self.method == "h2o":
            recent = (count + 1) // 2
            scores = accumulated(q, k, positions, k_positions)[:, : K - recent]
        else:
            recent = WINDOW
            last = positions >= k_positions[-recent]  # fewer than 32 where a LateKV leaves some of these behind
            seen = attention_weights(q[last], k, positions[last], k_positions)[..., :-recent].sum(1)
            scores = F.max_pool1d(seen.unflatten(0, (heads, -1)).sum(1), POOL, stride=1, padding=POOL // 2)
        order = scores.flip(1).argsort(descending=True, stable=True)[:, : count - recent]
        return torch.cat((K - recent - 1 - order, everything[:, K - recent :]), 1).sort().values.T

    def flops(self, config, alive, n, held=None):
        """FLOPs of the scores of one prompt of n, all layers: causal products of queries and keys once more.

        held: tokens per layer that have keys, where more than are alive (sdtp.held_counts).
        """
        products = 0
        for t, keys in zip(alive, held or alive):
            if keys > self.count(n) and self.method == "h2o":
                products += pairs(t) + looked_at(t, keys - t)
            elif keys > self.count(n):  # the last queries alone
                products += pairs(keys) - pairs(keys - min(WINDOW, t - FIRST_TOKENS if keys > t else t))
        return 2 * config.head_dim * config.num_attention_heads * products


def compression(config):
    """The Compression of a script's --kv and --kv_keep, or None."""
    if config.kv_keep and not config.kv:
        raise ValueError(f"--kv_keep {config.kv_keep}: give --kv too: {' or '.join(METHODS)}")
    return Compression(config.kv, config.kv_keep or Compression.keep) if config.kv else None
