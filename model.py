"""A Llama-family decoder, whole in one file: Llama 1/2/3.x, Mistral, Qwen2, Qwen3, Gemma 1.

Tokens are rows: a prompt is x: (T, hidden_size) with positions: (T,), several prompts are the same
two tensors, longer, with seqlens = [T_0, T_1, ...]. No padding in prefill, no mask but for sliding
windows. T: rows, K: keys, B: sequences, Hq, Hkv: query and key-value heads, D: head_dim.

    model = Transformer.from_pretrained("checkpoints/smollm2-135m-q4")
    logits = model(torch.tensor(ids))  # (T, vocab_size)
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import load_weights, read_json

# ---------------------------------------------------------------------------- config
QWEN = dict(num_key_value_heads=32, sliding_window=4096, max_position_embeddings=32768)
FAMILIES = {  # what Hugging Face's config classes assume where config.json is silent
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131072),
    "qwen2": QWEN,
    "qwen3": dict(QWEN, head_dim=128),
    "gemma": dict(num_key_value_heads=16, head_dim=256, max_position_embeddings=8192),
}
READ_BY = {  # the families in which transformers 5.24 reads a field
    "attention_bias": ("llama", "qwen3", "gemma", "gpt_oss"),
    "mlp_bias": ("llama",),
    "layer_types": ("mistral", "qwen2", "qwen3", "gpt_oss"),
    "sliding_window": ("mistral", "qwen2", "qwen3", "gpt_oss"),
}
OTHER_FAMILIES = {"bloom": "model_bloom", "gpt_oss": "model_gpt_oss"}  # a file each
OLD = "original_max_position_embeddings"
ROPE_SCALINGS = {  # rope type -> the numbers it needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", OLD),
    "llama3": ("factor", OLD, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", OLD),
}
GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu}
ACTIVATIONS |= {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH}


@dataclass
class Config:
    """The fields of a Hugging Face config.json that shape the computation."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int = None  # None: as many as num_attention_heads
    head_dim: int = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k, v and o; Qwen2 has it on q, k, v only, always
    mlp_bias: bool = False
    sliding_window: int = None
    layer_types: list = None  # per layer, "full_attention" or "sliding_attention"
    families, key_columns = FAMILIES, 0  # that a family adds to queries and keys

    @classmethod
    def from_dict(cls, raw):
        """Config from the dict of a config.json; ValueError names what this code cannot run."""
        family = raw.get("model_type")
        if family not in cls.families:
            known = ", ".join((*FAMILIES, *OTHER_FAMILIES))
            raise ValueError(f"model_type {family!r} is not supported ({known} are)")
        # null says as little as no entry, but for these, where it says that there are none
        told = "sliding_window", "num_key_value_heads"
        given = {k: v for k, v in raw.items() if v is not None or k in told}
        given = {k: v for k, v in given.items() if family in READ_BY.get(k, family)}
        raw = {**cls.families[family], **given}
        for name in ("quantization_config", "use_bidirectional_attention"):
            if raw.get(name):
                raise ValueError(f"{name} is not supported")
        # a field in either replaces the one outside; transformers 5 writes rope_parameters alone
        scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(scaling, dict):
            raise ValueError("rope_scaling: a dict is needed")
        rope = {"rope_theta": raw.get("rope_theta", cls.rope_theta), **scaling}
        raw["rope_theta"], raw["rope_scaling"] = rope.pop("rope_theta"), rope
        for f in fields(cls):
            value, is_count = raw.get(f.name, f.default), f.type is int
            kinds = (int, float) if f.type is float else f.type
            right = isinstance(value, kinds) and (f.type is bool) == isinstance(value, bool)
            if value is not None and not (right and (not is_count or value > 0)):
                wanted = "positive whole number" if is_count else f.type.__name__
                raise ValueError(f"{f.name}: a {wanted} is needed")
        if family == "gemma":
            raw.setdefault("tie_word_embeddings", True)
            act = raw.get("hidden_act", "gelu")  # meant so: transformers issue 29402
            raw["hidden_act"] = "gelu_pytorch_tanh" if act == "gelu" else act
        if family.startswith("qwen"):
            full, layers = raw.get("max_window_layers", 28), range(raw["num_hidden_layers"])
            types = ["full_attention" if i < full else "sliding_attention" for i in layers]
            raw.setdefault("layer_types", types)
            raw["sliding_window"] = raw["sliding_window"] if raw.get("use_sliding_window") else None
        kind, limit = rope.get("rope_type", rope.get("type")), raw["max_position_embeddings"]
        rope[OLD] = limit if kind == "dynamic" else raw.get(OLD, rope.get(OLD, limit))
        reach = [rope.get("factor"), rope[OLD]]
        longer = "linear", "dynamic", "yarn"  # of llama3 max_position_embeddings says it
        if kind in longer and all(isinstance(number, (int, float)) for number in reach):
            raw["max_position_embeddings"] = max(limit, int(math.prod(reach)))
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.layer_types = self.layer_types or ["sliding_attention"] * self.num_hidden_layers
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported")
        kinds = set(self.layer_types) - {"full_attention", "sliding_attention"}
        if kinds or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError("layer_types: full_attention or sliding_attention is needed per layer")
        RoPE(self)  # an unknown scaling is refused before the weights are read

    def window(self, layer):
        """Sliding window of a layer in positions, or None."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def mlp_weights(self):
        """Weights of a layer's MLP that each token meets."""
        return 3 * self.hidden_size * self.intermediate_size


