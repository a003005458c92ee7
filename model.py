"""A Llama-family decoder, whole in one file: Llama 1/2/3.x, Mistral, Qwen2, Gemma 1.

Tokens are rows. A prompt is x: (T, hidden_size) with positions: (T,); several prompts of
different lengths are the same two tensors, longer, with seqlens = [T_0, T_1, ...]. Prefill has no
padding, and no mask unless a sliding window needs one. Parameter names are Hugging Face's.

    model = Transformer.from_pretrained("checkpoints/smollm2-135m-q4")
    logits = model(torch.tensor(ids))  # (T, vocab_size)
"""

import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:
    flash_attn_varlen_func = None


# ---------------------------------------------------------------------------- config

# What Hugging Face's config classes assume where config.json is silent.
GEMMA = {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True}
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "gemma": {**GEMMA, "hidden_act": "gelu_pytorch_tanh"},
}
ROPE_SCALINGS = {  # rope type -> the fields it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


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

    @classmethod
    def from_dict(cls, raw):
        """Config from the dict of a config.json; ValueError names what this code cannot run."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"model_type {family!r} is not supported (supported: {known})")
        given = {k: v for k, v in raw.items() if v is not None or k == "sliding_window"}
        raw = {**FAMILIES[family], **given}
        for name in ("quantization_config", "use_bidirectional_attention"):
            if raw.get(name):
                raise ValueError(f"{name} is not supported")
        for field in fields(cls):
            value = raw.get(field.name)
            if (
                field.default is MISSING
                and field.type is int
                and not (isinstance(value, int) and value > 0)
            ):
                raise ValueError(f"{field.name}: a positive whole number is needed")
        # Today's hub: rope_theta and rope_scaling. transformers 5: rope_parameters, both in one.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
        raw["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if family == "gemma":  # its first configs spell it so; "gelu": transformers issue 29402
            act = raw.get("hidden_activation", raw["hidden_act"])
            raw["hidden_act"] = "gelu_pytorch_tanh" if act == "gelu" else act
        if family == "qwen2":
            if not raw.get("use_sliding_window", False):
                raw["sliding_window"] = None
            full, layers = raw.get("max_window_layers", 28), range(raw["num_hidden_layers"])
            kinds = ["full_attention" if i < full else "sliding_attention" for i in layers]
            raw.setdefault("layer_types", kinds)
        elif "layer_types" in raw:
            raise ValueError(f"layer_types is not supported for model_type {family!r}")
        if family in ("llama", "gemma"):
            raw["sliding_window"] = None
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.layer_types = self.layer_types or ["sliding_attention"] * self.num_hidden_layers
        self.rope_scaling = dict(self.rope_scaling or {})
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is not supported (supported: {known})"
            )
        unknown = set(self.layer_types) - {"full_attention", "sliding_attention"}
        if unknown or len(self.layer_types) != self.num_hidden_layers:
            wrong = sorted(unknown) or len(self.layer_types)
            raise ValueError(f"layer_types {wrong} is not supported")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window {self.sliding_window} is not supported")
        inverse_frequencies(
            self
        )  # refuses an unknown rope scaling now, not after the weights are read

    def window(self, layer):
        """Sliding window of a layer in positions, or None."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


# ---------------------------------------------------------------------------- rotary positions


def inverse_frequencies(config):
    """RoPE frequencies (head_dim / 2,) in radians per position; float32, on the CPU.

    Scalings: none, linear (Chen et al. 2023), llama3 (as in Meta's Llama 3.1 code: wavelengths longer
    than the old context are stretched by factor, short ones kept, a ramp between them). ValueError
    for another scaling, or one that lacks a field.
    """
    scaling = config.rope_scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        raise ValueError(f"rope_scaling type {kind!r} is not supported (supported: {known})")
    needed = ROPE_SCALINGS[kind]
    for name in needed:
        if name not in scaling:
            raise ValueError(f"rope_scaling type {kind!r}: {name} is missing")
    for name in scaling:
        if name not in (*needed, "rope_type", "type", "original_max_position_embeddings"):
            raise ValueError(f"rope_scaling type {kind!r}: {name} is not supported")
    # device given: from_pretrained builds modules on the meta device, and this tensor is in no file
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        old = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = old * frequencies / (2 * math.pi)  # in the old context
        ramp = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (ramp + (1 - ramp) / scaling["factor"])
    return frequencies


class RoPE:
    """Rotary position embedding (Su et al. 2021); one instance, shared by all layers.

    Angles are computed where they are needed: a table would take 1 GiB for a million positions. Not a
    module: the frequencies stay float32 whatever the model's dtype is.
    """

    def __init__(self, config):
        self.frequencies = inverse_frequencies(config)

    def __call__(self, x, positions):
        """x: (T, H, D) turned by positions: (T,)."""
        self.frequencies = self.frequencies.to(x.device)
        angles = torch.outer(positions.float(), self.frequencies).repeat(1, 2).unsqueeze(1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (T, 1, D)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


# ---------------------------------------------------------------------------- attention


class Extras(NamedTuple):
    """What a layer's attention has beside causality. Every attend passes it on whole."""

    window: int = None  # a row sees the keys less than so many positions before it
    sinks: torch.Tensor = None  # (Hq,) logits that join each row's softmax and have no value


def visible(positions, k_positions, window=None):
    """Causal (and windowed) mask by original positions, (T, K) bool: 0 <= pos_i - pos_j < window."""
    distance = positions[:, None] - k_positions[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attention_weights(q, k, positions, k_positions, extras=Extras()):
    """q: (T, Hq, D), k: (K, Hkv, D) of one sequence -> softmax weights (Hq, T, K), fp32 or wider."""
    T = len(q)
    # (Hkv, G * T, D): the query heads of a group share their keys, which are never repeated
    q = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2)
    scores = (q @ k.permute(1, 2, 0)).unflatten(1, (-1, T)).flatten(0, 1) * k.shape[-1] ** -0.5
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores.masked_fill(~visible(positions, k_positions, extras.window), -torch.inf)
    if extras.sinks is None:
        return scores.softmax(-1)
    sinks = extras.sinks.to(scores.dtype)[:, None, None].expand(-1, T, 1)
    return torch.cat((sinks, scores), -1).softmax(-1)[..., 1:]


def attention_backend(device, dtype, extras=Extras()):
    """Which kernel attend() runs on, and why: (name, reason)."""
    if extras.window is not None:  # a kernel's own window counts rows: right while none is missing
        return "sdpa", "a sliding window goes by position"
    if extras.sinks is not None:
        return "sdpa", "attention sinks"
    if torch.device(device).type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", "FlashAttention needs CUDA and 16-bit"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa", "FlashAttention 2 needs an Ampere GPU or newer"
    if flash_attn_varlen_func is None:
        return "sdpa", "flash-attn is not installed"
    return "flash_attn", "installed"


def attend(q, k, v, positions, k_positions, seqlens, k_seqlens, extras=Extras()):
    """Causal attention of packed sequences, each by itself.

    q: (T, Hq, D); k, v: (K, Hkv, D); positions: (T,), k_positions: (K,) original positions, ascending
    within a sequence; seqlens, k_seqlens: rows of each sequence. The queries are the last tokens of
    their sequence. Returns (T, Hq, D).
    """
    backend, _ = attention_backend(q.device, q.dtype, extras)
    if backend == "flash_attn":
        cu = F.pad(torch.tensor(seqlens, device=q.device).cumsum(0), (1, 0)).int()
        k_cu = F.pad(torch.tensor(k_seqlens, device=q.device).cumsum(0), (1, 0)).int()
        longest, k_longest = max(seqlens), max(k_seqlens)
        return flash_attn_varlen_func(q, k, v, cu, k_cu, longest, k_longest, causal=True)
    packed = q, k, v, positions, k_positions, seqlens, k_seqlens
    out = [sdpa(*rows, extras) for rows in by_sequence(*packed)]
    return out[0] if len(out) == 1 else torch.cat(out)


def by_sequence(q, k, v, positions, k_positions, seqlens, k_seqlens):
    """attend()'s arguments of one sequence after the other: (q, k, v, positions, k_positions)."""
    keys = k.split(k_seqlens), v.split(k_seqlens)
    return zip(q.split(seqlens), *keys, positions.split(seqlens), k_positions.split(k_seqlens))


def sdpa(q, k, v, positions, k_positions, extras=Extras()):
    """attend() for one sequence by scaled_dot_product_attention; no mask where none is needed."""
    (T, Hq, D), K, (window, sinks) = q.shape, len(k), extras
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # (1, H, T, D)

    def run(rows, keys, mask=None, **how):
        qs, ks, vs = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        if sinks is not None:  # one more key, without a value: an added column of q is its score.
            # A first row more keeps the causal triangle where it was.
            column = (sinks.to(q.dtype) * D**0.5).view(1, Hq, 1, 1).expand(-1, -1, qs.shape[2], 1)
            qs = F.pad(torch.cat((qs, column), -1), (0, 0, 1, 0))
            ks, vs = F.pad(ks, (0, 1, 1, 0)), F.pad(vs, (0, 1, 1, 0))
            ks[:, :, 0, -1] = 1
            mask = mask if mask is None else F.pad(mask, (1, 0, 1, 0), value=True)
        out = F.scaled_dot_product_attention(
            qs, ks, vs, attn_mask=mask, scale=D**-0.5, enable_gqa=True, **how
        )
        return out if sinks is None else out[:, :, 1:, :D]

    everything = slice(None)
    out_of_window = window is not None and positions[-1] - k_positions[0] >= window
    if T == K and not out_of_window:
        out = run(everything, everything, is_causal=True)
    elif T == 1 and not out_of_window:
        out = run(everything, everything)
    else:
        # Rows need a mask: a window goes by position, and is_causal would align several rows over a
        # longer cache top-left. Blocks of rows, as on CUDA a mask with grouped heads falls to the
        # math kernel, which takes 12 bytes per head, row and key.
        block = max(1, min(1024, 2**26 // (Hq * K))) if q.is_cuda else 1024
        blocks = []
        for start in range(0, T, block):
            rows = slice(start, min(start + block, T))
            low, high = 0, torch.searchsorted(k_positions, positions[rows.stop - 1], right=True)
            if window is not None:
                low = torch.searchsorted(k_positions, positions[rows.start] - window + 1)
            keys = slice(int(low), int(high))
            mask = None if T == 1 else visible(positions[rows], k_positions[keys], window)
            blocks.append(run(rows, keys, mask))
        out = torch.cat(blocks, dim=2)
    return out.squeeze(0).transpose(0, 1)


def attend_cache(q, cache, positions, extras=Extras()):
    """Decoding: one new token per sequence over all that its cache holds, itself included.

    q: (B, Hq, D), cache: a LayerCache of B sequences, positions: (B,). Returns (B, Hq, D).
    """
    B, Hkv, D = len(q), cache.k.shape[1], q.shape[-1]
    backend, _ = attention_backend(q.device, q.dtype, extras)
    if backend == "flash_attn":
        lengths = torch.tensor(cache.seqlens, dtype=torch.int32, device=q.device)
        k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)  # (B, capacity, Hkv, D)
        q = q.unsqueeze(1)
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True).squeeze(1)
    if extras.sinks is not None:
        k, v, k_positions = cache.rows()
        return attend(q, k, v, positions, k_positions, [1] * B, cache.seqlens, extras)
    q = q.unflatten(
        1, (Hkv, -1)
    )  # (B, Hkv, G, D): a group's query heads as rows, keys not repeated
    K, mask = max(cache.seqlens), None
    if B > 1 or extras.window is not None:
        lengths = torch.tensor(cache.seqlens, device=q.device)
        mask = torch.arange(K, device=q.device) < lengths[:, None]  # (B, K)
        if extras.window is not None:
            mask &= positions[:, None] - cache.positions[:, :K] < extras.window
        mask = mask[:, None, None]
    k, v = cache.k[:, :, :K], cache.v[:, :, :K]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)


class LayerCache:
    """Keys and values of the tokens alive at one layer: a length per sequence, buffers padded to the longest."""

    def __init__(self, extra=0):
        self.extra, self.seqlens = extra, []
        self.k = self.v = self.positions = None  # (B, Hkv, capacity, D) twice, (B, capacity)

    def append(self, k, v, positions, seqlens):
        """Store new rows, k and v: (T, Hkv, D), positions: (T,), after what each sequence holds.

        ValueError unless each of the sequences gets at least one.
        """
        old = self.seqlens or [0] * len(seqlens)
        if len(old) != len(seqlens) or min(seqlens) < 1:
            raise ValueError(
                f"the cache holds {len(old)} sequences and takes rows for each: not {list(seqlens)}"
            )
        self.seqlens = [n + new for n, new in zip(old, seqlens)]
        self.reserve(k, positions)
        if max(seqlens) == 1 < len(seqlens):  # decoding: all sequences at once
            i = torch.arange(len(old), device=k.device)
            at = torch.tensor(old, device=k.device)
            self.k[i, :, at], self.v[i, :, at], self.positions[i, at] = k, v, positions
            return
        parts = zip(old, self.seqlens, k.split(seqlens), v.split(seqlens), positions.split(seqlens))
        for i, (start, stop, k, v, p) in enumerate(parts):
            self.k[i, :, start:stop], self.v[i, :, start:stop] = (
                k.transpose(0, 1),
                v.transpose(0, 1),
            )
            self.positions[i, start:stop] = p

    def reserve(self, k, positions):
        """Make room for seqlens: at first with `extra` rows to spare, later by growing."""
        longest, B = max(self.seqlens), len(self.seqlens)
        if self.k is None:
            capacity = longest + self.extra
            new = (
                k.new_empty if B == 1 else k.new_zeros
            )  # padding is read, with weight 0, and must not be NaN
            self.k, self.v = (new(B, k.shape[1], capacity, k.shape[2]) for _ in range(2))
            self.positions = positions.new_zeros(B, capacity)
        elif longest > self.k.shape[2]:
            more = longest - self.k.shape[2]
            self.k, self.v = (F.pad(t, (0, 0, 0, more)) for t in (self.k, self.v))
            self.positions = F.pad(self.positions, (0, more))

    def rows(self):
        """k and v: (K, Hkv, D), positions: (K,) of all sequences, packed; views for a single one."""
        buffers = (self.k.transpose(1, 2), self.v.transpose(1, 2), self.positions)
        parts = [[t[i, :n] for i, n in enumerate(self.seqlens)] for t in buffers]
        return [p[0] if len(p) == 1 else torch.cat(p) for p in parts]


class KVCache:
    """One LayerCache per layer, allocated for what is alive there (in the longest sequence) plus `extra` tokens to come."""

    def __init__(self, num_hidden_layers, extra=0):
        self.layers = [LayerCache(extra) for _ in range(num_hidden_layers)]
        # notes of the method that fills it: rows at each layer [layer][sequence], and FLOPs of
        # passes before the one that fills it
        self.alive, self.extra_flops = [], 0

    def __getitem__(self, layer):
        return self.layers[layer]

    def seqlens(self):
        """Tokens held, [layer][sequence]."""
        return [list(layer.seqlens) for layer in self.layers]

    def next_positions(self):
        """(B,) the position of each sequence's next token."""
        first = self[0]
        last = torch.tensor(first.seqlens, device=first.positions.device)[:, None] - 1
        return first.positions.gather(1, last)[:, 0] + 1

    def nbytes(self):
        """Bytes allocated for keys and values."""
        return sum(
            t.untyped_storage().nbytes() for c in self.layers for t in (c.k, c.v) if t is not None
        )


# ---------------------------------------------------------------------------- the transformer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps, self.gemma = config.rms_norm_eps, config.model_type == "gemma"

    def forward(self, x):
        x32 = x.float() if x.dtype != torch.float64 else x
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        if (
            self.gemma
        ):  # stores weight - 1, and rounds after the product where Llama rounds before it
            return (x32 * (1 + self.weight.to(x32.dtype))).to(x.dtype)
        return self.weight * x32.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention. q() and kv() are all that others need to know of its projections."""

    def __init__(self, config, layer, rope):
        super().__init__()
        d, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        qkv_bias = bias or config.model_type == "qwen2"
        self.head_dim, self.rope, self.extras = D, rope, Extras(config.window(layer))
        self.q_proj = nn.Linear(d, config.num_attention_heads * D, bias=qkv_bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * D, bias=qkv_bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * D, bias=qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, d, bias=bias)

    def q(self, x, positions):
        """x: (T, hidden_size), normed -> (T, Hq, D), rotated."""
        return self.rope(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), positions)

    def kv(self, x, positions):
        """x: (T, hidden_size), normed -> two (T, Hkv, D): keys, rotated, and values."""
        k, v = self.k_proj(x), self.v_proj(x)
        k = self.rope(k.unflatten(-1, (-1, self.head_dim)), positions)
        return k, v.unflatten(-1, (-1, self.head_dim))

    def forward(self, x, positions, seqlens, cache=None, attend=attend):
        """x: (T, hidden_size), normed -> (T, hidden_size); the arguments are Block's."""
        q, (k, v) = self.q(x, positions), self.kv(x, positions)
        out = attend_over(cache, q, k, v, positions, seqlens, attend, self.extras)
        return self.o_proj(out.flatten(1))


def attend_over(cache, q, k, v, positions, seqlens, attend, extras):
    """Attention of new rows over themselves and what a LayerCache holds, to which they are added.

    cache None, or an empty one: a prefill, which `attend` computes. Returns (T, Hq, D).
    """
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
        self.gate_proj = nn.Linear(
            config.hidden_size, config.intermediate_size, bias=config.mlp_bias
        )
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias
        )
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer, rope):
        super().__init__()
        self.self_attn = Attention(config, layer, rope)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x, positions, seqlens, cache=None, attend=attend):
        """x: (T, hidden_size) -> (T, hidden_size); cache: this layer's LayerCache; attend: see attend()."""
        x = x + self.self_attn(
            in_chunks(self.input_layernorm, x), positions, seqlens, cache, attend
        )
        return in_chunks(lambda rows: rows + self.mlp(self.post_attention_layernorm(rows)), x)


