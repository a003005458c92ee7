"""kv.py against plain loops over whole attention maps, and a model that hides the keys that kv.py drops."""

import math

import pytest
import tiny
import torch

import scorers
from kv import Compression, compression
from model import KVCache, attend
from sample import SampleConfig
from sdtp import LateKV, Schedule, generate, keep_count, prefill

MODELS = {"grouped": {}, "one head per key": {"num_key_value_heads": 4}, "one key head": {"num_key_value_heads": 1}}
each_model = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
each_method = pytest.mark.parametrize("method", ["h2o", "snapkv"])
STAGES = Schedule(3, {1: 0.7, 2: 0.45})


def heads():
    """An exact scorer for every layer."""
    weights = torch.randn(3, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {i: lambda x, positions, seqlens, block, w=w: (x * w).sum(-1).float() for i, w in enumerate(weights)}


def maps(q, k, positions, k_positions):
    """Attention weights [query head][query][key], one dot product at a time."""
    out = []
    for h in range(q.shape[1]):
        rows = []
        for i, p in enumerate(positions):
            e = [
                math.exp(float(q[i, h] @ k[j, h * k.shape[1] // q.shape[1]]) / math.sqrt(q.shape[-1]))
                if s <= p
                else 0.0
                for j, s in enumerate(k_positions)
            ]
            rows.append([x / sum(e) for x in e])
        out.append(rows)
    return out


def kept_by_loop(method, q, k, positions, budget):
    """For each key head the rows it keeps, ascending. Plain Python over whole maps."""
    T, Hkv, group = len(positions), k.shape[1], q.shape[1] // k.shape[1]
    if T <= budget:
        return [list(range(T))] * Hkv
    weights, kept = maps(q, k, positions, positions), []
    for head in range(Hkv):
        own = weights[head * group : (head + 1) * group]
        recent = (budget + 1) // 2 if method == "h2o" else 32
        queries = range(T) if method == "h2o" else range(T - 32, T)
        scores = [sum(w[i][j] for w in own for i in queries) for j in range(T - recent)]
        if method == "snapkv":
            scores = [max(scores[max(0, j - 3) : j + 4]) for j in range(len(scores))]
        best = sorted(range(T - recent), key=lambda j: (-scores[j], -j))[: budget - recent]
        kept.append(sorted(best) + list(range(T - recent, T)))
    return kept


class Watch:
    """A prefill's q, k, v and positions of each layer and prompt, which go on to what the real thing gives."""

    def __init__(self, kv):
        self.kv, self.seen = kv, []

    def attend(self, cache, prompt_lens):
        real = self.kv.attend(cache, prompt_lens)

        def watching(q, k, v, positions, k_positions, seqlens, k_seqlens, window):
            self.seen.append(list(zip(*(t.split(seqlens) for t in (q, k, v, positions)))))
            return real(q, k, v, positions, k_positions, seqlens, k_seqlens, window)

        return watching

    def held(self, alive, n):
        return self.kv.held(alive, n)


LENS = [60, 1, 37, 52, 9]
BUDGET = {  # method, share -> tokens of each of LENS, by hand
    ("h2o", 0.4): [24, 1, 15, 21, 4],
    ("h2o", 0.13): [8, 1, 5, 7, 1],
    ("h2o", 1.0): LENS,
    ("snapkv", 0.8): [48, 1, 32, 42, 9],
    ("snapkv", 0.1): [32, 1, 32, 32, 9],  # its window stays
}


@each_model
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "sdtp"])
@pytest.mark.parametrize("method, share", BUDGET)
def test_kept_equals_a_loop(fields, method, share, pruned):
    """Each layer and key head of a ragged batch holds the keys and values that a loop over its whole map keeps."""
    model, kv = tiny.build(**fields), Watch(Compression(method, share))
    ids, args = torch.cat([tiny.ids(n) for n in LENS]), (heads(), STAGES) if pruned else ()
    logits, cache = prefill(model, ids, *args, seqlens=LENS, kv=kv)
    assert torch.equal(logits, prefill(model, ids, *args, seqlens=LENS)[0])  # what is dropped was still attended to
    assert cache.alive == [[len(p) for *_, p in sequences] for sequences in kv.seen]
    dropped = 0
    for layer, sequences in zip(cache.layers, kv.seen, strict=True):
        for i, ((q, k, v, p), budget) in enumerate(zip(sequences, BUDGET[method, share], strict=True)):
            kept = kept_by_loop(method, q, k, p.tolist(), budget)
            assert layer.seqlens[i] == len(kept[0]) == min(len(p), budget)
            for h, rows in enumerate(kept):
                assert torch.equal(layer.k[i, h, : len(rows)], k[rows, h])
                assert torch.equal(layer.v[i, h, : len(rows)], v[rows, h])
            latest = [max(p[r] for r in rows) for rows in zip(*kept)]
            assert layer.positions[i, : len(latest)].tolist() == latest
            dropped += len(p) - len(kept[0])
    assert (dropped > 0) == (share < 1)


@each_model
@each_method
def test_heads_differ(fields, method):
    """Key heads keep other tokens than one another, where there are several, and layers too."""
    model, kv = tiny.build(**fields), Watch(Compression(method, 0.75))
    prefill(model, tiny.ids(60), kv=kv)
    kept = [kv.kv.select(q, k, p, p, 60).T.tolist() for ((q, k, _, p),) in kv.seen]
    assert len({str(rows) for layer in kept for rows in layer}) == 3 * len(kept[0])
    assert all(len(rows) == 45 and rows[-1] == 59 for layer in kept for rows in layer)


@each_method
def test_ties_go_to_the_later(method):
    """Of tokens with equal attention the later stay."""
    q, k = torch.zeros(50, 4, 8), torch.zeros(50, 2, 8)
    rows = Compression(method, 0.8).select(q, k, torch.arange(50), torch.arange(50), 50)
    last = 1 / torch.arange(1, 51)  # what every query pays to each of those before it
    if method == "h2o":  # earlier tokens get more of such attention
        assert last[0] > last[1] and rows.T.tolist() == [[*range(20), *range(30, 50)]] * 2
    else:
        assert rows.T.tolist() == [[*range(10, 50)]] * 2


@each_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keep_1_changes_no_bit(method, dtype):
    """kv_keep 1, dense and pruned: logits, cache and generated tokens are those without compression."""
    model, ids, lens = tiny.build().to(dtype), torch.cat([tiny.ids(n) for n in (41, 17)]), [41, 17]
    for args in ((), (heads(), STAGES)):
        (logits, cache), (wanted, plain) = (
            prefill(model, ids, *args, seqlens=lens, cache=KVCache(3, 5), kv=kv)
            for kv in (Compression(method, 1), None)
        )
        assert torch.equal(logits, wanted) and cache.seqlens() == plain.seqlens() and cache.nbytes() == plain.nbytes()
        for a, b in zip(cache.layers, plain.layers):
            assert all(torch.equal(t, u) for t, u in zip(a.rows(), b.rows(), strict=True))
        new = generate(model, ids, 8, *args, seqlens=lens, kv=Compression(method, 1))
        assert new == generate(model, ids, 8, *args, seqlens=lens)


def hidden_not_dropped(model, prompt, new, kv, args=()):
    """Logits of the tokens `new` after a prompt, one at a time, each a loop over heads in which the keys that a layer's
    head has dropped are masked out of the whole prompt's (those that a schedule drops too)."""
    watch, n = Watch(kv), len(prompt)
    prefill(model, prompt, *args, kv=watch)
    layers = [
        [kept_by_loop(kv.method, q, k, p.tolist(), kv.count(n)), k, v] for ((q, k, v, p),) in watch.seen
    ]  # rows per head, keys and values alive
    logits = []
    for step, token in enumerate(new):
        x, position = model.embed(token[None]), torch.tensor([n + step])
        for block, layer in zip(model.layers, layers):
            q, k, v = block.self_attn.qkv(block.input_layernorm(x), position)
            layer[1], layer[2], mixed = torch.cat((layer[1], k)), torch.cat((layer[2], v)), []
            for h in range(q.shape[1]):
                head, alive = h * k.shape[1] // q.shape[1], len(layer[1]) - step - 1
                mask = torch.full((len(layer[1]),), -torch.inf, dtype=x.dtype)
                mask[layer[0][head]] = mask[alive:] = 0
                weights = (layer[1][:, head] @ q[0, h] / math.sqrt(q.shape[-1]) + mask).softmax(-1)
                mixed.append(weights @ layer[2][:, head])
            x = x + block.self_attn.o_proj(torch.cat(mixed)[None])
            x = x + block.mlp(block.post_attention_layernorm(x))
        logits.append(model.logits(x)[0])
    return torch.stack(logits)


@each_model
@each_method
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "sdtp"])
@pytest.mark.parametrize("extra", [0, 12])
def test_decoding_after_compression(fields, method, pruned, extra):
    """Rows added to a compressed cache, one or several at a time, have the logits of a loop that masks the dropped keys."""
    model, lens, kv, args = (
        tiny.build(**fields),
        [50, 44],
        Compression(method, 0.4),
        (heads(), STAGES) if pruned else (),
    )
    prompts, new = [tiny.ids(n, 1) for n in lens], [tiny.ids(10, 2), tiny.ids(11, 2)]
    expected = [hidden_not_dropped(model, p, t, kv, args) for p, t in zip(prompts, new)]
    plain = model(torch.cat((prompts[0], new[0])))[50:]
    assert (expected[0] - plain).abs().max() > 0.1  # something was dropped that mattered
    cache, at = KVCache(3, extra), [0, 0]
    prefill(model, torch.cat(prompts), *args, seqlens=lens, cache=cache, kv=kv)
    for step in ([1, 1], [1, 1], [4, 1], [2, 5], [1, 1]):
        ids = torch.cat([t[a : a + s] for t, a, s in zip(new, at, step)])
        positions = torch.cat([torch.arange(n + a, n + a + s) for n, a, s in zip(lens, at, step)])
        got = model(ids, positions, step, cache).split(step)
        assert all((g - e[a : a + s]).abs().max() < 1e-10 for g, e, a, s in zip(got, expected, at, step))
        at = [a + s for a, s in zip(at, step)]