# ---------------------------------------------------------------------------- rotary positions
class RoPE:
    """Rotary position embedding (Su et al. 2021), angles on demand; one for all layers.

    Scalings: linear (Chen et al. 2023); dynamic (theta grows with a prompt beyond the old context);
    llama3 (wavelengths longer than the old context are stretched by factor, short ones kept, a ramp
    between); yarn (Peng et al. 2023: a ramp, too, and sharper attention). ValueError for others.
    """

    def __init__(self, config):
        D, scaling = config.head_dim, {OLD: config.max_position_embeddings}
        scaling |= config.rope_scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_SCALINGS or any(isinstance(v, dict) for v in scaling.values()):
            raise ValueError(f"rope_scaling type {kind!r}, or one per layer type, is not supported")
        for name in ROPE_SCALINGS[kind]:
            if not isinstance(scaling.get(name), (int, float)):
                raise ValueError(f"rope_scaling type {kind!r}: {name}: a number is needed")
        # float32 on the CPU, and no buffer: models are built on the meta device, and then cast
        self.even = torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D
        self.theta, self.scale, self.dynamic = config.rope_theta, 1.0, None
        self.frequencies = 1.0 / self.theta**self.even  # (D / 2,)
        self.last = None, None, None, None  # positions, dtype, and their cos and sin
        factor, old = scaling.get("factor"), scaling[OLD]
        if kind == "linear":
            self.frequencies /= factor
        if kind == "dynamic":
            self.dynamic = factor, old
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = old * self.frequencies / (2 * math.pi)  # in the old context
            ramp = ((turns - low) / (high - low)).clamp(0, 1)
            self.frequencies *= ramp + (1 - ramp) / factor
        if kind == "yarn":
            turns = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
            low, high = (math.log(old / (2 * math.pi * t), self.theta) * D / 2 for t in turns)
            if scaling.get("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, D - 1)
            ramp = (self.even * D / 2 - low) / ((high - low) or 0.001)
            self.frequencies *= 1 + ramp.clamp(0, 1) * (1 / factor - 1)
            m, over = scaling.get("mscale"), scaling.get("mscale_all_dim")
            m, over = (m, over) if m and over else (1, 0)
            log = 0.1 * math.log(max(factor, 1))
            self.scale = scaling.get("attention_factor") or (m * log + 1) / (over * log + 1)

    def __call__(self, x, positions):
        """x: (T, H, D) turned by positions: (T,)."""
        last_positions, dtype, cos, sin = self.last  # those of the layer before, as a rule
        if positions is not last_positions or x.dtype != dtype:
            if self.dynamic:
                factor, old = self.dynamic
                longer = max(1.0, (int(positions.max()) + 1) / old)
                if longer > 1 and (positions == 0).sum() > 1:
                    raise ValueError(f"dynamic RoPE beyond {old} tokens: one prompt at a time")
                power = len(self.even) / (len(self.even) - 1)
                self.frequencies = (self.theta * (factor * (longer - 1) + 1) ** power) ** -self.even
            self.frequencies = self.frequencies.to(x.device)
            angles = torch.outer(positions.float(), self.frequencies).unsqueeze(1)  # (T, 1, D / 2)
            cos, sin = ((f(angles) * self.scale).to(x.dtype) for f in (torch.cos, torch.sin))
            self.last = positions, x.dtype, cos, sin
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# ---------------------------------------------------------------------------- attention
class Extras(NamedTuple):
    """What attention has beside causality at a layer. Every attend passes it on whole."""

    window: int = None  # a row sees the keys less than so many positions before it
    sinks: torch.Tensor = None  # (Hq,) a logit more in each row's softmax, without a value


def visible(positions, k_positions, window=None):
    """Causal and windowed mask by original positions, (T, K): 0 <= pos_i - pos_j < window."""
    distance = positions[:, None] - k_positions[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attention_weights(q, k, positions, k_positions, extras=Extras()):
    """q: (T, Hq, D), k: (K, Hkv, D) of one sequence -> weights (Hq, T, K), float32 or wider."""
    T = len(q)
    # (Hkv, G * T, D): the G query heads of a group share their keys, which are never repeated
    q = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2)
    scores = (q @ k.permute(1, 2, 0)).unflatten(1, (-1, T)).flatten(0, 1) * k.shape[-1] ** -0.5
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores.masked_fill(~visible(positions, k_positions, extras.window), -torch.inf)
    if extras.sinks is None:
        return scores.softmax(-1)
    sinks = extras.sinks.to(scores.dtype)[:, None, None].expand(-1, T, 1)
    return torch.cat((sinks, scores), -1).softmax(-1)[..., 1:]


def attend(q, k, v, positions, k_positions, seqlens, k_seqlens, extras=Extras()):
    """Causal attention of packed sequences, each by itself: (T, Hq, D).

    q: (T, Hq, D); k, v: (K, Hkv, D); positions: (T,), k_positions: (K,), original and ascending in
    a sequence; seqlens, k_seqlens: rows of each. The queries are the last tokens of a sequence.
    """
    width = v.shape[-1]
    if width < q.shape[-1]:  # BLOOM's: kernels are slower for that
        v = F.pad(v, (0, q.shape[-1] - width))
    sequences = by_sequence(q, k, v, positions, k_positions, seqlens, k_seqlens)
    out = [sdpa(*rows, extras) for rows in sequences]
    return (out[0] if len(out) == 1 else torch.cat(out))[..., :width]


def by_sequence(q, k, v, positions, k_positions, seqlens, k_seqlens):
    """attend()'s arguments of one sequence after the other: (q, k, v, positions, k_positions)."""
    keys = k.split(k_seqlens), v.split(k_seqlens)
    return zip(q.split(seqlens), *keys, positions.split(seqlens), k_positions.split(k_seqlens))


def sdpa(q, k, v, positions, k_positions, extras=Extras(), room=2**26):
    """attend() for one sequence; room: heads x rows x keys at a time where a mask is needed."""
    T, K, (window, sinks) = len(q), len(k), extras
    if T in (1, K) and (window is None or positions[-1] - k_positions[0] < window):
        return kernel(q, k, v, sinks, is_causal=T == K)
    # A window goes by position, and several rows over a longer cache have no triangle at the top
    # left. With grouped heads a mask takes CUDA to the math kernel: 12 bytes per head, row and key.
    reach = K if window is None else min(K, window + 1024)
    block, out = max(1, min(1024, room // (q.shape[1] * reach))), []
    for qs, p in zip(q.split(block), positions.split(block)):
        first = 0 if window is None else torch.searchsorted(k_positions, p[0] - window + 1)
        keys = slice(int(first), int(torch.searchsorted(k_positions, p[-1], right=True)))
        mask = visible(p, k_positions[keys], window)
        out.append(kernel(qs, k[keys], v[keys], sinks, mask))
    return torch.cat(out)


def kernel(q, k, v, sinks=None, mask=None, is_causal=False):
    """scaled_dot_product_attention. q: (T, Hq, D), k, v: (K, Hkv, D), mask: (T, K) -> (T, Hq, D).

    A sink is a first key without a value, whose score takes another column of q and k (eight, for
    alignment); another first row of q keeps is_causal's triangle where it was.
    """
    D = q.shape[-1]
    if sinks is not None:
        q, k, v = (F.pad(t, (0, 8, 0, 0, 1, 0)) for t in (q, k, v))
        q[:, :, D], k[0, :, D] = sinks * D**0.5, 1
        mask = mask if mask is None else F.pad(mask, (1, 0, 1, 0), value=True)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # (1, H, rows, width)
    how = dict(attn_mask=mask, is_causal=is_causal, scale=1 / math.sqrt(D), enable_gqa=True)
    out = F.scaled_dot_product_attention(q, k, v, **how).squeeze(0).transpose(0, 1)
    return out if sinks is None else out[1:, :, :D]


def attend_cache(q, cache, positions, extras=Extras()):
    """Decoding: q: (B, Hq, D), a token per sequence, over a LayerCache, which holds it already."""
    B, K, mask = len(q), max(cache.seqlens), None
    if extras.sinks is not None:
        k, v, k_positions = cache.rows()
        return attend(q, k, v, positions, k_positions, [1] * B, cache.seqlens, extras)
    if B > 1 or extras.window is not None:
        held = torch.tensor(cache.seqlens, device=q.device)
        mask = torch.arange(K, device=q.device) < held[:, None]  # (B, K)
        if extras.window is not None:
            mask &= positions[:, None] - cache.positions[:, :K] < extras.window
        mask = mask[:, None, None]
    k, v = cache.k[:, :, :K], cache.v[:, :, :K]
    q = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, D): a group's query heads as rows
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)


# ---------------------------------------------------------------------------- the KV cache
class LayerCache:
    """Keys and values of the tokens alive at one layer, a length per sequence."""

    def __init__(self, extra=0):
        self.extra, self.seqlens = extra, []
        self.k = self.v = self.positions = None  # (B, Hkv, capacity, D) twice, (B, capacity)

    def append(self, k, v, positions, seqlens):
        """Store new rows, k, v: (T, Hkv, D), positions: (T,), after what each sequence holds."""
        old = self.seqlens or [0] * len(seqlens)
        if len(old) != len(seqlens) or min(seqlens) < 1:
            raise ValueError(f"rows for {list(seqlens)}: the cache holds {len(old)} sequences")
        self.seqlens = [n + new for n, new in zip(old, seqlens)]
        room = max(self.seqlens)
        if self.k is None:  # zeros: padding is read, with weight 0, and must not be NaN
            self.k, self.v = (t.new_zeros(len(old), t.shape[1], 0, t.shape[2]) for t in (k, v))
            self.positions = positions.new_zeros(len(old), 0)
            room += self.extra
        more = room - self.k.shape[2]
        if more > 0:
            self.k, self.v = F.pad(self.k, (0, 0, 0, more)), F.pad(self.v, (0, 0, 0, more))
            self.positions = F.pad(self.positions, (0, more))
        if max(seqlens) == 1 < len(seqlens):  # decoding: all sequences at once
            i, at = torch.arange(len(old), device=k.device), torch.tensor(old, device=k.device)
            self.k[i, :, at], self.v[i, :, at], self.positions[i, at] = k, v, positions
            return
        parts = zip(k.split(seqlens), v.split(seqlens), positions.split(seqlens))
        for i, (k, v, p) in enumerate(parts):
            rows = slice(old[i], self.seqlens[i])
            self.k[i, :, rows], self.v[i, :, rows] = k.transpose(0, 1), v.transpose(0, 1)
            self.positions[i, rows] = p

    def rows(self):
        """k and v: (K, Hkv, D), positions: (K,) of all sequences, packed; views of a single one."""
        buffers = (self.k.transpose(1, 2), self.v.transpose(1, 2), self.positions)
        parts = [[t[i, :n] for i, n in enumerate(self.seqlens)] for t in buffers]
        return [p[0] if len(p) == 1 else torch.cat(p) for p in parts]


class KVCache:
    """One LayerCache per layer, with room for what is alive there and `extra` tokens to come."""

    def __init__(self, num_hidden_layers, extra=0):
        self.layers = [LayerCache(extra) for _ in range(num_hidden_layers)]
        # left by the method that fills it: tokens alive, [layer][sequence]; FLOPs of earlier passes
        self.alive, self.extra_flops = [], 0

    def __getitem__(self, layer):
        return self.layers[layer]

    def seqlens(self):
        """Tokens held, [layer][sequence]."""
        return [list(layer.seqlens) for layer in self.layers]

    def next_positions(self):
        """(B,) the position of each sequence's next token."""
        return torch.stack([p[n - 1] + 1 for p, n in zip(self[0].positions, self[0].seqlens)])

    def nbytes(self):
        """Bytes allocated for keys and values."""
        held = [t for layer in self.layers for t in (layer.k, layer.v) if t is not None]
        return sum(t.untyped_storage().nbytes() for t in held)


# ---------------------------------------------------------------------------- the transformer
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, config, width=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width or config.hidden_size))
        self.eps, self.family = config.rms_norm_eps, config.model_type

    def forward(self, x):
        x32 = x.float() if x.dtype != torch.float64 else x
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.family not in ("gemma", "gpt_oss"):
            return self.weight * x32.to(x.dtype)
        # these round after the product, and Gemma stores weight - 1
        return (x32 * (self.weight.to(x32.dtype) + (self.family == "gemma"))).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention. Outside of model files only q(), kv() and extras are used."""

    def __init__(self, config, layer, rope):
        super().__init__()
        d, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        qkv_bias = bias or config.model_type == "qwen2"
        self.head_dim, self.rope, self.window, self.sinks = D, rope, config.window(layer), None
        self.q_proj = nn.Linear(d, config.num_attention_heads * D, bias=qkv_bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * D, bias=qkv_bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * D, bias=qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, d, bias=bias)
        qwen3 = config.model_type == "qwen3"
        self.q_norm, self.k_norm = (RMSNorm(config, D) if qwen3 else nn.Identity() for _ in "qk")

    @property
    def extras(self):
        return Extras(self.window, self.sinks)

    def q(self, x, positions):
        """x: (T, hidden_size), normed -> (T, Hq, D), rotated."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        return self.rope(self.q_norm(q), positions)

    def kv(self, x, positions):
        """x: (T, hidden_size), normed -> two (T, Hkv, D): keys, rotated, and values."""
        k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.k_proj, self.v_proj))
        return self.rope(self.k_norm(k), positions), v

    def qkv(self, x, positions):
        return self.q(x, positions), *self.kv(x, positions)

    def forward(self, x, positions, seqlens, cache=None, attend=attend):
        q, k, v = self.qkv(x, positions)
        out = attend_over(cache, q, k, v, positions, seqlens, attend, self.extras)
        return self.o_proj(out.flatten(1))


