"""sdtp.py against plain references: Python sorts, and a float64 model that hides tokens where sdtp.py drops them."""

import json
import math
from decimal import ROUND_HALF_UP, Decimal

import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import scorers
import sdtp
from model import KVCache, Transformer, attention_weights, visible
from sdtp import (
    LateKV,
    PruneHead,
    Schedule,
    executed_flops,
    generate,
    is_protected,
    keep_count,
    load_heads,
    pairs,
    paper_stages,
    prefill,
    protected_count,
    save_heads,
    select,
    write_atomic,
)

MODELS = {  # every one with grouped keys, stages at layers 1, 2 and 4 below
    "full": dict(num_hidden_layers=5),
    "window": dict(num_hidden_layers=5, model_type="mistral", sliding_window=7),
    "window on some layers": dict(
        num_hidden_layers=5, model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=2
    ),
}  # fmt: skip
each_model = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)


def late_stages(model, share=0.6):
    """(Schedule with a LateKV at layer 2, after a stage at layer 1; its scorers), random maps."""
    torch.manual_seed(0)
    late = LateKV(model.config, 2).double()
    return Schedule(5, {1: share, 2: 0.0}, late=True), {1: random_heads(model)[1], 2: late}


def stages(ratio):
    return Schedule(5, {layer: ratio ** (s + 1) for s, layer in enumerate((1, 2, 4))})


def random_heads(model, seed=0):
    """A linear scorer for every layer, in float64: a head's call, exact whatever rows it is given together."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(model.layers), model.config.hidden_size, generator=g, dtype=torch.float64)
    scorers = [lambda x, positions, seqlens, block, w=w: (x.double() * w).sum(-1).float() for w in weights]
    return dict(enumerate(scorers))


def kept_by_sort(scores, positions, n, share):
    """Positions kept, ascending: the protected, then by score, of equal ones the later. Plain Python."""
    last = max(1, int(n * 0.1 + 0.5))
    protected = [p for p in positions if p < 4 or p >= n - last]
    count = max(1, min(len(positions), max(int(n * share + 0.5), len(protected))))
    others = sorted((-score, -p) for score, p in zip(scores, positions) if p not in protected)
    return sorted(protected + [-p for _, p in others[: count - len(protected)]])


def loop_span_means(scores, positions, span, n):
    """For each position the mean score of those of its span that are alive and may be dropped, 0 for the protected. Plain Python."""
    may_drop = lambda p: 4 <= p < n - max(1, int(n * 0.1 + 0.5))  # noqa: E731
    members = {p: [s for s, q in zip(scores, positions) if q // span == p // span and may_drop(q)] for p in positions}
    return [(torch.tensor(sum(m)) / len(m)).item() if may_drop(p) else 0.0 for p, m in members.items()]


def hidden_not_dropped(model, ids, n, scorers=None, schedule=()):
    """All tokens stay in place; those of the prompt (the first n) are hidden from their stage on, or where a LateKV stands
    their keys and values replaced in all layers after it.

    Returns logits (T, vocab_size) and per layer (positions held, k, v of all tokens).
    """
    x, positions, alive, layers = model.embed(ids), torch.arange(len(ids)), torch.ones(len(ids), dtype=torch.bool), []
    foretold, left = [], ~alive
    for layer, block in enumerate(model.layers):
        if layer in schedule:
            late = scorers.get(layer) if isinstance(scorers.get(layer), LateKV) else None
            before = alive.clone()
            scores = [0.0] * len(ids) if late else scorers[layer](x, positions, [len(ids)], block).tolist()
            old = positions[:n][alive[:n]].tolist()
            alive[:n] = False
            means = loop_span_means([scores[p] for p in old], old, schedule.span, n)
            alive[kept_by_sort(means, old, n, schedule[layer])] = True
            if late:
                unit = x / x.pow(2).mean(-1, keepdim=True).sqrt()
                maps = late.proj.weight.unflatten(0, (-1, 2, model.config.num_key_value_heads * 8))
                biases = late.proj.bias.unflatten(0, maps.shape[:3])
                foretold = [[unit @ w.T + b for w, b in zip(*pair)] for pair in zip(maps, biases)]
                left, first = before & ~alive, layer + 1
        q, k, v = block.self_attn.qkv(block.input_layernorm(x), positions)
        if foretold and layer >= first:
            k_late, v_late = (t.unflatten(-1, (-1, 8)) for t in foretold[layer - first])
            k, v = k.clone(), v.clone()
            k[left], v[left] = block.self_attn.rope(k_late, positions)[left], v_late[left]
        layers.append((positions[alive | left], k, v))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        seen = visible(positions, positions, block.self_attn.window) & (
            alive | left | torch.eye(len(ids), dtype=torch.bool)
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + block.self_attn.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.logits(x), layers


# ---------------------------------------------------------------------------- how many, and which


@given(st.integers(1, 10**6), st.integers(0, 1024), st.integers(0, 50))
def test_keep_count(n, k, protected):
    """n * share rounded half up (shares exact in binary, so that halves are halves), at least protected and 1, at most n."""
    rounded = int((Decimal(n) * k / 1024).quantize(Decimal(1), ROUND_HALF_UP))
    assert keep_count(n, k / 1024, protected) == min(n, max(1, protected, rounded))


@given(st.integers(1, 10**5), st.floats(0, 1))
def test_keep_count_any_share(n, share):
    """Any share is met to half a token, and counts never grow as the share falls."""
    assert 1 <= keep_count(n, share) <= n
    assert abs(keep_count(n, share) - max(1, n * share)) <= 0.5 + 1e-9
    assert keep_count(n, share / 2) <= keep_count(n, share)


def test_protected():
    """protected_count counts is_protected: the first 4 and the last 10 % of the prompt, for prompts of 1 to 200."""
    for n in range(1, 201):
        wanted = [p < 4 or p >= n - max(1, int(n * 0.1 + 0.5)) for p in range(n)]
        assert is_protected(torch.arange(n), n).tolist() == wanted
        assert protected_count(n) == sum(wanted)


def test_schedule_of_the_paper():
    """Layers 4, 7, ..., shares 0.9^s: 10 stages in 32 layers and in deeper models, 9 in 30; a mean of 0.655 alive (1.53x)."""
    schedule = Schedule(32)
    assert list(schedule) == list(range(4, 32, 3)) and len(schedule) == 10 == len(Schedule(80))
    assert list(schedule.values()) == pytest.approx([0.9**s for s in range(1, 11)])
    assert list(Schedule(30)) == list(range(4, 30, 3)) and len(Schedule(30)) == 9
    assert 32 * 10000 / sum(schedule.alive(10000)) == pytest.approx(1.53, abs=0.005)
    assert list(Schedule(12, first_layer=2, step=4, stages=2, ratio=0.5).items()) == [(2, 0.5), (6, 0.25)]


def test_schedule_alive():
    """Counts alive per layer of an explicit schedule, in any order given; the protected tokens are a floor."""
    assert Schedule(6, {4: 0.25, 2: 0.5}).alive(40) == [40, 40, 20, 20, 10, 10]
    assert Schedule(6, {4: 0.01, 0: 0.5}).alive(40) == [20, 20, 20, 20, 8, 8]
    assert Schedule(2, {0: 0.0}).alive(3) == [3, 3]


@pytest.mark.parametrize(
    "layers, shares, named",
    [(6, {6: 0.5}, "layer 6"), (6, {-1: 0.5}, "layer -1"), (6, {2: 1.5}, "1.5"), (6, {2: -0.1}, "-0.1"), (6, {2: 0.5, 3: 0.6}, "0.6"),
     (6, {2: float("nan")}, "nan"), (6, {}, "no stage"), (4, None, "no stage")],
)  # fmt: skip
def test_schedule_refuses(layers, shares, named):
    """A stage outside the model, a share that grows or is none, and a schedule without a stage are refused by name."""
    with pytest.raises(ValueError, match=named):
        Schedule(layers, shares)


@pytest.mark.parametrize("span", [0, -8])
def test_schedule_refuses_spans(span):
    """A span of no token is refused by name."""
    with pytest.raises(ValueError, match=f"spans of {span} tokens"):
        Schedule(6, {2: 0.5}, span=span)


def test_select_ties():
    """Of equal scores the later token stays; protected tokens stay whatever they score; rows ascend."""
    n, positions = 20, torch.arange(20)  # protected: 0 to 3, 18 and 19
    keep, kept = select(torch.zeros(n), positions, 0.5, [n], [n])
    assert keep.tolist() == [0, 1, 2, 3, 14, 15, 16, 17, 18, 19] and kept == [10]
    scores = torch.where(is_protected(positions, n), -torch.inf, -positions.float())
    assert select(scores, positions, 0.5, [n], [n])[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 18, 19]
    assert select(scores, positions, 0.0, [n], [n])[0].tolist() == [0, 1, 2, 3, 18, 19]


@given(st.data(), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.floats(0, 1))
def test_select_equals_python_sort(data, prompt_lens, share):
    """select, packed, over prompts that have lost tokens before, equals a Python sort of each prompt by itself; few distinct scores, so many ties."""
    parts, scores, wanted = [], [], []
    for n in prompt_lens:
        alive = [p for p in range(n) if is_protected(torch.tensor(p), n) or data.draw(st.booleans())]
        parts.append(alive)
        scores.append(
            data.draw(
                st.lists(st.sampled_from([-torch.inf, -1.5, 0.0, 0.25, 3.0]), min_size=len(alive), max_size=len(alive))
            )
        )
        wanted.append(kept_by_sort(scores[-1], alive, n, share))
    positions = torch.tensor(sum(parts, []))
    keep, kept = select(torch.tensor(sum(scores, [])), positions, share, [len(p) for p in parts], prompt_lens)
    assert [p.tolist() for p in positions[keep].split(kept)] == wanted
    assert (keep.diff() > 0).all()
    for n, alive, s, w in zip(prompt_lens, parts, scores, wanted):  # packed equals single
        assert [alive[i] for i in select(torch.tensor(s), torch.tensor(alive), share, [len(alive)], [n])[0]] == w


@pytest.mark.parametrize("span", [1, 8])
def test_select_not_a_number(span):
    """A score that is no number, or infinite, never takes the place of a protected token."""
    scores = torch.tensor([1.0] * 4 + [torch.nan] * 5 + [torch.inf] * 5 + [-torch.inf] * 6)
    keep, _ = select(scores, torch.arange(20), 0.3, [20], [20], span)
    assert keep.tolist() == [0, 1, 2, 3, 18, 19]


@given(st.data(), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.floats(0, 1), st.integers(2, 20))
def test_select_spans(data, prompt_lens, share, span):
    """With spans, select is the same sort after each score gave way to its span's mean, over what is alive of it and not protected."""
    parts, scores, wanted = [], [], []
    for n in prompt_lens:
        alive = [p for p in range(n) if is_protected(torch.tensor(p), n) or data.draw(st.booleans())]
        values = data.draw(st.lists(st.integers(-4, 4), min_size=len(alive), max_size=len(alive)))
        parts.append(alive)
        scores.append([float(v) for v in values])
        wanted.append(kept_by_sort(loop_span_means(scores[-1], alive, span, n), alive, n, share))
    positions = torch.tensor(sum(parts, []))
    lens = [len(p) for p in parts]
    keep, kept = select(torch.tensor(sum(scores, [])), positions, share, lens, prompt_lens, span)
    assert [p.tolist() for p in positions[keep].split(kept)] == wanted


