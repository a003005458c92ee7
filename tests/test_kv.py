"""kv.py against plain loops over whole attention maps, and a model that hides the keys it drops."""

import math

import pytest
import tiny
import torch
from test_sdtp import close, heads_of

from kv import KINDS, compressed, score_flops
from model import KVCache
from sdtp import dense, keep_count, pruned

MODELS = {"grouped": 2, "one head per key": 4, "one key head": 1}
each_model = pytest.mark.parametrize("kv_heads", MODELS.values(), ids=MODELS)
each_kind = pytest.mark.parametrize("kind", KINDS)
STAGES = {1: 0.7, 2: 0.45}
METHODS = {"dense": dense, "sdtp": pruned(heads_of(STAGES), STAGES)}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
LENS = [60, 1, 37, 52, 9]
COUNTS = {  # kind, keep -> tokens of each of LENS, by hand
    ("h2o", 0.4): [24, 1, 15, 21, 4],
    ("h2o", 0.13): [8, 1, 5, 7, 1],
    ("h2o", 1.0): LENS,
    ("snapkv", 0.8): [48, 1, 32, 42, 9],
    ("snapkv", 0.1): [32, 1, 32, 32, 9],  # its window stays
}


def packed(lens, seed=0):
    return torch.cat([tiny.ids(n, seed) for n in lens])


def watched(model, ids, lens, method):
    """A prefill's (q, k, v, positions) of each layer and prompt, [layer][prompt]."""
    seen = []

    def note(attention, args):
        x, positions, seqlens = args[:3]
        parts = attention.q(x, positions), *attention.kv(x, positions), positions
        seen.append(list(zip(*(t.split(seqlens) for t in parts))))

    hooks = [block.self_attn.register_forward_pre_hook(note) for block in model.layers]
    method(model, ids, lens, KVCache(len(model.layers)))
    for hook in hooks:
        hook.remove()
    return seen


def kept_by_loop(kind, q, k, positions, count):
    """For each key head the rows it keeps, ascending. Plain Python over whole maps."""
    T, Hkv, group, kept = len(positions), k.shape[1], q.shape[1] // k.shape[1], []
    recent = (count + 1) // 2 if kind == "h2o" else 32
    if T <= count:
        return [list(range(T))] * Hkv
    for head in range(Hkv):
        scores = [0.0] * T
        for h in range(head * group, (head + 1) * group):
            for i in range(T) if kind == "h2o" else range(T - 32, T):
                dots = (k[: i + 1, head] @ q[i, h] / math.sqrt(q.shape[-1])).tolist()
                e = [math.exp(dot) for dot in dots]
                scores[: i + 1] = [s + x / sum(e) for s, x in zip(scores, e)]
        scores = scores[: T - recent]
        if kind == "snapkv":
            scores = [max(scores[max(0, j - 3) : j + 4]) for j in range(len(scores))]
        best = sorted(range(len(scores)), key=lambda j: (-scores[j], -j))[: count - recent]
        kept.append(sorted(best) + list(range(T - recent, T)))
    return kept


@each_model
@each_method
@pytest.mark.parametrize("kind, keep", COUNTS)
def test_kept_equals_a_loop(kv_heads, kind, keep, method):
    """Each layer and key head of a ragged batch holds what a loop keeps; all was attended to."""
    model, ids, cache = tiny.build(num_key_value_heads=kv_heads), packed(LENS), KVCache(3)
    logits = compressed(method, kind, keep)(model, ids, LENS, cache)
    assert torch.equal(logits, method(model, ids, LENS, KVCache(3)))
    layers, different = watched(model, ids, LENS, method), set()
    assert cache.alive == [[len(p) for *_, p in prompts] for prompts in layers]
    for held, prompts in zip(cache.layers, layers, strict=True):
        for i, ((q, k, v, p), count) in enumerate(zip(prompts, COUNTS[kind, keep], strict=True)):
            kept = kept_by_loop(kind, q, k, p, count)
            assert held.seqlens[i] == len(kept[0]) == min(len(p), count)
            for h, rows in enumerate(kept):
                assert close(held.k[i, h, : len(rows)], k[rows, h])
                assert close(held.v[i, h, : len(rows)], v[rows, h])
            latest = [max(p[row] for row in rows) for rows in zip(*kept)]
            assert held.positions[i, : len(latest)].tolist() == latest
            different |= {str(rows) for rows in kept if len(p) == 60 > count}
    assert len(different) >= kv_heads * (0.4 <= keep < 1)  # heads keep other tokens


