"""scorers.py against transformers' eager attention and plain loops."""

import math

import pytest
import tiny
import torch
from test_sdtp import close, kept_by_sort, masked

import scorers
from flops import executed_flops
from model import KVCache, Transformer

FIELDS = {"llama": {}, "window": {"model_type": "mistral", "sliding_window": 5}}
each_model = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)


@each_model
@pytest.mark.parametrize("n", [20, 6], ids=["long", "shorter than w"])
def test_attention_equals_transformers(fields, n, tmp_path):
    """The mean of the last 8 rows, and the sum of all, of transformers' eager attention weights."""
    from transformers import AutoModelForCausalLM

    how = dict(attn_implementation="eager", dtype=torch.float64)
    hf = AutoModelForCausalLM.from_pretrained(tiny.write(tmp_path, **fields), **how)
    out = hf(tiny.ids(n)[None], output_attentions=True, output_hidden_states=True)
    model = Transformer.from_pretrained(tmp_path, torch.float64)
    for layer, block in enumerate(model.layers):
        given = out.hidden_states[layer][0], torch.arange(n), [n], block
        weights = out.attentions[layer][0].float()  # (Hq, n, n)
        wanted = weights[:, -8:].mean((0, 1))
        assert (scorers.last_attention()(*given) - wanted).abs().max() < 1e-5
        assert (scorers.accumulated_attention(*given) - weights.sum((0, 1))).abs().max() < 1e-5
        assert wanted.max() - wanted.min() > 0.02


ALIVE = [0, 1, 4, 6, 7, 11, 12, 20, 21, 22], [0, 3, 4, 5, 9]  # of two prompts that lost tokens


