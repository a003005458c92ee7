"""gpt-oss (OpenAI 2025, arXiv 2508.10925), a mixture of experts: what differs from model.py.

Each layer has many MLPs, the experts; a router gives every token a few of them. Only alive tokens
reach the experts, as all others are gone. Attention has sinks (a logit more in each row's softmax,
without a value), and a window in every second layer. The hub has the experts' weights in MXFP4:
4 bits each, and a scale for 32 of them. They stay so, and are unpacked expert by expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import model
from model import Transformer, attend

YARN = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False)
YARN |= dict(original_max_position_embeddings=4096)
DEFAULTS = dict(num_key_value_heads=8, head_dim=64, sliding_window=128, rope_parameters=YARN)
DEFAULTS |= dict(max_position_embeddings=131072, rms_norm_eps=1e-5)
BLOCK = 32  # weights that share a scale


@dataclass
class GptOssConfig(model.Config):
    families = {"gpt_oss": DEFAULTS}
    rope_theta: float = 150000.0
    attention_bias: bool = True
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    mxfp4: bool = False  # how the experts' weights are stored
    experts_here: int = None  # in this process (None: all)

    @classmethod
    def from_dict(cls, raw):
        """As model.Config.from_dict."""
        raw = dict(raw)
        if (raw.get("quantization_config") or {}).get("quant_method") == "mxfp4":
            raw["mxfp4"] = bool(raw.pop("quantization_config"))
        return super().from_dict(raw)

    def __post_init__(self):
        kinds = "sliding_attention", "full_attention"
        in_turn = [kinds[layer % 2] for layer in range(self.num_hidden_layers)]
        self.layer_types = self.layer_types or in_turn
        if self.mxfp4 and (self.hidden_size % BLOCK or self.intermediate_size % BLOCK):
            raise ValueError(f"hidden_size or intermediate_size: MXFP4 needs multiples of {BLOCK}")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError("num_experts_per_tok is more than num_local_experts")
        super().__post_init__()

    def mlp_weights(self):
        """Weights of a layer's MLP that each token meets: the router's, and its experts'."""
        experts = self.num_experts_per_tok * 3 * self.hidden_size * self.intermediate_size
        return experts + self.hidden_size * self.num_local_experts


# ---------------------------------------------------------------------------- MXFP4
HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = torch.tensor((*HALF, *(-x for x in HALF)), device="cpu")
PAIRS = torch.stack((FP4.repeat(16), FP4.repeat_interleave(16)), -1)  # (256, 2): low bits first


def unpack(blocks, scales, dtype):
    """MXFP4 (OCP Microscaling formats 1.0): two 4-bit floats a byte, times 2^(scale - 127).

    blocks: (rows, groups, 16) uint8, scales: (rows, groups) uint8 -> (rows, groups * 32) in dtype.
    """
    values = F.embedding(blocks.int(), PAIRS.to(blocks.device, dtype)).flatten(-2)
    return (values * torch.exp2(scales.to(dtype) - 127)[..., None]).flatten(-2)  # exact


# ---------------------------------------------------------------------------- the model
class Attention(model.Attention):
    """model.Attention with sinks."""

    def __init__(self, config, layer, rope):
        super().__init__(config, layer, rope)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))


class Experts(nn.Module):
    """The weights of all experts, and one expert at work."""

    def __init__(self, config):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.count = E = config.experts_here or config.num_local_experts
        self.alpha, self.limit, self.mxfp4 = config.swiglu_alpha, config.swiglu_limit, config.mxfp4
        for name, inputs, outputs in (("gate_up_proj", d, 2 * f), ("down_proj", f, d)):
            self.add(f"{name}_bias", torch.zeros(E, outputs))
            if not self.mxfp4:
                self.add(name, torch.zeros(E, inputs, outputs))
                continue
            shape = E, outputs, inputs // BLOCK
            self.add(f"{name}_blocks", torch.zeros(*shape, BLOCK // 2, dtype=torch.uint8))
            self.add(f"{name}_scales", torch.zeros(shape, dtype=torch.uint8))

    def add(self, name, tensor):
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def linear(self, name, e, x):
        """x: (T, inputs) through a matrix of expert e and its bias: (T, outputs)."""
        bias = getattr(self, f"{name}_bias")[e]
        if not self.mxfp4:
            return x @ getattr(self, name)[e] + bias
        blocks, scales = getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales")
        return F.linear(x, unpack(blocks[e], scales[e], x.dtype), bias)

    def forward(self, x, e):
        """x: (T, hidden_size), the tokens of expert e -> the same shape."""
        gate_up = self.linear("gate_up_proj", e, x)
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]  # columns in turn
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.linear("down_proj", e, gate * torch.sigmoid(self.alpha * gate) * (up + 1))


class MixtureOfExperts(nn.Module):
    """The router's choice of experts for each token, and the sum of what they make of it."""

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_local_experts)
        self.experts, self.count = Experts(config), config.num_experts_per_tok
        self.first = 0  # the number of the first expert here

    def forward(self, x):
        """x: (T, hidden_size) -> the same shape."""
        values, chosen = self.router(x).topk(self.count, -1)  # (T, count) each
        weights, out = values.softmax(-1), torch.zeros_like(x)
        for e in chosen.unique().tolist():
            if not 0 <= e - self.first < self.experts.count:
                continue
            rows, place = (chosen == e).nonzero(as_tuple=True)
            args = x[rows], e - self.first
            if x.requires_grad:  # made, or unpacked, twice rather than held
                y = checkpoint(self.experts, *args, use_reentrant=False)
            else:
                y = self.experts(*args)
            out.index_add_(0, rows, y * weights[rows, place, None])
        return out


class Block(model.Block):
    Attention, MLP = Attention, MixtureOfExperts

    def forward(self, x, positions, seqlens, cache=None, attend=attend):
        """As model.Block.forward; all rows at once, as an expert is unpacked for each call."""
        x = x + self.self_attn(self.input_layernorm(x), positions, seqlens, cache, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(Transformer):
    Config, Block = GptOssConfig, Block