def test_select_keeps_whole_spans():
    """Spans are whole but for the protected tokens and the one that fills the count, of which the later tokens stay."""
    scores = torch.zeros(100)
    scores[[20, 47, 65]] = torch.tensor([3.0, 2.0, 1.0])
    keep, kept = select(scores, torch.arange(100), 0.34, [100], [100], 8)
    assert keep.tolist() == [0, 1, 2, 3, *range(16, 24), *range(40, 48), *range(68, 72), *range(90, 100)] and kept == [
        34
    ]


# ---------------------------------------------------------------------------- prefill


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_1_changes_no_bit(fields, dtype, monkeypatch):
    """Ratio 1, with select really called at every stage, gives logits and K/V torch.equal to prefill without a schedule."""
    model, lens, calls = tiny.build(dtype, **fields), [40, 3, 21], []
    monkeypatch.setattr(sdtp, "select", lambda *args: calls.append(args) or select(*args))
    ids, schedule = torch.cat([tiny.ids(n) for n in lens]), stages(1.0)
    for ids, lens in ((ids, lens), (ids[:40], None)):
        calls.clear()
        dense, dense_cache = prefill(model, ids, seqlens=lens)
        assert not calls
        pruned, cache = prefill(model, ids, random_heads(model), schedule, lens)
        assert len(calls) == len(schedule) and torch.equal(pruned, dense)
        for a, b in zip(cache.layers, dense_cache.layers):
            assert all(torch.equal(t, u) for t, u in zip(a.rows(), b.rows(), strict=True))


def test_half_asked_pruning_is_refused():
    """Scorers without a schedule, a schedule without scorers or without one of them: never a silent dense run."""
    model, schedule = tiny.build(), Schedule(3, {1: 0.5, 2: 0.4})
    heads = random_heads(model)
    for rankers, stages in ((heads, None), (None, schedule), ({1: heads[1]}, schedule)):
        with pytest.raises(ValueError, match="pruning needs both"):
            prefill(model, tiny.ids(30), rankers, stages)


@each_model
def test_floor_needs_no_scorer(fields):
    """A stage with a share of 0 keeps the protected tokens, as one with a scorer and a share too small for any other does."""
    model = tiny.build(**fields)
    heads = random_heads(model)
    floor, small = (Schedule(5, {1: 0.6, 3: share}, span=4) for share in (0.0, 1e-6))
    assert floor.scored() == [1] and small.scored() == [1, 3]
    alone = prefill(model, tiny.ids(40), None, Schedule(5, {2: 0.0}))[1].seqlens()
    assert alone == [[40]] * 2 + [[protected_count(40)]] * 3
    for lens in ([40], [31, 12, 50]):
        ids = torch.cat([tiny.ids(n) for n in lens])
        got, cache = prefill(model, ids, {1: heads[1]}, floor, lens)
        wanted, other = prefill(model, ids, heads, small, lens)
        assert torch.equal(got, wanted) and cache.seqlens() == other.seqlens()
        assert cache.seqlens()[3] == [protected_count(n) for n in lens]


@each_model
@pytest.mark.parametrize("ratio", [1, 0.9, 0.5, 0.1])
def test_pruned_equals_hidden(fields, ratio):
    """Pruned prefill of 1 to 50 tokens has the logits and K/V of a model that hides the dropped tokens, which stay in place."""
    model, schedule = tiny.build(**fields), stages(ratio)
    heads, dropped = random_heads(model), 0
    for n in range(1, 51):
        ids = tiny.ids(n)
        logits, cache = prefill(model, ids, heads, schedule)
        expected, layers = hidden_not_dropped(model, ids, n, heads, schedule)
        assert logits.shape == (1, 61) and (logits[0] - expected[-1]).abs().max() < 1e-10
        for layer, (kept, k, v) in zip(cache.layers, layers):
            got_k, got_v, positions = layer.rows()
            assert torch.equal(positions, kept)
            assert (got_k - k[kept]).abs().max() < 1e-10 and (got_v - v[kept]).abs().max() < 1e-10
        assert [c[0] for c in cache.seqlens()] == schedule.alive(n)
        dropped += n - schedule.alive(n)[-1]
    assert dropped > 50 if ratio < 1 else dropped == 0


@each_model
def test_packed_equals_single(fields):
    """A packed ragged batch keeps the same tokens, K/V and logits as each prompt by itself, with real heads too."""
    model, lens, schedule = tiny.build(**fields), [1, 33, 50, 7, 12], stages(0.6)
    torch.manual_seed(0)
    prompts = [tiny.ids(n, seed) for seed, n in enumerate(lens)]
    for heads in (random_heads(model), {layer: PruneHead(32) for layer in schedule}):
        logits, cache = prefill(model, torch.cat(prompts), heads, schedule, lens)
        assert logits.shape == (5, 61)
        for i, prompt in enumerate(prompts):
            single, single_cache = prefill(model, prompt, heads, schedule)
            assert (logits[i] - single[0]).abs().max() < 1e-10
            for a, b in zip(cache.layers, single_cache.layers):
                k, v, positions = (t.split(a.seqlens)[i] for t in a.rows())
                assert torch.equal(positions, b.rows()[2])
                assert (k - b.rows()[0]).abs().max() < 1e-10 and (v - b.rows()[1]).abs().max() < 1e-10