def attend_over(cache, q, k, v, positions, seqlens, attend, extras):
    """Attention of new rows over what a LayerCache (or None) holds and themselves: (T, Hq, D)."""
    past = cache is not None and bool(cache.seqlens)
    if cache is not None:
        cache.append(k, v, positions, seqlens)
    if past and max(seqlens) == 1:
        return attend_cache(q, cache, positions, extras)
    k, v, k_positions = cache.rows() if past else (k, v, positions)
    k_seqlens = cache.seqlens if past else seqlens
    return attend(q, k, v, positions, k_positions, seqlens, k_seqlens, extras)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, width, bias=bias)
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    Attention, MLP = Attention, MLP

    def __init__(self, config, layer, rope):
        super().__init__()
        self.self_attn = self.Attention(config, layer, rope)
        self.mlp = self.MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x, positions, seqlens, cache=None, attend=attend):
        """x: (T, hidden_size) -> (T, hidden_size); cache: this layer's; attend: see attend()."""
        normed = in_chunks(self.input_layernorm, x)
        x = x + self.self_attn(normed, positions, seqlens, cache, attend)
        return in_chunks(lambda rows: rows + self.mlp(self.post_attention_layernorm(rows)), x)


def in_chunks(function, x):
    """function(x) of rows that do not meet, some at a time: little is held in between."""
    # 2,048: SmolLM2-135M reads 4,096 tokens in 2.38 s, with 512 rows at a time in 2.61 s (AMX)
    chunks = x.split(8192 if x.is_cuda else 2048)
    return function(x) if len(chunks) == 1 else torch.cat([function(rows) for rows in chunks])