def some_rows():
    """x (15, 32) float64, positions (15,), seqlens of ALIVE."""
    x = torch.randn(15, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([*ALIVE[0], *ALIVE[1]]), [10, 5]


def loop_products(block, x, positions):
    """Query times key [head][query][key] of one prompt, one dot product at a time."""
    x, positions = block.input_layernorm(x), torch.tensor(positions)
    q, (k, _) = block.self_attn.q(x, positions), block.self_attn.kv(x, positions)
    rows = range(len(x))
    return [[[float(q[i, h] @ k[j, h // 2]) for j in rows] for i in rows] for h in range(4)]


def loop_attention(block, x, positions, window):
    """Attention weights [head][query][key] of one prompt."""
    weights = loop_products(block, x, positions)
    for rows in weights:
        for i, row in enumerate(rows):
            seen = [0 <= positions[i] - p < window for p in positions]
            e = [math.exp(dot / 8**0.5) if see else 0.0 for dot, see in zip(row, seen)]
            rows[i] = [value / sum(e) for value in e]
    return weights


@each_model
@pytest.mark.parametrize("name, w, pool", [("lazyllm", 1, 1), ("fastkv", 8, 7), ("", 3, 3)])
def test_attention_of_what_is_alive(fields, name, w, pool):
    """Packed prompts that lost tokens as one at a time, windows by original position."""
    block, (x, positions, lens) = tiny.build(**fields).layers[1], some_rows()
    scorer = scorers.SCORERS.get(name) or scorers.last_attention(w, pool)
    got = scorer(x, positions, lens, block).split(lens)
    sums = scorers.accumulated_attention(x, positions, lens, block).split(lens)
    for rows, p, scores, total in zip(x.split(lens), ALIVE, got, sums):
        weights, n = loop_attention(block, rows, p, fields.get("sliding_window", 99)), len(p)
        seen = [[sum(weights[h][i][j] for h in range(4)) for i in range(n)] for j in range(n)]
        assert total.tolist() == pytest.approx([sum(column) for column in seen], abs=1e-5)
        means = [sum(column[-w:]) / 4 / min(w, n) for column in seen]
        wanted = [max(means[max(0, j - pool // 2) : j + pool // 2 + 1]) for j in range(n)]
        assert scores.tolist() == pytest.approx(wanted, abs=1e-5) and scores.dtype == torch.float32


def test_accumulated_comes_in_blocks(monkeypatch):
    """Never a whole map, no key repeated for the heads that share it; as the whole map's sums."""
    shapes, real = [], scorers.attention_weights
    q, k, p = torch.randn(150, 4, 8), torch.randn(150, 2, 8), 3 * torch.arange(150)
    wanted = real(q, k, p, p).sum(1).view(2, 2, 150).sum(1)
    note = lambda q, k, *rest: shapes.append((len(q), *k.shape)) or real(q, k, *rest)  # noqa: E731
    monkeypatch.setattr(scorers, "attention_weights", note)
    assert (scorers.accumulated(q, k, p) - wanted).abs().max() < 1e-4
    assert shapes == [(64, 64, 2, 8), (64, 128, 2, 8), (22, 150, 2, 8)]


def test_gemfilter():
    """What the last query's products with one layer's keys choose, read as a new prompt."""
    model, lens, cache = tiny.build(num_hidden_layers=5), [40, 12], KVCache(5)
    ids, expected = torch.cat([tiny.ids(n) for n in lens]), []
    got = scorers.method("gemfilter", {0: 0.4})(model, ids, lens, cache)
    for prompt in ids.split(lens):
        x, n, positions = model.embed(prompt), len(prompt), torch.arange(len(prompt))
        for block in model.layers[:2]:
            x = block(x, positions, [n])
        products = loop_products(model.layers[2], x, range(n))
        dots = [sum(products[h][-1][j] for h in range(4)) for j in range(n)]
        means = {j: sum(dots[max(0, j - 2) : j + 3]) / 5 for j in range(n)}
        expected.append(prompt[kept_by_sort(means, n, 0.4)])
    assert all(close(g, model(e)[-1]) for g, e in zip(got, expected))
    assert cache.next_positions().tolist() == list(map(len, expected)) == [16, 5]
    filtering = [executed_flops(model.config, n, [n] * 2, logit_rows=0) for n in lens]
    assert cache.extra_flops == sum(map(sum, filtering))


def test_self_information():
    """Kept, at their positions, are tokens that a forward over those before finds unlikely."""
    model, lens, cache = tiny.build(), [30, 1, 21], KVCache(3)
    ids = torch.cat([tiny.ids(n) for n in lens])
    got = scorers.method("self_information", {0: 0.5})(model, ids, lens, cache)
    for prompt, logits in zip(ids.split(lens), got):
        nats = [math.inf]
        for i in range(1, len(prompt)):
            nats.append(-model(prompt[:i])[-1].log_softmax(-1)[prompt[i]].item())
        heads = {0: lambda *_, nats=nats: torch.tensor(nats)}
        wanted, _ = masked(model, prompt, len(prompt), heads, {0: 0.5})
        assert close(logits, wanted[-1])
    passes = [executed_flops(model.config, n, [n] * 3, logit_rows=n) for n in lens]
    assert cache.extra_flops == sum(map(sum, passes))


def test_scores_of_each_prompt():
    """Random ones by each prompt's generator, new at every stage; given ones by position."""
    seeded = [torch.Generator().manual_seed(seed) for seed in (3, 4, 4)]
    both, x = scorers.random(*seeded[:2]), torch.zeros(9, 8)
    first = both(x, None, [5, 4], None)
    assert torch.equal(first[5:], scorers.random(seeded[2])(x[:4], None, [4], None))
    assert not torch.equal(both(x, None, [5, 4], None), first) and first.dtype == torch.float32
    labels = [torch.tensor([5.0, 1.0, 4.0, 2.0], dtype=torch.float64), torch.tensor([7.0, 8.0])]
    rows = x[:3], torch.tensor([1, 3, 0]), [2, 1], None
    given = scorers.by_position(labels)(*rows)
    assert given.tolist() == [1.0, 2.0, 7.0] and given.dtype == torch.float32
    assert scorers.most_recent(*rows).tolist() == [1, 3, 0]
    assert scorers.earliest(*rows).tolist() == [-1, -3, 0]