def masked(model, prompt, new, kind, count, method):
    """Logits of the tokens `new` after a prompt, one at a time, each a loop over heads in which the
    keys that a head has dropped are masked out of those of all tokens alive."""
    layers, logits = watched(model, prompt, [len(prompt)], method), []
    layers = [[kept_by_loop(kind, q, k, p, count), k, v] for ((q, k, v, p),) in layers]
    for step, token in enumerate(new):
        x, position = model.embed(token[None]), torch.tensor([len(prompt) + step])
        for block, layer in zip(model.layers, layers):
            normed, mixed = block.input_layernorm(x), []
            q, (k, v) = block.self_attn.q(normed, position), block.self_attn.kv(normed, position)
            layer[1], layer[2] = torch.cat((layer[1], k)), torch.cat((layer[2], v))
            for h in range(q.shape[1]):
                head, alive = h * k.shape[1] // q.shape[1], len(layer[1]) - step - 1
                scores, mask = layer[1][:, head] @ q[0, h], torch.full((len(layer[1]),), -torch.inf)
                mask[layer[0][head]] = mask[alive:] = 0
                weights = (scores / math.sqrt(q.shape[-1]) + mask).softmax(-1)
                mixed.append(weights @ layer[2][:, head])
            x = x + block.self_attn.o_proj(torch.cat(mixed)[None])
            x = x + block.mlp(block.post_attention_layernorm(x))
        logits.append(model.logits(x)[0])
    return torch.stack(logits)


@each_model
@each_kind
@each_method
def test_decoding_after_compression(kv_heads, kind, method):
    """Rows added to a compressed cache, one or several at a time, have the logits of that loop."""
    model, lens, cache = tiny.build(num_key_value_heads=kv_heads), [50, 44], KVCache(3, extra=5)
    prompts, new = [tiny.ids(n, 1) for n in lens], [tiny.ids(10, 2), tiny.ids(11, 2)]
    expected = []
    for n, *both in zip(lens, prompts, new):
        count = keep_count(n, 0.4, 32 if kind == "snapkv" else 0)
        expected.append(masked(model, *both, kind, count, method))
    plain = model(torch.cat((prompts[0], new[0])))[50:]
    assert (expected[0] - plain).abs().max() > 0.1  # something was dropped that mattered
    compressed(method, kind, 0.4)(model, torch.cat(prompts), lens, cache)
    at = [0, 0]
    for step in ([1, 1], [1, 1], [4, 1], [2, 5], [1, 1]):
        ids = torch.cat([t[a : a + s] for t, a, s in zip(new, at, step)])
        positions = torch.cat([torch.arange(n + a, n + a + s) for n, a, s in zip(lens, at, step)])
        got = model(ids, positions, step, cache).split(step)
        assert all(close(g, e[a : a + s]) for g, e, a, s in zip(got, expected, at, step))
        at = [a + s for a, s in zip(at, step)]


def test_same_memory():
    """On top of pruning the same keep is the same memory, but where pruning leaves less."""
    stages, q = {1: 0.5, 2: 0.25}, 2 * 4 * 8
    for method, counts in ((dense, [20, 20, 20]), (pruned(heads_of(stages), stages), [20, 20, 13])):
        cache = KVCache(3, extra=6)
        compressed(method, "h2o", 0.4)(tiny.build(), tiny.ids(50), [50], cache)
        assert cache.seqlens() == [[count] for count in counts]
        assert cache.nbytes() == sum(n + 6 for n in counts) * 2 * 2 * 8 * 8  # k, v, heads, D, bytes
        assert cache.extra_flops == q * sum(sum(range(n + 1)) for (n,) in cache.alive if n > 20)
    assert score_flops("snapkv", 32, 50, 40) == q * sum(range(19, 51))  # 32 queries
    assert score_flops("snapkv", 32, 40, 40) == score_flops("h2o", 32, 9, 20) == 0


def test_refused():
    window = tiny.build(model_type="mistral", sliding_window=7)
    with pytest.raises(ValueError, match="^h2o: not with a sliding window"):
        compressed(dense)(window, tiny.ids(30), [30], KVCache(3))
    with pytest.raises(ValueError, match="^KV compression 'magic': choose h2o, snapkv$"):
        compressed(dense, "magic")
    for share in (-0.1, 0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"^a share of {share} of the KV cache: above 0"):
            compressed(dense, "h2o", share)