@each_model
@pytest.mark.parametrize("extra", [0, 20])
def test_decoding_after_pruning(fields, extra):
    """Rows added to a pruned cache, one or several at a time, have the logits of a full recomputation in which the dropped tokens are hidden."""
    model, lens, schedule = tiny.build(**fields), [40, 18], stages(0.6)
    heads, whole = random_heads(model), [tiny.ids(54, 1), tiny.ids(32, 2)]
    expected = [hidden_not_dropped(model, ids, n, heads, schedule)[0] for ids, n in zip(whole, lens)]
    cache = KVCache(5, extra)
    first, _ = prefill(model, torch.cat([ids[:n] for ids, n in zip(whole, lens)]), heads, schedule, lens, cache)
    assert all((f - e[n - 1]).abs().max() < 1e-10 for f, e, n in zip(first, expected, lens))
    at = list(lens)
    for step in ([1, 1], [1, 1], [4, 1], [2, 5], [1, 1], [5, 5]):
        ids = torch.cat([ids[a : a + s] for ids, a, s in zip(whole, at, step)])
        positions = torch.cat([torch.arange(a, a + s) for a, s in zip(at, step)])  # on from N, not from the number kept
        got = model(ids, positions, step, cache).split(step)
        assert all((g - e[a : a + s]).abs().max() < 1e-10 for g, e, a, s in zip(got, expected, at, step))
        at = [a + s for a, s in zip(at, step)]


@each_model
def test_late_equals_replaced(fields):
    """With a LateKV logits and caches, packed or not, are those of a model that replaces the keys and values of what is left
    behind, in the prefill and in decoding after it."""
    model, lens = tiny.build(**fields), [40, 2, 18]
    schedule, heads = late_stages(model)
    whole = [tiny.ids(n + 9, seed) for seed, n in enumerate(lens)]
    expected = [hidden_not_dropped(model, ids, n, heads, schedule) for ids, n in zip(whole, lens)]
    prompts = [ids[:n] for ids, n in zip(whole, lens)]
    first, cache = prefill(model, torch.cat(prompts), heads, schedule, lens)
    for i, (n, prompt) in enumerate(zip(lens, prompts)):
        single, alone = prefill(model, prompt, heads, schedule)
        logits, layers = expected[i]
        assert (first[i] - logits[n - 1]).abs().max() < 1e-10 and (single[0] - logits[n - 1]).abs().max() < 1e-10
        for a, b, (held, k, v) in zip(cache.layers, alone.layers, layers):
            held = held[held < n]
            for rows in ([t.split(a.seqlens)[i] for t in a.rows()], b.rows()):
                assert torch.equal(rows[2], held)
                assert (rows[0] - k[held]).abs().max() < 1e-10 and (rows[1] - v[held]).abs().max() < 1e-10
    assert cache.alive[1] == cache[4].seqlens == [24, 2, 11] and cache.alive[2] == [8, 2, 6]
    for step in range(3):
        at = [n + 3 * step for n in lens]
        ids = torch.cat([ids[a : a + 3] for ids, a in zip(whole, at)])
        got = model(ids, torch.cat([torch.arange(a, a + 3) for a in at]), [3] * 3, cache).split(3)
        assert all((g - e[0][a : a + 3]).abs().max() < 1e-10 for g, e, a in zip(got, expected, at))


def test_late_in_bfloat16():
    """The backend of this machine's bfloat16, which wants a sequence's last rows, gives what float64 does within its rounding."""
    model = tiny.build(num_hidden_layers=5)
    schedule, heads = late_stages(model)
    got = prefill(model.bfloat16(), tiny.ids(60), {1: scorers.earliest, 2: heads[2].bfloat16()}, schedule)[0]
    exact = prefill(model.double(), tiny.ids(60), {1: scorers.earliest, 2: heads[2].double()}, schedule)[0]
    assert (got - exact).abs().mean() < 0.05 * exact.std() and exact.std() > 1


def test_late_at_the_last_layer():
    """There nothing is to be foretold, and a prompt's last row sees all of them: a dense prefill's logits and cache."""
    model = tiny.build(num_hidden_layers=5)
    got, cache = prefill(model, tiny.ids(40), {4: LateKV(model.config, 4)}, Schedule(5, {4: 0.0}, late=True))
    dense, whole = prefill(model, tiny.ids(40))
    assert cache.alive[4] == [8] and cache.seqlens() == whole.seqlens() and (got - dense).abs().max() < 1e-10
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(cache[4].rows(), whole[4].rows()))


def test_late_refuses():
    """A LateKV without a schedule that says so, or the reverse, and a late schedule without a share of 0, or with two."""
    model = tiny.build(num_hidden_layers=5)
    schedule, heads = late_stages(model)
    with pytest.raises(ValueError, match="late=True needs a LateKV"):
        prefill(model, tiny.ids(40), {1: heads[1]}, schedule)
    with pytest.raises(ValueError, match="late=True needs a LateKV"):
        prefill(model, tiny.ids(40), heads, Schedule(5, schedule))
    with pytest.raises(ValueError, match="a LateKV of the layer of its share of 0"):
        prefill(model, tiny.ids(40), heads, Schedule(5, {1: 0.6, 3: 0.0}, late=True))
    for shares in ({1: 0.5}, {1: 0.0, 2: 0.0}):
        with pytest.raises(ValueError, match="one stage with a share of 0"):
            Schedule(5, shares, late=True)


@each_model
@pytest.mark.parametrize("span", [2, 5, 16])
def test_spans_through_prefill(fields, span):
    """Stages that keep whole spans: logits and tokens of a model that hides the dropped ones, packed as single, each stage's among those of the one before."""
    model, lens = tiny.build(**fields), [64, 1, 37, 9]
    schedule = Schedule(5, stages(0.7), span=span)
    heads, prompts = random_heads(model), [tiny.ids(n, seed) for seed, n in enumerate(lens)]
    logits, cache = prefill(model, torch.cat(prompts), heads, schedule, lens)
    assert [list(counts) for counts in zip(*cache.seqlens())] == [schedule.alive(n) for n in lens]
    for i, (prompt, n) in enumerate(zip(prompts, lens)):
        single, single_cache = prefill(model, prompt, heads, schedule)
        expected, layers = hidden_not_dropped(model, prompt, n, heads, schedule)
        assert (logits[i] - single[0]).abs().max() < 1e-10 and (logits[i] - expected[-1]).abs().max() < 1e-10
        before = set(range(n))
        for a, b, (kept, _, _) in zip(cache.layers, single_cache.layers, layers):
            positions = a.rows()[2].split(a.seqlens)[i]
            assert torch.equal(positions, b.rows()[2]) and torch.equal(positions, kept)
            assert set(positions.tolist()) <= before
            before = set(positions.tolist())
    one = prefill(model, prompts[0], heads, stages(0.7))[1]
    assert not torch.equal(one[4].rows()[2], cache[4].rows()[2][: cache[4].seqlens[0]])  # the span does something


def test_last_row_only(monkeypatch):
    """The output layer runs on one row per prompt."""
    model, rows = tiny.build(**MODELS["full"]), []
    monkeypatch.setattr(model, "logits", lambda x: rows.append(len(x)) or Transformer.logits(model, x))
    prefill(model, tiny.ids(30), random_heads(model), stages(0.5), [20, 10])
    assert rows == [2]


def test_cache_is_allocated_for_the_alive():
    """KV bytes are those of the tokens alive per layer and of the tokens to come, nothing for the dropped."""
    model, schedule, cache = tiny.build(**MODELS["full"]), stages(0.5), KVCache(5, extra=3)
    prefill(model, tiny.ids(50), random_heads(model), schedule, None, cache)
    assert cache.nbytes() == sum(n + 3 for n in schedule.alive(50)) * 2 * 8 * 8 * 2  # heads, head_dim, float64, k and v