@each_method
def test_generate_equals_the_loop(method):
    """Greedy generation over a compressed cache, ragged batch and single, goes on from the true position."""
    model, kv, lens = tiny.build(), Compression(method, 0.5), [45, 40]
    prompts, args = [tiny.ids(n, 4) for n in lens], (heads(), STAGES)
    expected = []
    for prompt in prompts:
        tokens = prefill(model, prompt, *args, kv=kv)[0].argmax(-1)
        for _ in range(7):
            tokens = torch.cat((tokens, hidden_not_dropped(model, prompt, tokens, kv, args)[-1:].argmax(-1)))
        expected.append(tokens.tolist())
    assert generate(model, torch.cat(prompts), 8, *args, seqlens=lens, kv=kv) == expected
    assert [generate(model, p, 8, *args, kv=kv)[0] for p in prompts] == expected


@each_method
def test_packed_equals_single(method):
    """A packed ragged batch holds what each prompt by itself does."""
    model, prompts, kv = tiny.build(), [tiny.ids(n) for n in LENS], Compression(method, 0.7)
    cache = prefill(model, torch.cat(prompts), heads(), STAGES, LENS, kv=kv)[1]
    for i, prompt in enumerate(prompts):
        single = prefill(model, prompt, heads(), STAGES, kv=kv)[1]
        for a, b in zip(cache.layers, single.layers):
            for t, u in zip(a.rows(), b.rows(), strict=True):
                torch.testing.assert_close(t.split(a.seqlens)[i], u, rtol=0, atol=1e-10)