class Transformer(nn.Module):
    """The decoder, frozen: no parameter takes gradients."""

    Config, Block, prefix = Config, Block, "model."  # of names in checkpoints

    def __init__(self, config):
        super().__init__()
        self.config, rope, layers = config, RoPE(config), range(config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.Block(config, layer, rope) for layer in layers)
        self.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.requires_grad_(False).eval()

    device = property(lambda self: self.norm.weight.device)
    dtype = property(lambda self: self.norm.weight.dtype)

    def positions(self, seqlens):
        """(T,) 0, 1, ... within each sequence. ValueError for one that is empty, or too long."""
        limit, n = self.config.max_position_embeddings, max(seqlens)
        if min(seqlens) < 1:
            raise ValueError("a prompt is empty")
        if n > limit:
            raise ValueError(f"a prompt of {n} tokens is beyond the model's {limit} positions")
        return torch.cat([torch.arange(n, device=self.device) for n in seqlens])

    def embed(self, ids):
        """ids: (T,) int -> x: (T, hidden_size)."""
        x = self.embed_tokens(ids)
        if self.config.model_type == "gemma":  # rounded to x's dtype, as trained
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        return x

    def logits(self, x):
        """x: (T, hidden_size) after the last block -> (T, vocab_size); give it only rows in use."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(self.norm(x), head.weight)

    def forward(self, ids, positions=None, seqlens=None, cache=None, attend=attend):
        """ids: (T,) token ids of one or more packed sequences -> logits (T, vocab_size).

        positions: (T,), default 0, 1, ... within each sequence; seqlens: rows per sequence, default
        one sequence; cache: a KVCache, whose tokens come before these (then give positions).
        """
        seqlens = [len(ids)] if seqlens is None else seqlens
        if positions is None and cache is not None and cache[0].seqlens:
            raise ValueError("the cache holds tokens: give the positions of those that follow")
        positions = self.positions(seqlens) if positions is None else positions
        x = self.embed(ids)
        for layer, block in enumerate(self.layers):
            x = block(x, positions, seqlens, None if cache is None else cache[layer], attend)
        return self.logits(x)

    @staticmethod
    def from_pretrained(folder, dtype="auto", device="cpu", part=None):
        """The model of a Hugging Face folder: config.json, model.safetensors (or its shards).

        dtype: a torch.dtype or "auto" (see auto_dtype); part: the module tensor_parallel.
        ValueError or FileNotFoundError names the file, field or tensor that is missing, unexpected,
        misshaped, unreadable or not supported.
        """
        folder, dtype = Path(folder), auto_dtype(device) if dtype == "auto" else dtype
        raw = read_json(folder / "config.json")
        try:
            cls = family(raw)
            config = cls.Config.from_dict(raw)
        except (ValueError, TypeError) as error:  # TypeError: text where a number stands, and so on
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        with torch.device("meta"):
            model = cls(part.local_config(config) if part else config)
        model.config = config
        load_weights(model, folder, dtype, device, part)
        if part:
            part.join(model, folder)
        return model


# ---------------------------------------------------------------------------- class and dtype
def family(raw):
    """The class that runs a config.json's dict: Transformer, or that of another file."""
    module = OTHER_FAMILIES.get(raw.get("model_type"))
    return import_module(module).Model if module else Transformer


def auto_dtype(device):
    """bfloat16 on CUDA and on CPUs that have bfloat16 products, else float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native or torch.device(device).type == "cuda" else torch.float32