def in_chunks(function, x):
    """function(x) of rows that do not meet, some at a time: what is held between stays small, on a CPU in its cache.

    512 was the fastest of 256 to 2,048 for the MLP of SmolLM2-135M on two cores: 34 against 47 ms of 4,096 rows at once.
    """
    chunks = x.split(8192 if x.is_cuda else 512)
    return function(x) if len(chunks) == 1 else torch.cat([function(rows) for rows in chunks])


class Transformer(nn.Module):
    """The decoder, frozen: no parameter takes gradients."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        rope = RoPE(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, rope) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.requires_grad_(False).eval()

    @property
    def device(self):
        return self.norm.weight.device

    def embed(self, ids):
        """ids: (T,) int -> x: (T, hidden_size)."""
        x = self.embed_tokens(ids)
        if self.config.model_type == "gemma":
            x = x * torch.tensor(
                self.config.hidden_size**0.5, dtype=x.dtype
            )  # rounded to x's dtype, as trained
        return x

    def logits(self, x):
        """x: (rows, hidden_size), the last block's output -> (rows, vocab_size). Give it only the rows you use."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(self.norm(x), head.weight)

    def forward(self, ids, positions=None, seqlens=None, cache=None, attend=attend):
        """ids: (T,) token ids of one or more packed sequences -> logits (T, vocab_size).

        positions: (T,), default 0, 1, ... within each sequence; seqlens: rows per sequence, default
        one sequence; cache: a KVCache whose tokens come before these (then give positions).
        ValueError for a sequence longer than max_position_embeddings.
        """
        seqlens = [len(ids)] if seqlens is None else seqlens
        if positions is None and cache is not None and cache[0].seqlens:
            raise ValueError("the cache holds tokens: give the positions of those that follow")
        positions = self.positions(seqlens) if positions is None else positions
        x = self.embed(ids)
        for layer, block in enumerate(self.layers):
            x = block(x, positions, seqlens, None if cache is None else cache[layer], attend)
        return self.logits(x)

    def positions(self, seqlens):
        """0, 1, ... within each sequence, (T,). ValueError for an empty one, or longer than max_position_embeddings."""
        limit = self.config.max_position_embeddings
        if min(seqlens, default=0) < 1:
            raise ValueError("a prompt is empty")
        if max(seqlens) > limit:
            raise ValueError(
                f"a prompt of {max(seqlens)} tokens is beyond the model's {limit} positions (max_position_embeddings)"
            )
        return torch.cat([torch.arange(n, device=self.device) for n in seqlens])

    @classmethod
    def from_pretrained(cls, folder, dtype="auto", device="cpu"):
        """Read a Hugging Face folder: config.json and model.safetensors, or shards with their index.

        dtype: a torch.dtype or "auto" (see auto_dtype). ValueError or FileNotFoundError names the file,
        field or tensor that is missing, unexpected, misshaped, unreadable or not supported.
        """
        folder, dtype = Path(folder), auto_dtype(device) if dtype == "auto" else dtype
        raw = read_json(folder / "config.json")
        try:
            config = Config.from_dict(raw)
        except (
            ValueError,
            TypeError,
        ) as error:  # TypeError: a number where text stands, or the like
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        with torch.device("meta"):
            model = cls(config)
        expected, state = model.state_dict(), {}
        for path, name, tensor in read_tensors(folder):
            key = name.removeprefix("model.")
            if (
                key == "lm_head.weight"
                and config.tie_word_embeddings
                or key.endswith("rotary_emb.inv_freq")
            ):
                continue  # written by some exporters beside the tensor they repeat, or follow from the config
            if key not in expected:
                raise ValueError(f"{path}: unexpected tensor {name}")
            if tensor.shape != expected[key].shape:
                raise ValueError(
                    f"{path}: {name} has shape {list(tensor.shape)}, config.json asks for {list(expected[key].shape)}"
                )
            state[key] = tensor.to(device, dtype)
        missing = sorted(expected.keys() - state.keys())
        if missing:
            raise ValueError(
                f"{folder}: missing tensor {missing[0]}"
                + f" and {len(missing) - 1} more" * (len(missing) > 1)
            )
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).to(device, dtype)


# ---------------------------------------------------------------------------- reading a folder


def auto_dtype(device):
    """bfloat16 on CUDA and on CPUs with native bf16 products, else float32."""
    return torch.bfloat16 if torch.device(device).type == "cuda" or native_bf16() else torch.float32


def native_bf16():
    """Whether this CPU has bfloat16 products."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def read_json(path):
    """The JSON object in a file; FileNotFoundError or ValueError in one line."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist"
            + ("" if path.parent.is_dir() else f" (no folder {path.parent})")
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def read_tensors(folder):
    """Yields (file, name, tensor) of a checkpoint folder, one tensor in memory at a time."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map is missing or empty")
        names = sorted(set(map(str, weight_map.values())))
        outside = [n for n in names if Path(n).name != n]
        if outside:
            raise ValueError(f"{index}: weight_map leaves the folder: {outside[0]}")
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    yield path, key, file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download it again") from None