@tiny.on_cuda
@each_method
def test_cuda_equals_cpu(method):
    """After a pruned prefill on CUDA a ragged batch holds what it does on the CPU."""
    model, kv, ids = tiny.build(), Compression(method, 0.7), torch.cat([tiny.ids(n) for n in LENS])
    expected = prefill(model, ids, dict.fromkeys(STAGES, scorers.norm), STAGES, LENS, kv=kv)[1]
    got = prefill(model.cuda(), ids.cuda(), dict.fromkeys(STAGES, scorers.norm), STAGES, LENS, kv=kv)[1]
    for a, b in zip(got.layers, expected.layers):
        for t, u in zip(a.rows(), b.rows(), strict=True):
            torch.testing.assert_close(t.cpu(), u, rtol=0, atol=1e-9)


def test_bytes_fall():
    """Allocated are the tokens held and those to come; a layer that SDTP leaves fewer than the budget keeps them all."""
    model, stages = tiny.build(), Schedule(3, {1: 0.5, 2: 0.25})
    for args, counts in (((), [20, 20, 20]), ((heads(), stages), [20, 20, 13])):
        cache = KVCache(3, extra=6)
        prefill(model, tiny.ids(50), *args, cache=cache, kv=Compression("h2o", 0.4))
        assert [lengths[0] for lengths in cache.seqlens()] == counts
        assert cache.nbytes() == sum(n + 6 for n in counts) * 2 * 2 * 8 * 8  # k and v, heads, head_dim, float64


