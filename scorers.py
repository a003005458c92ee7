"""What else can rank tokens: training-free scorers with the call of a pruning head.

A scorer is called as scorer(x, positions, seqlens, block) with x: (T, hidden_size), the input of
`block`, and returns (T,) float32 scores, larger meaning keep. prefill takes a dict {layer: scorer}.
"""

import torch

from model import attention_weights


def random(generator=None):
    """Independent uniform scores, drawn anew at every stage."""
    return lambda x, positions, seqlens, block: torch.rand(len(x), generator=generator).to(x.device)


def most_recent(x, positions, seqlens, block):
    """Later tokens first."""
    return positions.float()


def last_attention(w=8):
    """Attention that the last w tokens pay at this layer, mean over them and the heads (cf. LazyLLM, SnapKV)."""

    def scorer(x, positions, seqlens, block):
        q, k, _ = block.self_attn.qkv(block.input_layernorm(x), positions)
        parts = zip(q.split(seqlens), k.split(seqlens), positions.split(seqlens))
        return torch.cat(
            [attention_weights(q[-w:], k, p[-w:], p, block.self_attn.window).mean((0, 1)) for q, k, p in parts]
        )

    return scorer


def from_labels(labels):
    """Given scores, labels: (N,) by position for each of the prompts: the teacher's own ranking."""
    return lambda x, positions, seqlens, block: torch.cat(
        [label[p] for label, p in zip(labels, positions.split(seqlens), strict=True)]
    ).float()