@pytest.mark.parametrize("layers", [(1,), (1, 2, 4)])
@pytest.mark.parametrize("span", [1, 8])
def test_guard(layers, span, monkeypatch):
    """A selection that drops nothing, though the schedule asks for it, is an error and not a slow dense run."""
    model = tiny.build(**MODELS["full"])
    monkeypatch.setattr(
        sdtp,
        "select",
        lambda scores, positions, share, seqlens, prompt_lens, span: (torch.arange(len(scores)), seqlens),
    )
    with pytest.raises(RuntimeError, match="layer 1 holds .40. tokens"):
        prefill(model, tiny.ids(40), random_heads(model), Schedule(5, {layer: 0.5 for layer in layers}, span=span))
    with pytest.raises(RuntimeError, match="not applied"):
        generate(model, tiny.ids(40), 2, random_heads(model), stages(0.5))


def test_prefill_refuses():
    """A prompt beyond max_position_embeddings and an empty one, in a batch too, are refused before anything runs."""
    model = tiny.build()
    with pytest.raises(ValueError, match="65 tokens .* 64 positions"):
        prefill(model, tiny.ids(65))
    for ids, lens in ((tiny.ids(5), [5, 0]), (tiny.ids(5)[:0], None)):
        with pytest.raises(ValueError, match="empty"):
            prefill(model, ids, seqlens=lens)


# ---------------------------------------------------------------------------- generate


def argmax_loop(model, ids, new, heads=None, schedule=()):
    """Greedy continuation by full recomputation of prompt and new tokens at every step."""
    whole = ids
    for _ in range(new):
        logits = hidden_not_dropped(model, whole, len(ids), heads, schedule)[0]
        whole = torch.cat((whole, logits[-1:].argmax(-1)))
    return whole[len(ids) :].tolist()


@each_model
def test_generate_greedy(fields):
    """Greedy generation, dense and pruned, ragged batch and single, equals an argmax loop without a cache."""
    model, lens, schedule = tiny.build(**fields), [30, 5, 17], stages(0.5)
    heads, prompts = random_heads(model), [tiny.ids(n) for n in lens]
    for args in ((), (heads, schedule)):
        expected = [argmax_loop(model, ids, 12, *args) for ids in prompts]
        assert generate(model, torch.cat(prompts), 12, *args, seqlens=lens) == expected
        assert [generate(model, ids, 12, *args)[0] for ids in prompts] == expected
    assert len({t for e in expected for t in e}) > 5


def test_generate_stops():
    """A sequence ends by and with its first end-of-sequence token, others go on; on_token gets every step; the cache is the caller's."""
    model, lens, steps = tiny.build(), [20, 11], []
    ids = torch.cat([tiny.ids(n) for n in lens])
    free = generate(model, ids, 10, seqlens=lens)
    eos = free[0][3]
    cut = [f[: f.index(eos) + 1] if eos in f else f for f in free]
    assert generate(model, ids, 10, seqlens=lens, eos_token_ids=(60, eos), on_token=steps.append) == cut
    assert len(steps) == max(map(len, cut)) and [s[0] for s in steps][: len(cut[0])] == cut[0] and len(cut[0]) < 10
    cache = KVCache(3, extra=10)
    assert len(generate(model, ids[:20], 10, cache=cache, eos_token_ids=[eos])[0]) == len(cut[0])
    assert cache.seqlens() == [[20 + len(cut[0]) - 1]] * 3
    assert generate(model, ids, 0, seqlens=lens) == [[], []]
    firsts = [f[0] for f in free]
    forced = generate(model, ids, 10, seqlens=lens, eos_token_ids=firsts, min_new_tokens=1)
    for (n, start), new in zip(((20, 0), (11, 20)), forced):  # the best token that does not end the answer
        logits = model(ids[start : start + n])[-1].index_fill(0, torch.tensor(firsts), -math.inf)
        assert new[0] == logits.argmax() and len(new) > 1


def test_generate_positions():
    """Prompt and new tokens may fill the model's positions exactly; one more is refused before anything runs."""
    model = tiny.build()
    assert len(generate(model, tiny.ids(60), 4)[0]) == 4
    with pytest.raises(ValueError, match="60 tokens and 5 new"):
        generate(model, tiny.ids(60), 5)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.4)])
def test_sampling_distribution(temperature, top_p):
    """Frequencies of 40,000 draws are the softmax of logits / temperature, cut to the smallest set that reaches top_p."""
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    probs, total = (logits / temperature).softmax(-1).tolist(), 0.0
    wanted = [0.0] * 8
    for i in sorted(range(8), key=lambda i: -probs[i]):
        if total < top_p:
            wanted[i] = probs[i]
        total += probs[i]
    draws = sdtp.sample_token(logits.expand(40000, 8), temperature, top_p, torch.Generator().manual_seed(1))
    got = draws.bincount(minlength=8) / 40000
    assert (got - torch.tensor(wanted) / sum(wanted)).abs().max() < 0.01
    assert all((g == 0) == (w == 0) for g, w in zip(got.tolist(), wanted))