@each_model
def test_accumulated(fields):
    """accumulated() in blocks of any size is the column sums of the whole maps of a key head's queries."""
    model, p = tiny.build(**fields), [*range(5), 9, 10, *range(20, 33)]
    q, k, _ = model.layers[0].self_attn.qkv(torch.randn(len(p), 32, dtype=torch.float64), torch.tensor(p))
    group, whole = q.shape[1] // k.shape[1], maps(q, k, p, p)
    expected = [
        [sum(whole[h][i][j] for h in range(g * group, g * group + group) for i in range(len(p))) for j in range(len(p))]
        for g in range(k.shape[1])
    ]
    for rows in (1, 6, 256):
        got = scorers.accumulated(q, k, torch.tensor(p), torch.tensor(p), rows=rows)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    some = [0, 1, 7, 8, 15, 19]  # rows of which alone there are queries
    expected = [
        [sum(whole[h][i][j] for h in range(g * group, g * group + group) for i in some) for j in range(len(p))]
        for g in range(k.shape[1])
    ]
    for rows in (1, 4, 256):
        got = scorers.accumulated(q[some], k, torch.tensor(p)[some], torch.tensor(p), rows=rows)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


@each_method
@each_model
def test_late(fields, method):
    """After a LateKV heads keep as many, by the queries of the tokens that went on, and of the others too; logits are those without compression."""
    model, kv = tiny.build(**fields), Compression(method, 0.7)
    late, stages = LateKV(model.config, 1).double(), Schedule(3, {1: 0.0}, late=True)
    ids, lens = torch.cat([tiny.ids(60), tiny.ids(50)]), [60, 50]
    logits, whole = prefill(model, ids, {1: late}, stages, lens)
    got, cache = prefill(model, ids, {1: late}, stages, lens, kv=kv)
    assert (
        torch.equal(got, logits) and cache.seqlens() == [[42, 35]] * 3 and cache.alive == [[60, 50], [10, 9], [10, 9]]
    )
    k, _, positions = (t.split([60, 50])[0] for t in whole[2].rows())
    kept = cache[2].rows()[0][:42]  # (42, Hkv, D)
    for head in range(k.shape[1]):
        rows = [(k[:, head] == row).all(-1).nonzero().item() for row in kept[:, head]]
        assert rows == sorted(rows) and set(range(39, 60)) <= set(rows)
    # queries per layer; the last six see all that is left behind, the first four of them nothing
    seen = [60] + [10] * 2
    pairs = (
        [sum(range(61)), *[sum(range(11)) + 6 * 50] * 2]
        if method == "h2o"
        else [sum(range(29, 61)), *[sum(range(55, 61))] * 2]
    )
    assert kv.flops(model.config, seen, 60, [60] * 3) == 2 * 8 * 4 * sum(pairs)


