"""BLOOM (Le Scao et al. 2022), the third model of the paper: what differs from model.py.

One product makes queries, keys and values, norms are LayerNorms, and positions are ALiBi (Press et
al. 2022): a key's score falls by slope * distance, with a slope for each head. slope * (pos_j -
pos_i) is a product, too: queries and keys carry their original position as a few columns more, and
attention, dropping, the cache and training need not know of it.
"""

from dataclasses import dataclass

import torch
from torch import nn

import model

COLUMNS = 8  # that queries and keys have more


@dataclass
class BloomConfig(model.Config):
    families = {"bloom": {"tie_word_embeddings": True}}
    key_columns = COLUMNS
    layer_norm_epsilon: float = 1e-5

    @classmethod
    def from_dict(cls, raw):
        """As model.Config.from_dict; BLOOM has names of its own for the same sizes."""
        for name in ("apply_residual_connection_post_layernorm", "slow_but_exact"):
            if raw.get(name):
                raise ValueError(f"{name} is not supported")
        unread = "num_key_value_heads", "head_dim", "hidden_act", "rope_scaling", "rope_parameters"
        raw = {**raw, **dict.fromkeys(unread)}
        raw["hidden_size"] = raw.get("n_embed") or raw.get("hidden_size")
        raw["num_hidden_layers"] = raw.get("num_hidden_layers") or raw.get("n_layer")
        raw["num_attention_heads"] = raw.get("num_attention_heads") or raw.get("n_head")
        raw["intermediate_size"] = 4 * (raw["hidden_size"] or 1)
        raw["max_position_embeddings"] = raw.get("seq_length") or 2048  # ALiBi itself has no limit
        return super().from_dict(raw)

    def mlp_weights(self):
        """Weights of a layer's MLP that each token meets."""
        return 2 * self.hidden_size * self.intermediate_size


def alibi_slopes(heads):
    """(heads,) float64: 2^(-8i/n), n the largest power of two <= heads, then 2^(-4(2j-1)/n)."""
    n = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * (2 * j - 1) / n) for j in range(1, heads - n + 1)]
    return torch.tensor(slopes, dtype=torch.float64, device="cpu")  # also of a model on "meta"


class BloomAttention(model.Attention):
    """model.Attention with the names and the fused product of BLOOM."""

    extras, o_proj = model.Extras(), property(lambda self: self.dense)

    def __init__(self, config):
        nn.Module.__init__(self)
        d, self.head_dim = config.hidden_size, config.head_dim
        self.query_key_value = nn.Linear(d, 3 * config.num_attention_heads * self.head_dim)
        self.dense = nn.Linear(config.num_attention_heads * self.head_dim, d)
        self.slopes = alibi_slopes(config.num_attention_heads)

    def qkv(self, x, positions):
        """x: (T, hidden_size), normed -> q and k (T, heads, head_dim + COLUMNS), v without them."""
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, 3, self.head_dim)).unbind(2)
        return self.placed_q(q, positions), placed_k(k, positions), v

    def q(self, x, positions):
        return self.qkv(x, positions)[0]

    def kv(self, x, positions):
        return self.qkv(x, positions)[1:]

    def placed_q(self, q, positions):
        """Queries with slope * 256 and slope, and with -slope * pos_i, split so that bfloat16 holds
        them; all as large as they must be where attention divides by sqrt(width)."""
        width = self.head_dim + COLUMNS
        slopes = (self.slopes * width**0.5).to(q.device)
        slope_parts = split(slopes, 3, q.dtype)  # (heads, 3)
        columns = torch.stack((slope_parts * 256, slope_parts), -1).flatten(-2)
        shift = split(-slopes * positions[:, None], 2, q.dtype)  # (T, heads, 2): a row's constant
        columns = torch.cat((columns.expand(len(q), -1, -1), shift), -1)
        return torch.cat((q * (width / self.head_dim) ** 0.5, columns), -1)


def split(x, parts, dtype):
    """x: (...) float64 -> (..., parts) in dtype, whose sum is x, nearly."""
    found = []
    for _ in range(parts):
        found.append(x.to(dtype))
        x = x - found[-1].double()
    return torch.stack(found, -1)


def placed_k(k, positions):
    """Keys with pos_j // 256 and pos_j % 256, three times (exact to 65,536), and with two ones."""
    digits = torch.stack((positions // 256, positions % 256), -1).to(k.dtype)  # (T, 2)
    columns = torch.cat((digits, digits, digits, torch.ones_like(digits)), -1)
    return torch.cat((k, columns[:, None].expand(-1, k.shape[1], -1)), -1)


class BloomMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(model.GELU_TANH(self.dense_h_to_4h(x)))


class BloomBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.self_attention = BloomAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(width, eps)
        self.mlp = BloomMLP(config)

    self_attn = property(lambda self: self.self_attention)
    forward = model.Block.forward


class Model(model.Transformer):
    """A Transformer with BLOOM's names, and a norm after the embedding."""

    Config, prefix = BloomConfig, "transformer."

    def __init__(self, config):
        nn.Module.__init__(self)
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.word_embeddings_layernorm = nn.LayerNorm(width, eps)
        self.h = nn.ModuleList(BloomBlock(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(width, eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.requires_grad_(False).eval()

    embed_tokens = property(lambda self: self.word_embeddings)
    layers = property(lambda self: self.h)
    norm = property(lambda self: self.ln_f)

    def embed(self, ids):
        """ids: (T,) int -> x: (T, hidden_size)."""
        return self.word_embeddings_layernorm(self.word_embeddings(ids))