def test_generate_sampling():
    """A tiny top_p is greedy; the same generator seed gives the same tokens and another seed others."""
    model, ids = tiny.build(), tiny.ids(20)
    greedy = generate(model, ids, 12)
    assert generate(model, ids, 12, temperature=1.5, top_p=1e-6) == greedy
    a, b, c = (generate(model, ids, 12, temperature=2.0, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert a == b != c


# ---------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_pairs_equal_a_loop(window):
    """(query, key) pairs of causal and windowed attention over what is alive, by original position."""
    positions = torch.tensor([0, 1, 2, 3, 6, 7, 12, 13, 14, 20])
    expected = sum(0 <= i - j < (window or 10**9) for i in positions.tolist() for j in positions.tolist())
    assert pairs(positions, window) == expected
    count = sum(0 <= i - j < (window or 10**9) for i in range(13) for j in range(13))
    assert pairs(13, window) == pairs(torch.arange(13), window) == count


def plain_attend(q, k, v, positions, k_positions, seqlens, k_seqlens, window=None):
    """Attention as two products over the full square, which FlopCounterMode sees."""
    weights = attention_weights(q, k, positions, k_positions, window)
    return (weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    "stages", [{}, {1: 0.6, 3: 0.3}, {0: 0.7, 2: 0.4}], ids=["dense", "two stages", "from layer 0"]
)
def test_executed_flops_equal_torchs_counter(stages):
    """Linear and head FLOPs are exactly what torch counts; its attention is the full square of the same formula."""
    model, n = tiny.build(torch.float32, num_hidden_layers=4, head_dim=8), 40
    schedule = Schedule(4, stages) if stages else None
    heads = {layer: PruneHead(32) for layer in stages}
    _, cache = prefill(model, tiny.ids(n), heads, schedule)
    alive, prompt = [lengths[0] for lengths in cache.seqlens()], n
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x, positions = model.embed(tiny.ids(n)), torch.arange(n)
        for layer, block in enumerate(model.layers):
            if layer in stages:
                keep, _ = select(heads[layer](x), positions, stages[layer], [len(x)], [prompt])
                x, positions = x[keep], positions[keep]
            x = block(x, positions, [len(x)], None, plain_attend)
        model.logits(x[-1:])
    counted = counter.get_flop_counts()["Global"]
    products = sum(v for op, v in counted.items() if "bmm" in str(op))
    linear, attention, head = executed_flops(model.config, n, alive, heads)
    positions = [layer.rows()[2] for layer in cache.layers]
    assert (linear, attention, head) == executed_flops(model.config, n, positions, heads)
    assert linear + head == sum(counted.values()) - products
    assert products == sum(4 * 8 * 4 * m * m for m in alive)
    assert attention == sum(4 * 8 * 4 * m * (m + 1) // 2 for m in alive)
    assert (head > 0) == bool(stages) and (alive[-1] < n) == bool(stages)


def test_late_flops():
    """With a LateKV, too: the keys and values of what is left behind, and the pairs that see them; torch counts each of 4 + 4
    rows at full width."""
    model, n = tiny.build(torch.float32, num_hidden_layers=5, head_dim=8), 40
    schedule, heads = late_stages(model)
    heads = {1: PruneHead(32), 2: heads[2].float()}
    with FlopCounterMode(display=False) as counter:
        _, cache = prefill(model, tiny.ids(n), heads, schedule)
    linear, attention, head = executed_flops(model.config, n, [counts[0] for counts in cache.alive], heads)
    counted = counter.get_flop_counts()["Global"]
    assert linear + head == sum(v for op, v in counted.items() if "attention" not in str(op))
    held = [counts[0] for counts in cache.seqlens()]
    assert held == sdtp.held_counts([40, 24, 8, 8, 8], n, heads) == [40, 24, 24, 24, 24]
    pairs_seen = sum(sum(k <= q for k in range(m)) for m in held[:2] for q in range(m)) + 3 * (10 + 4 * 24 - 6)
    assert attention == 4 * 8 * 4 * pairs_seen


def test_windowed_flops():
    """Attention FLOPs of a model with windows on some layers are those of the pairs each layer sees."""
    model, n = tiny.build(model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1), 30
    schedule = Schedule(3, {1: 0.5})
    _, cache = prefill(model, tiny.ids(n), {1: scorers.random(torch.Generator().manual_seed(0))}, schedule)
    kept = cache[1].rows()[2].tolist()
    expected = n * (n + 1) // 2 + 2 * sum(0 <= i - j < 7 for i in kept for j in kept)
    positions = [layer.rows()[2] for layer in cache.layers]
    assert executed_flops(model.config, n, positions)[1] == 4 * 8 * 4 * expected


def test_flops_of_part_of_a_pass():
    """Fewer layers than the model has, and other rows through the LM head than the last."""
    config = tiny.build().config
    whole = executed_flops(config, 20, [20, 20, 20])
    first = executed_flops(config, 20, [20, 20], logit_rows=0)
    assert first[0] == 2 * config.linear_flops(20) and first[1] * 3 == whole[1] * 2
    assert executed_flops(config, 20, [20, 20, 20], logit_rows=20)[0] - whole[0] == 19 * 2 * 61 * 32


# ---------------------------------------------------------------------------- the heads


@pytest.fixture
def saved(tmp_path):
    """A checkpoint read from disk, and heads written for it."""
    torch.manual_seed(0)
    model = Transformer.from_pretrained(tiny.write(tmp_path / "ckpt"), torch.float32)
    schedule = Schedule(3, {1: 0.7, 2: 0.49})
    heads = {layer: PruneHead(32) for layer in schedule}
    save_heads(tmp_path / "heads", heads, model, schedule, teacher="grad_norm", ckpt="tiny")
    return model, heads, schedule, tmp_path


def test_with_ratio():
    """The stages and the span stay, the mean share alive is that of the paper's stages at the new ratio; a tenth always is."""
    pruned = Schedule(30).with_ratio(0.8)
    assert list(pruned) == list(Schedule(30)) and list(pruned.values()) == pytest.approx([0.8**s for s in range(1, 10)])
    for ratio in (1.0, 0.9, 0.5):
        mean = sum(
            max(0.1, Schedule(30, ratio=ratio)[max(s for s in Schedule(30) if s <= l)]) if l >= 4 else 1
            for l in range(30)
        )
        for shares in ({4: 0.5}, {0: 0.9, 10: 0.4}, {2: 0.7, 3: 0.7, 29: 0.1}):
            other = Schedule(30, shares, span=8).with_ratio(ratio)
            assert list(other) == list(shares) and other.span == 8 and other.num_hidden_layers == 30
            assert other.mean_share() == pytest.approx(mean / 30)
            assert sum(other.alive(10**6)) / 30 / 10**6 == pytest.approx(mean / 30, rel=1e-4)


def test_fitted():
    """One power for all shares, at the nearest cost that counts of tokens allow; its own cost gives the schedule itself."""
    schedule = Schedule(30, {4: 0.8, 10: 0.3}, span=4)
    cost = lambda s: sum(s.alive(100)) / 3000
    for budget in (0.9, 0.6, 0.45, 0.3):
        got = schedule.fitted(cost, budget)
        assert abs(cost(got) - budget) <= 26 / 3000 / 2 and got.span == 4 and list(got) == [4, 10]
        assert math.log(got[10]) / math.log(got[4]) == pytest.approx(math.log(0.3) / math.log(0.8))
    assert schedule.fitted(cost, cost(schedule)) is schedule
    assert min(schedule.fitted(cost, 1.2).values()) == pytest.approx(1)


def test_fitted_floor():
    """A share of 0 stays; where it alone costs less than the budget it is at the first layer where it does not, up to none."""
    floor, cost = Schedule(30, {4: 0.8, 24: 0.0}, span=4), lambda s: sum(s.alive(100)) / 3000
    for budget, layer in ((0.5, 24), (0.8, 24), (0.86, 26), (0.9, 27), (0.96, 29), (1.0, 30)):
        got = floor.fitted(cost, budget)
        assert list(got) == [4, layer][: 1 + (layer < 30)] and got.get(layer, 0.0) == 0.0
        assert got.scored() == [4] and abs(cost(got) - budget) <= 26 / 3000 / 2 and got.span == 4
        assert layer in (24, 30) or cost(Schedule(30, {4: 1.0, layer - 1: 0.0})) < budget
    assert floor.fitted(cost, 1.0)[4] == pytest.approx(1)
    held = Schedule(30, floor, late=True).fitted(cost, 0.9)  # a LateKV is of its layer
    assert list(held) == [4, 24] and held.late and held[4] == pytest.approx(1) and held[24] == 0.0
    model, heads = tiny.build(), random_heads(tiny.build())
    dense, _ = prefill(model, tiny.ids(40))
    whole = Schedule(3, {1: 0.5, 2: 0.0}).with_ratio(1.0)
    assert torch.equal(prefill(model, tiny.ids(40), {1: heads[1]}, whole)[0], dense)


def test_fitted_out_of_reach():
    """Stages that begin too late for a cost are refused by name, not run at another."""
    share = Schedule.mean_share
    assert Schedule(30, {15: 0.5}).fitted(share, 0.56).mean_share() == pytest.approx(
        0.56
    )  # the last tenth is always alive
    with pytest.raises(ValueError, match="layers .15. cannot cost as little as 0.540"):
        Schedule(30, {15: 0.5}).fitted(share, 0.54)


def test_paper_stages():
    """Layers 4, 7, ... with ratio**s after stage s; the last layer where there are fewer than five."""
    assert paper_stages(30) == Schedule(30) and paper_stages(12, 0.8) == {4: 0.8, 7: 0.8**2, 10: 0.8**3}
    assert [paper_stages(n) for n in (1, 3, 5)] == [{0: 0.9}, {2: 0.9}, {4: 0.9}]


def test_score():
    """A head's score is keep minus drop logit in float32, of Linear(d/4 -> 2)(GELU(Linear(d -> d/4))), whatever dtype x has."""
    torch.manual_seed(0)
    head, x = PruneHead(32), 3 * torch.randn(20, 32)
    assert [tuple(p.shape) for p in head.parameters()] == [(8, 32), (8,), (2, 8), (2,)]
    w1, b1, w2, b2 = (p.detach().double() for p in head.parameters())
    hidden = x.double() @ w1.T + b1
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    keep, drop = (hidden @ w2.T + b2).unbind(-1)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        score = head(x.to(dtype))
        assert score.dtype == torch.float32 and (score - (keep - drop)).abs().max() < tolerance
    assert (keep - drop).std() > 0.3


OPTIONS = {
    "divisor": dict(divisor=2),
    "norm": dict(norm=True),
    "position": dict(position=True),
    "matches": dict(matches=3),
    "ending": dict(ending=True),
    "attention": dict(attention=4),
    "alike": dict(alike=True),
    "conv": dict(conv=5),
    "all": dict(divisor=1, norm=True, position=True, matches=2, ending=True, attention=4, alike=True, conv=3),
}
each_head = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
ALIVE = [[*range(4), *range(7, 60), 63], [0, 1, 5, 6, 40], [0]]  # positions of prompts that have lost tokens


def random_head(options):
    """A PruneHead whose every part matters."""
    torch.manual_seed(0)
    head = PruneHead(32, **options)
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(3)
    return head.requires_grad_(False)


def rows_of(positions):
    """Hidden states of packed prompts, not centred: (T, 32) float32, positions (T,), rows of each. Some are alike, with cosines of 1, 1, 0.95 and 0.85."""
    lens = [len(p) for p in positions]
    x = 2 * torch.randn(sum(lens), 32, generator=torch.Generator().manual_seed(1)) + 1
    x[[0, 5]] = x[[lens[0] - 1, lens[0] - 8]]
    for row, last, cosine in ((2, lens[0] - 3, 0.95), (7, lens[0] - 5, 0.85)):  # of states as they are, and centred
        own, other = x[last] - x[last].mean(), x[row] - x[row].mean()
        other = other - (other @ own) / (own @ own) * own
        x[row] = cosine * own + (1 - cosine**2) ** 0.5 * own.norm() * other / other.norm()
        x[last] = own
    return x, torch.tensor(sum(positions, [])), lens


def loop_attention(block, x, positions):
    """PruneHead's attention features of one prompt, (n, 8), from whole maps row by row: sampled rows, then their means."""
    n, attention = len(x), block.self_attn
    q, k, _ = attention.qkv(block.input_layernorm(x), torch.tensor(positions))
    spread = {round(i * (n - 1) / 63) for i in range(64)} if n > 64 else set(range(n))
    last = range(max(0, n - 32), n)
    features = torch.zeros(n, 8, dtype=torch.float64)
    for part, rows in enumerate((last, sorted(spread | set(last)))):
        total, seen = torch.zeros(4, n), [0] * n
        for i in rows:
            sees = [j for j in range(i + 1) if positions[i] - positions[j] < (attention.window or 10**6)]
            for h in range(4):
                scores = torch.tensor([(q[i, h] @ k[j, h // 2]).item() / 8**0.5 for j in sees], dtype=torch.float64)
                total[h, sees] += scores.softmax(-1).float()
            for j in sees:
                seen[j] += 1
        means = total / torch.tensor(seen).clamp(min=1)
        features[:, 4 * part : 4 * part + 4] = (((means + 1e-5).log() + 5) / 2).T
    return features


def loop_score(
    head, x, positions, block, divisor=4, norm=False, position=False, matches=0, ending=False, attention=0,
    alike=False, conv=0,
):  # fmt: skip
    """A head's scores of one prompt, token by token, in float64 and plain Python but for the products of a matrix and a row."""
    weights, n = {name: p.double() for name, p in head.state_dict().items()}, positions[-1] + 1
    assert weights["fc1.weight"].shape == (32 // divisor, 32)
    rows, before, scores, seen = [], [], [], loop_attention(block, x.double(), positions) if attention else None
    for row in x.double():
        mean = sum(row) / 32
        rows.append((row - mean) / (sum((row - mean) ** 2) / 32 + 1e-5) ** 0.5 if norm else row)
    queries = [(weights["q_proj.weight"] @ row).tolist() for row in rows[-32:]] if matches else []
    likeness, last = [], range(max(0, len(rows) - 32), len(rows))
    for i, row in enumerate(rows):
        most = max(
            [0] * (i >= last[0]) + [(row @ rows[j] / (row.norm() * rows[j].norm())).item() for j in last if j > i]
        )
        likeness.append((2 * most, 2 * (most > 0.9)))
    for i, (row, p) in enumerate(zip(rows, positions)):
        hidden, features = weights["fc1.weight"] @ row + weights["fc1.bias"], []
        if position:
            features += [math.log(n - p) / 8, math.log(p + 1) / 8, p / n, math.log(n) / 8]
        if attention:
            features += seen[i].tolist()
        if matches:
            key = (weights["k_proj.weight"] @ row).tolist()
            spans = [range(16 * m, 16 * m + 16) for m in range(matches)]
            dots = [[sum(key[i] * query[i] for i in span) / 4 for query in queries] for span in spans]
            features += [max(d) for d in dots]
            features += [math.log(sum(math.exp(v) for v in d) / len(d)) for d in dots]
        if alike:
            near = likeness[max(0, i - 16) : i + 17]
            features += [*likeness[i], *(sum(values) / len(near) for values in zip(*near))]
        if features:
            hidden = hidden + weights["features.weight"] @ torch.tensor(features, dtype=torch.float64)
        if ending:
            hidden = hidden + weights["end_proj.weight"] @ (sum(rows[-32:]) / len(rows[-32:]))
        before.append(hidden)
    for i, hidden in enumerate(before):
        for j in range(conv):
            if 0 <= i + j - conv // 2 < len(before):
                hidden = hidden + weights["conv.weight"][:, 0, j] * before[i + j - conv // 2]
        hidden = torch.tensor([h * 0.5 * (1 + math.erf(h / 2**0.5)) for h in hidden.tolist()], dtype=torch.float64)
        keep, drop = (weights["fc2.weight"] @ hidden + weights["fc2.bias"]).tolist()
        scores.append(keep - drop)
    return scores


@each_head
@pytest.mark.parametrize("window", [None, 12])
def test_options_equal_loops(options, window):
    """Packed prompts that have lost tokens score, in any dtype, as each by itself in a plain loop over the tokens."""
    fields = {"model_type": "mistral", "sliding_window": window, "max_position_embeddings": 256}
    head, (x, positions, lens) = random_head(options), rows_of([*ALIVE, list(range(0, 240, 2))])
    block = tiny.build(**fields).layers[1]
    expected = [
        s
        for rows, p in zip(x.split(lens), positions.split(lens))
        for s in loop_score(head, rows, p.tolist(), block, **options)
    ]
    expected = torch.tensor(expected)
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.float32, 1e-4), (torch.bfloat16, 0.25)):
        scores = head(x.to(dtype), positions, lens, tiny.build(dtype, **fields).layers[1])
        assert scores.dtype == torch.float32 and scores.shape == (sum(lens),)
        assert (scores - expected).abs().max() < tolerance * max(1, expected.abs().max())
    assert expected.std() > 0.3
    # what is not asked for has no weights, and with no option the head is the paper's
    names = {name.split(".")[0] for name in head.state_dict()} - {"fc1", "fc2"}
    wanted = {"position": {"features"}, "attention": {"features"}, "matches": {"features", "q_proj", "k_proj"}}
    wanted |= {"ending": {"end_proj"}, "alike": {"features"}, "conv": {"conv"}}
    assert names == set().union(*(wanted.get(name, set()) for name in options))


def test_position_features_stay():
    """A token's position features are the same at every stage, bit for bit, whichever tokens but the last are gone."""
    head = random_head(dict(position=True))
    (whole,) = head.position_features(torch.cat([torch.arange(64), torch.arange(41)]), [64, 41])
    for alive in ([*range(4), 63], [0, 63], [63], list(range(0, 64, 3))):
        (left,) = head.position_features(torch.tensor([*alive, 7, 40]), [len(alive), 2])
        assert torch.equal(left, whole[[*alive, 64 + 7, 64 + 40]])
    assert whole.unique(dim=0).shape == (105, 4)


@each_model
@each_head
def test_options_through_prefill(fields, options):
    """Heads with options keep the same tokens of a packed ragged batch as of each prompt by itself."""
    model, lens = tiny.build(**fields), [1, 33, 50, 7]
    schedule, prompts = Schedule(5, stages(0.6), span=3), [tiny.ids(n, seed) for seed, n in enumerate(lens)]
    heads = {layer: random_head(options) for layer in schedule}
    logits, cache = prefill(model, torch.cat(prompts), heads, schedule, lens)
    for i, prompt in enumerate(prompts):
        single, single_cache = prefill(model, prompt, heads, schedule)
        assert (logits[i] - single[0]).abs().max() < 1e-10
        for a, b in zip(cache.layers, single_cache.layers):
            assert torch.equal(a.rows()[2].split(a.seqlens)[i], b.rows()[2])


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["paper", *OPTIONS])
@pytest.mark.parametrize("rows", [1, 20, 32, 90, 200])
def test_head_flops(options, rows):
    """flops() are the matrix products that PyTorch counts, for prompts shorter and longer than the queries of matches."""
    head, model = random_head(options), tiny.build(torch.float32, max_position_embeddings=256)
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(rows, 32), torch.arange(rows), [rows], model.layers[0])
    assert head.flops(rows, model.config) == counter.get_total_flops() > 0


def test_dropout():
    """On the hidden layer, in training alone, and nothing that is saved with the head."""
    torch.manual_seed(0)
    head, x = PruneHead(32, dropout=0.5), torch.randn(9, 32)
    assert not torch.equal(head(x), head(x)) and "dropout" not in head.options
    head.eval()
    assert torch.equal(head(x), head(x))


@each_head
def test_options_round_trip(options, saved):
    """Heads with options, of a schedule with spans, come back with them and score bit for bit as before."""
    model, _, _, folder = saved
    schedule = Schedule(3, {0: 0.8, 2: 0.3}, span=4)
    heads = {layer: random_head(options) for layer in schedule}
    save_heads(folder / "heads", heads, model, schedule)
    loaded, loaded_schedule, info = load_heads(folder / "heads", model)
    assert loaded_schedule == schedule and loaded_schedule.span == 4 and info["span"] == 4
    x, positions, lens = rows_of(ALIVE)
    for layer, head in heads.items():
        assert loaded[layer].options == head.options and options.items() <= head.options.items()
        more = positions, lens, model.layers[layer]
        assert torch.equal(loaded[layer](x, *more), head(x, *more))


def test_late_round_trip(saved):
    """A LateKV comes back beside the heads, and prunes as before; one that its schedule does not name is refused."""
    model, _, _, folder = saved
    schedule = Schedule(3, {0: 0.6, 1: 0.0}, late=True)
    heads = {0: PruneHead(32), 1: LateKV(model.config, 1)}
    assert heads[1].proj.weight.dtype == torch.bfloat16
    save_heads(folder / "heads", heads, model, schedule)
    loaded, found, _ = load_heads(folder / "heads", model)
    assert found == schedule and found.late and isinstance(loaded[1], LateKV)
    assert sdtp.heads_sha256(loaded) == json.loads((folder / "heads" / "heads.json").read_text())["sha256"]
    a, b = (prefill(model, tiny.ids(40), h, s)[0] for h, s in ((heads, schedule), (loaded, found)))
    assert torch.equal(a, b) and not torch.equal(
        a, prefill(model, tiny.ids(40), {0: heads[0]}, Schedule(3, schedule))[0]
    )
    meta = json.loads((folder / "heads" / "heads.json").read_text())
    (folder / "heads" / "heads.json").write_text(json.dumps(meta | {"late_kv": False}))
    with pytest.raises(ValueError, match="unexpected tensor 1.proj"):
        load_heads(folder / "heads", model)


def test_heads_written_before_options(saved):
    """A heads.json without options and span is of the paper's heads, token by token."""
    model, heads, schedule, folder = saved
    meta = json.loads((folder / "heads" / "heads.json").read_text())
    del meta["head"], meta["span"]
    (folder / "heads" / "heads.json").write_text(json.dumps(meta))
    loaded, loaded_schedule, _ = load_heads(folder / "heads", model)
    assert loaded_schedule == schedule and loaded_schedule.span == 1
    x = torch.randn(9, 32)
    assert all(torch.equal(loaded[layer](x), heads[layer](x)) for layer in heads)


def test_heads_round_trip(saved):
    """Loaded heads score as the saved ones do, bit for bit, with their schedule and info; they take no gradients."""
    model, heads, schedule, folder = saved
    loaded, loaded_schedule, info = load_heads(folder / "heads", model)
    x = torch.randn(9, 32)
    assert (
        loaded_schedule == schedule and loaded_schedule.alive(30) == schedule.alive(30) and list(loaded) == list(heads)
    )
    assert all(torch.equal(loaded[layer](x), heads[layer](x)) for layer in heads)
    assert not any(p.requires_grad for head in loaded.values() for p in head.parameters())
    assert info["teacher"] == "grad_norm" and info["ckpt"] == "tiny"
    assert torch.equal(
        prefill(model, tiny.ids(30), loaded, loaded_schedule)[0], prefill(model, tiny.ids(30), heads, schedule)[0]
    )


def test_fingerprint(saved):
    """A checkpoint has one fingerprint in float32 and bfloat16; one changed weight in any tensor, or a tied output, has another."""
    model, _, _, folder = saved
    print_ = sdtp.fingerprint(model)
    assert print_ == sdtp.fingerprint(Transformer.from_pretrained(folder / "ckpt", torch.bfloat16))
    load_heads(folder / "heads", Transformer.from_pretrained(folder / "ckpt", torch.bfloat16))
    for p in model.parameters():
        old = p.flatten()[0].item()
        p.view(-1)[0] = old + 1
        assert sdtp.fingerprint(model) != print_
        p.view(-1)[0] = old
    assert sdtp.fingerprint(model) == print_
    tied = Transformer.from_pretrained(tiny.write(folder / "tied", tie_word_embeddings=True))
    assert sdtp.fingerprint(tied) != print_


def test_heads_of_another_checkpoint(saved):
    """Heads refuse another checkpoint of the same shape, and say whose they are."""
    model, _, _, folder = saved
    with pytest.raises(ValueError, match="another checkpoint .tiny."):
        load_heads(folder / "heads", tiny.randomise(model, seed=1))


def swap_weights(folder):
    tensors = safetensors.torch.load_file(folder / "heads.safetensors")
    safetensors.torch.save_file({name: t + 1 for name, t in tensors.items()}, folder / "heads.safetensors")


def no_schedule(folder):
    meta = json.loads((folder / "heads.json").read_text())
    del meta["schedule"]
    (folder / "heads.json").write_text(json.dumps(meta))


def other_meta(folder, **changes):
    meta = json.loads((folder / "heads.json").read_text())
    (folder / "heads.json").write_text(json.dumps({**meta, **changes}))


def other_schedule(folder, shares):
    other_meta(folder, schedule=shares)


@pytest.mark.parametrize(
    "spoil, error, named",
    [
        (lambda f: (f / "heads.json").unlink(), FileNotFoundError, "heads.json"),
        (lambda f: (f / "heads.safetensors").unlink(), FileNotFoundError, "heads.safetensors"),
        (lambda f: swap_weights(f), ValueError, "not the file that heads.json was written with"),
        (lambda f: (f / "heads.json").write_text("{"), ValueError, "heads.json"),
        (lambda f: (f / "heads.json").write_text("[]"), ValueError, "heads.json"),
        (lambda f: (f / "heads.json").write_text("{}"), ValueError, "another checkpoint"),
        (lambda f: (f / "heads.safetensors").write_bytes((f / "heads.safetensors").read_bytes()[:-9]), ValueError, "heads.safetensors"),
        (no_schedule, ValueError, "heads.json"),
        (lambda f: other_schedule(f, {"7": 0.5}), ValueError, "layer 7"),
        (lambda f: other_schedule(f, {"0": 0.7, "1": 0.5, "2": 0.4}), ValueError, "0.fc1.weight"),
        (lambda f: other_schedule(f, {"1": 0.5}), ValueError, "2.fc1.bias"),
        (lambda f: other_schedule(f, [0.5]), ValueError, "heads.json"),
        (lambda f: other_meta(f, head={"magic": 1}), ValueError, "magic"),
        (lambda f: other_meta(f, head={"matches": 1}), ValueError, "1.features.weight"),
        (lambda f: other_meta(f, head={"divisor": 2}), ValueError, "fc1.weight"),
        (lambda f: other_meta(f, head={"divisor": 0}), ValueError, "heads.json"),
        (lambda f: other_meta(f, head={"divisor": "4"}), ValueError, "heads.json"),
        (lambda f: other_meta(f, head=["norm"]), ValueError, "heads.json"),
        (lambda f: other_meta(f, head=None), ValueError, "heads.json"),
        (lambda f: other_meta(f, span=0), ValueError, "spans of 0"),
        (lambda f: other_meta(f, span="8"), ValueError, "heads.json"),
    ],
)  # fmt: skip
def test_damaged_heads(spoil, error, named, saved):
    """A missing, damaged or inconsistent file is one line that names it."""
    model, _, _, folder = saved
    spoil(folder / "heads")
    with pytest.raises(error) as caught:
        load_heads(folder / "heads", model)
    assert named in str(caught.value) and "\n" not in str(caught.value) and str(folder / "heads") in str(caught.value)


def test_write_atomic(tmp_path, monkeypatch):
    """A failed write leaves the old file, whole, and no other; the folder is made."""
    path = tmp_path / "new" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"

    def fail(*args):
        raise OSError("disk full")

    for broken in ("fsync", "replace"):
        monkeypatch.setattr(f"os.{broken}", fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomic(path, b"lost")
        monkeypatch.undo()
        assert path.read_bytes() == b"newer" and list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------------------- on CUDA


@tiny.on_cuda
@each_model
@pytest.mark.parametrize("late", [False, True])
def test_cuda_equals_cpu(fields, late):
    """Pruned prefill, with a LateKV too, and greedy generation of a ragged batch on CUDA, in float64, keep the tokens and logits of the CPU."""
    model, lens = tiny.build(**fields), [30, 5, 17]
    ids, schedule = torch.cat([tiny.ids(n) for n in lens]), stages(0.5)
    torch.manual_seed(0)
    heads = {layer: PruneHead(32) for layer in schedule}
    if late:
        schedule, exact = late_stages(model)
        heads = {1: heads[1], 2: exact[2]}
    expected, cache = prefill(model, ids, heads, schedule, lens)
    tokens = generate(model, ids, 12, heads, schedule, seqlens=lens)
    model.cuda()
    heads = {layer: head.cuda() for layer, head in heads.items()}
    got, cuda_cache = prefill(model, ids.cuda(), heads, schedule, lens)
    assert (got.cpu() - expected).abs().max() < 1e-9
    assert all(torch.equal(a.rows()[2], b.rows()[2].cpu()) for a, b in zip(cache.layers, cuda_cache.layers))
    assert generate(model, ids.cuda(), 12, heads, schedule, seqlens=lens) == tokens


# ---------------------------------------------------------------------------- adaptive schedules


def test_adaptive_share_by_hand():
    """40 tokens, 8 protected (0 to 3, 36 to 39), spans of 8: the free rows of the spans are 4, 8, 8, 8 and 4."""
    scores, positions = torch.tensor([0.1, 0.3, 0.4, 0.15, 0.05]).repeat_interleave(8), torch.arange(40)
    scores[[0, 39]] = -100.0  # protected: no part of a span
    kept = {0.01: 40, 0.05: 40, 0.07: 36, 0.12: 32, 0.2: 24, 0.35: 16, 0.5: 8}  # a span at the threshold stays
    for threshold, count in kept.items():
        threshold = torch.tensor(threshold).item()  # as calibrate() finds it, of float32 scores
        assert sdtp.adaptive_share(scores, positions, 40, threshold, 8) * 40 == pytest.approx(count)
    rows = torch.cat([torch.arange(4), torch.arange(10, 12), torch.arange(36, 40)])  # two are left that may go
    assert sdtp.adaptive_share(scores[rows], rows, 40, 0.5, 8) * 40 == pytest.approx(8)
    assert sdtp.adaptive_share(scores[rows], rows, 40, 0.2, 8) * 40 == pytest.approx(10)
    assert sdtp.adaptive_share(scores[:5], torch.arange(5), 5, 0.5, 8) == 1  # none may be dropped
    scores[20] = math.nan  # no score is the lowest one
    assert sdtp.adaptive_share(scores, positions, 40, 0.01, 8) * 40 == pytest.approx(32)
    assert sdtp.adaptive_share(scores.fill_(math.nan), positions, 40, -100.0, 8) * 40 == pytest.approx(8)


def peaked_heads(model):
    """Random heads whose scores differ enough for prompts to differ in what they ask for."""
    heads = random_heads(model)
    return {layer: lambda *a, head=head: 3 * head(*a) for layer, head in heads.items()}


@pytest.mark.parametrize("span", [1, 4])
def test_calibrate(span, monkeypatch):
    """The prompts keep as many tokens together as by the shares, each its own number, packed as single; the kept are whole spans."""
    model, lens = tiny.build(num_hidden_layers=5), [64, 40, 57, 33, 61, 48]
    prompts, heads = [tiny.ids(n, seed) for seed, n in enumerate(lens)], peaked_heads(model)
    fixed = Schedule(5, {1: 0.7, 2: 0.55}, span=span)
    monkeypatch.setattr(sdtp, "PACK_TOKENS", 100)
    found = sdtp.calibrate(model, [p.tolist() for p in prompts], heads, fixed)
    assert found == fixed and not found.adaptive and found.threshold.keys() == fixed.keys()
    adaptive = Schedule(5, found, span=span, threshold=found.threshold, adaptive=True)
    logits, cache = prefill(model, torch.cat(prompts), heads, adaptive, lens)
    for layer in (1, 2):
        counts, asked = cache.seqlens()[layer], [fixed.alive(n)[layer] for n in lens]
        assert abs(sum(counts) - sum(asked)) <= span and counts != asked
        positions = cache[layer].rows()[2].split(counts)
        for p, n in zip(positions, lens):
            spans = {i // span for i in p[~is_protected(p, n)].tolist()}
            free = torch.arange(n)[~is_protected(torch.arange(n), n)]
            assert set(p.tolist()) >= {i for i in free.tolist() if i // span in spans}
    for i, prompt in enumerate(prompts):
        one, single = prefill(model, prompt, heads, adaptive)
        assert (one[0] - logits[i]).abs().max() < 1e-10
        assert [c[0] for c in single.seqlens()] == [c[i] for c in cache.seqlens()]
    assert torch.equal(prefill(model, prompts[0], heads, found)[0], prefill(model, prompts[0], heads, fixed)[0])


def test_packs(monkeypatch):
    """Packs of whole prompts, as full as may be; a longer prompt is one of its own."""
    monkeypatch.setattr(sdtp, "PACK_TOKENS", 10)
    for lens, expected in (([4, 6, 1, 12, 3], [[4, 6], [1], [12], [3]]), ([11, 5, 5], [[11], [5, 5]])):
        rows = torch.arange(sum(lens))
        x, positions, seqlens = zip(*sdtp.packs(rows[:, None], rows, lens))
        assert list(seqlens) == expected and [len(part) for part in x] == list(map(sum, expected))
        assert torch.equal(torch.cat(positions), rows) and torch.equal(torch.cat(x)[:, 0], rows)


def test_calibrate_without_scores():
    """A threshold is a number even where nothing can be dropped, or where no score is a number."""
    model = tiny.build(num_hidden_layers=5)
    for prompt, scorer in ((5, scorers.earliest), (40, lambda x, *_: torch.full((len(x),), math.nan))):
        found = sdtp.calibrate(model, [tiny.ids(prompt).tolist()], {1: scorer}, Schedule(5, {1: 0.5}))
        assert found.threshold == {1: 0.0}


def test_calibrate_on_a_sample(monkeypatch):
    """Of prompts with more tokens than CALIBRATION_TOKENS every k-th by length, of each k the middle one; of one prompt that one."""
    model, asked = tiny.build(num_hidden_layers=5), []

    def scorer(x, positions, seqlens, block):
        asked.append(seqlens)
        return scorers.earliest(x, positions, seqlens, block)

    monkeypatch.setattr(sdtp, "CALIBRATION_TOKENS", 60)
    for lens in ([50, 20, 40, 30], [61]):  # 140 tokens: every third
        sdtp.calibrate(model, [tiny.ids(n).tolist() for n in lens], {1: scorer}, Schedule(5, {1: 0.5}))
    assert asked == [[30], [61]]


def test_adaptive_guard(monkeypatch):
    """Adaptive stages too: a selection that drops nothing is an error."""
    model = tiny.build(num_hidden_layers=5)
    monkeypatch.setattr(sdtp, "select", lambda scores, p, share, seqlens, *rest: (torch.arange(len(scores)), seqlens))
    with pytest.raises(RuntimeError, match="layer 1 holds .40. tokens"):
        prefill(model, tiny.ids(40), random_heads(model), Schedule(5, {1: 0.5}, threshold={1: 0.5}, adaptive=True))


def test_threshold_round_trip_and_refusals(tmp_path):
    model = tiny.build()
    heads = {1: PruneHead(32)}
    save_heads(tmp_path, heads, model, Schedule(3, {1: 0.5}, span=4, threshold={1: -0.75}))
    schedule = load_heads(tmp_path, model)[1]
    assert schedule.threshold == {1: -0.75} and not schedule.adaptive and schedule.span == 4
    assert schedule.with_ratio(0.8).threshold == {}  # another share asks for another one
    for threshold in (None, {2: 0.5}, {1: math.inf}, {1: math.nan}):
        with pytest.raises(ValueError, match="needs a threshold"):
            Schedule(3, {1: 0.5}, threshold=threshold, adaptive=True)