def test_scores_come_in_blocks(monkeypatch):
    """H2O never holds a whole map, and no key is repeated for the heads that share it."""
    shapes, real = [], scorers.attention_weights
    note = lambda q, k, *rest: shapes.append((len(q), *k.shape)) or real(q, k, *rest)
    monkeypatch.setattr(scorers, "attention_weights", note)
    q, k = torch.randn(150, 4, 8), torch.randn(150, 2, 8)
    scorers.accumulated(q, k, torch.arange(150), torch.arange(150))
    assert shapes == [(64, 64, 2, 8), (64, 128, 2, 8), (22, 150, 2, 8)]


@each_method
def test_flops(method):
    """flops() counts the products of the queries that score with the keys they see, at layers that drop something."""
    model, kv = tiny.build(), Compression(method, 0.7)
    pairs = sum(i + 1 for t in (50, 40) for i in range(t) if method == "h2o" or i >= t - 32)
    assert kv.flops(model.config, [50, 40, 35], 50) == 2 * 8 * 4 * pairs


def test_guard(monkeypatch):
    """A compression that drops nothing, and pruning that drops nothing under one, are errors."""
    model, kv = tiny.build(), Compression("h2o", 0.4)
    monkeypatch.setattr("sdtp.select", lambda scores, *_: (torch.arange(len(scores)), [len(scores)]))
    with pytest.raises(RuntimeError, match="layer 1 holds .50. .* pruning was not applied"):
        prefill(model, tiny.ids(50), heads(), STAGES, kv=kv)
    everything = lambda self, q, k, p, k_p, n: torch.arange(len(k))[:, None].expand(len(k), 2)
    monkeypatch.setattr(Compression, "select", everything)
    with pytest.raises(RuntimeError, match="layer 0 holds .50. tokens where .20. are asked for: compression was not"):
        prefill(model, tiny.ids(50), kv=kv)
    monkeypatch.setattr(Compression, "attend", lambda *_: attend)
    with pytest.raises(RuntimeError, match="layer 0 holds .. tokens where .20. are asked for: compression was not"):
        generate(model, tiny.ids(50), 2, kv=kv)


def test_refused():
    """Windows, an unknown method, shares out of (0, 1], and a share without a method: one line that names it."""
    window = tiny.build(model_type="mistral", sliding_window=7)
    with pytest.raises(ValueError, match=r"^--kv h2o: not for a model with a sliding window \(7 positions\)$"):
        prefill(window, tiny.ids(30), kv=Compression("h2o", 0.4))
    with pytest.raises(ValueError, match="^--kv magic: choose h2o, snapkv$"):
        compression(SampleConfig(kv="magic"))
    for share in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"^--kv_keep {share}: a number above 0"):
            compression(SampleConfig(kv="h2o", kv_keep=share))
    with pytest.raises(ValueError, match=r"^--kv_keep 0.4: give --kv too"):
        compression(SampleConfig(kv_keep=0.4))
    assert compression(SampleConfig()) is None
    assert compression(SampleConfig(kv="snapkv")) == Compression("snapkv", 0.4)


def test_count():
    """The budget is a share of the prompt's length, rounded as every share; SnapKV's window is its floor."""
    for n in (1, 31, 32, 100, 1001):
        assert Compression("h2o", 0.4).count(n) == keep_count(n, 0.4)
        assert Compression("snapkv", 0.4).count(n) == max(min(n, 32), keep_count(n, 0.4))
    assert Compression("h2o", 0.4).held([100, 60, 30], 100) == [40, 40, 30]
