"""Host(hf): a causal LM of the transformers library, as it is, with the face of model.Transformer.

Its layers run on our rows, with our attention: sdtp.py, scorers.py and kv.py work unchanged.
"""

from copy import copy
from dataclasses import fields
from functools import lru_cache, partial

import torch
from transformers import AttentionInterface, DynamicCache  # checked with 5.24

from model import Config, Extras, Transformer, attend, attend_over


def attention(module, query, key, value, mask, over, extras, scaling, position_ids=None, **asked):
    """What layers call; over: q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D). There is no mask."""
    asked["sliding_window"] = asked.get("sliding_window") != extras.window
    asked["scaling"] = abs(scaling * query.shape[-1] ** 0.5 - 1) > 1e-6
    unknown = [name for name, value in asked.items() if torch.is_tensor(value) or value]
    if unknown:
        raise ValueError(f"its attention has its own {', '.join(unknown)}")
    return over(*(t[0].transpose(0, 1) for t in (query, key, value)))[None], None


class Block:
    """A layer called as model.Block; q, kv and extras are those of its self_attn."""

    def __init__(self, layer, angles, window):
        # copies that share all weights: the user's keep their attention function
        self.attention, self.layer = copy(layer.self_attn), copy(layer)
        self.attention.config = copy(self.attention.config)
        self.attention.config._attn_implementation = "sdtp"
        self.layer._modules = {**layer._modules, "self_attn": self.attention}
        self.input_layernorm, self.angles = layer.input_layernorm, angles
        self.self_attn, self.extras = self, Extras(window)

    def q(self, x, positions):
        return self.qkv(x, positions)[0]

    def kv(self, x, positions):
        return self.qkv(x, positions)[1:]

    def qkv(self, x, positions):
        seen = []  # q stands in for attention's output, which is not used
        self.run(self.attention, x, positions, lambda *qkv: seen.extend(qkv) or qkv[0])
        return seen

    def __call__(self, x, positions, seqlens, cache=None, attend=attend):
        how = dict(positions=positions, seqlens=seqlens, attend=attend, extras=self.extras)
        return self.run(self.layer, x, positions, partial(attend_over, cache, **how))[0]

    def run(self, module, x, positions, over):
        how = dict(position_ids=positions[None], position_embeddings=self.angles(positions))
        how.update(attention_mask=None, over=over, extras=self.extras)
        return module(hidden_states=x[None], **how)


class Host:
    """A transformers model as a Transformer. ValueError where its own logits are others."""

    positions, __call__ = Transformer.positions, Transformer.forward

    @torch.no_grad()
    def __init__(self, hf):
        AttentionInterface.register("sdtp", attention)
        self.hf, self.device, self.dtype = hf, hf.device, hf.dtype
        try:
            body, self.embed = hf.base_model, hf.get_input_embeddings()
            self.logits = torch.nn.Sequential(body.norm, hf.get_output_embeddings())
            given = {f.name: getattr(hf.config, f.name, None) for f in fields(Config)}
            given.update(rope_scaling=None, hidden_act=None)  # the layers' own, whatever they are
            c = self.config = Config(**{name: v for name, v in given.items() if v is not None})
            angles = lru_cache(1)(lambda p: body.rotary_emb(self.embed.weight, p[None]))
            self.layers = [Block(x, angles, c.window(i)) for i, x in enumerate(body.layers)]
            n = min(16 + (c.sliding_window or 0), 144, c.max_position_embeddings)
            ids = torch.arange(n, device=self.device) * 7919 % c.vocab_size
            own = hf(ids[None], use_cache=False).logits[0].float().repeat(2, 1)
            ours = self(ids.repeat(2), seqlens=[n, n]).float()  # rows must meet in attention alone
            if not (ours - own).norm() <= max(1e-3, 10 * torch.finfo(self.dtype).eps) * own.norm():
                raise ValueError("its own logits differ")
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"host {hf.config.model_type!r}: {error}; try model.py") from None

    def named_parameters(self):
        return [(name.removeprefix("model."), p) for name, p in self.hf.named_parameters()]


def generate_inputs(host, ids, cache):
    """hf.generate(**generate_inputs(host, ids, cache), max_new_tokens=n), after a prefill of ids.

    ids: (T,); the last is read again. For one call, no beams. ValueError where masks would fail.
    """
    how = host.hf.config._attn_implementation
    if how != "sdpa" or host.config.sliding_window or cache[0].seqlens != [len(ids)]:
        needs = "attn_implementation sdpa, no sliding window, and all of one prompt at layer 0"
        raise ValueError(f"hf.generate after pruning needs {needs}: use sdtp.generate")
    held = [(c.k[:, :, : c.seqlens[0] - 1], c.v[:, :, : c.seqlens[0] - 1]) for c in cache.layers]
    mask = torch.ones_like(ids[None])
    return {"input_ids": ids[None], "attention_mask": mask, "cache": DynamicCache(held)}
