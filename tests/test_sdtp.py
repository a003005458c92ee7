"""sdtp.py against plain references: a Python sort, and a model that hides what sdtp.py drops."""

import json
import math
from decimal import ROUND_HALF_UP, Decimal

import pytest
import tiny
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import sdtp
from model import KVCache, Transformer
from sdtp import PruneHead, generate, load_heads, prefill, pruned, save_heads, select

QWEN2 = dict(model_type="qwen2", use_sliding_window=True, max_window_layers=2)
MODELS = {  # each with grouped keys
    "full": dict(num_hidden_layers=5),
    "window": dict(num_hidden_layers=5, model_type="mistral", sliding_window=7),
    "window on some layers": dict(num_hidden_layers=5, sliding_window=7, **QWEN2),
    "qwen3": dict(num_hidden_layers=5, **tiny.QWEN3),
    "bloom": dict(num_hidden_layers=5, **tiny.BLOOM),
    "gpt-oss": dict(num_hidden_layers=5, **tiny.GPT_OSS),
}
each_model = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)

SCHEDULES = {  # schedule, span
    "single tokens": ({1: 0.6, 2: 0.36, 4: 0.216}, 1),
    "spans of 5": ({1: 0.7, 2: 0.49, 4: 0.343}, 5),
    "spans of 16": ({1: 0.7, 2: 0.49, 4: 0.343}, 16),
    "a share of 0": ({3: 0.0, 1: 0.6}, 1),
    "first and last layer": ({0: 0.5, 4: 0.3}, 1),
    "at the floor": ({2: 0.01}, 16),
}
each_schedule = pytest.mark.parametrize("schedule, span", SCHEDULES.values(), ids=SCHEDULES)
STAGES = {1: 0.6, 2: 0.36, 4: 0.216}


def heads_of(schedule):
    torch.manual_seed(0)
    return {layer: PruneHead(32) for layer, share in schedule.items() if share}


def checkpoint_with_heads(folder, schedules, span=1, **fields):
    """tiny.checkpoint() FOLDER/tiny and heads for it, {folder of heads: schedule}; the model."""
    tiny.checkpoint(folder / "tiny", **fields)
    model = Transformer.from_pretrained(folder / "tiny", torch.float32)
    for name, schedule in schedules.items():
        save_heads(folder / name, heads_of(schedule), model, schedule, span)
    return model


def kept_by_sort(scores, n, share, span=1):
    """Positions kept of {position: score} in a prompt of n tokens, ascending: a plain sort."""
    last = max(1, int(n * 0.1 + 0.5))
    protected = [p for p in scores if p < 4 or p >= n - last]
    free = [p for p in scores if p not in protected]
    rank = {}
    for p in free:
        neighbours = [scores[q] for q in free if q // span == p // span]
        mean = sum(neighbours) / len(neighbours)
        rank[p] = (math.isnan(mean), 0 if math.isnan(mean) else -mean, -p)
    count = max(len(protected), int(n * share + 0.5)) - len(protected)
    return sorted(protected + sorted(free, key=rank.get)[:count])


def masked(model, ids, n, heads=None, schedule=(), span=1):
    """Nothing is removed: tokens of the prompt, the first n of ids, are hidden from their stage on.

    Returns logits (T, vocab_size), and per layer (positions alive, k, v of all tokens).
    """
    x, positions, alive, layers = model.embed(ids), torch.arange(len(ids)), range(len(ids)), []
    for layer, block in enumerate(model.layers):
        if layer in schedule:
            scores = [0.0] * len(ids)  # a share of 0 keeps the protected whatever they score
            if schedule[layer]:
                scores = heads[layer](x, positions, [len(ids)], block).tolist()
            scores = {p: scores[p] for p in alive if p < n}
            alive = kept_by_sort(scores, n, schedule[layer], span) + list(range(n, len(ids)))
        attention, normed = block.self_attn, block.input_layernorm(x)
        q, (k, v) = attention.q(normed, positions), attention.kv(normed, positions)
        layers.append((torch.tensor([p for p in alive if p < n]), k, v))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        distance = positions[:, None] - positions
        seen = torch.isin(positions, torch.tensor(alive)) | (distance == 0)
        seen = seen & (distance >= 0) & (distance < (attention.extras.window or len(ids)))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        if attention.extras.sinks is not None:
            sinks = attention.extras.sinks[:, None, None].expand(-1, len(ids), 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)[..., : len(ids)]
        x = x + attention.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.logits(x), layers


def close(a, b):
    return a.shape == b.shape and (a - b).abs().max() < 1e-10


@example(5, 512, 0)
@given(st.integers(1, 10**6), st.integers(0, 1024), st.integers(0, 50))
def test_keep_count(n, k, protected):
    """n * share rounded half up (shares exact in binary), at least protected and 1, at most n."""
    rounded = int((Decimal(n) * k / 1024).quantize(Decimal(1), ROUND_HALF_UP))
    assert sdtp.keep_count(n, k / 1024, protected) == min(n, max(1, protected, rounded))


def test_protected():
    """The first 4 and the last 10 % of prompts of 1 to 200 tokens; they are alive at any share."""
    for n in range(1, 201):
        wanted = [p < 4 or p >= n - max(1, int(n * 0.1 + 0.5)) for p in range(n)]
        assert sdtp.is_protected(torch.arange(n), n).tolist() == wanted
        assert sdtp.protected_count(n) == sdtp.alive_count(n, 0.0) == sum(wanted)
        assert sdtp.alive_count(n, 0.5) == max(sum(wanted), int(n * 0.5 + 0.5))


def test_paper_schedule():
    """Layers 4, 7, ..., shares 0.9**s: 10 stages in 32 layers and deeper models, 9 in 30."""
    assert list(sdtp.paper_schedule(32)) == list(range(4, 32, 3)) == list(sdtp.paper_schedule(80))
    assert list(sdtp.paper_schedule(30).values()) == [0.9**s for s in range(1, 10)]
    assert sdtp.paper_schedule(12, 0.5, first_layer=2, step=4, stages=2) == {2: 0.5, 6: 0.25}
    with pytest.raises(ValueError, match="no stage fits a model of 4 layers: lower --first_layer"):
        sdtp.paper_schedule(4)


def test_select_by_hand():
    """Of equal scores the later stays; the protected do; NaN is the lowest; spans stay whole."""
    scores = torch.tensor([math.nan] * 4 + [math.nan] * 5 + [1.0] * 2 + [-5.0] * 9)
    keep, kept = select(scores, torch.arange(20), 0.5, [20], [20])
    assert keep.tolist() == [0, 1, 2, 3, 9, 10, 16, 17, 18, 19] and kept == [10]
    scores = torch.zeros(100)
    scores[[20, 47, 65]] = torch.tensor([3.0, 2.0, 1.0])
    keep, kept = select(scores, torch.arange(100), 0.34, [100], [100], 8)
    spans = [*range(16, 24), *range(40, 48), *range(68, 72)]
    assert keep.tolist() == [0, 1, 2, 3, *spans, *range(90, 100)] and kept == [34]


@given(st.data(), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.floats(0, 1))
def test_select_equals_a_sort(data, prompt_lens, share):
    """Packed prompts that lost tokens before, as a plain sort of each; few scores, so many ties."""
    span, parts = data.draw(st.sampled_from([1, 1, 2, 5, 16])), []
    values = [-2.0, 0.0, 1.0, 3.0, "dropped"] + [math.nan, -math.inf] * (span == 1)
    for n in prompt_lens:
        scores = data.draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
        protected = sdtp.is_protected(torch.arange(n), n)
        scores = [1.0 if p and score == "dropped" else score for p, score in zip(protected, scores)]
        parts.append({p: score for p, score in enumerate(scores) if score != "dropped"})
    positions = torch.tensor([p for part in parts for p in part])
    scores = torch.tensor([score for part in parts for score in part.values()])
    lens = [len(part) for part in parts]
    keep, kept = select(scores, positions, share, lens, prompt_lens, span)
    wanted = [kept_by_sort(part, n, share, span) for part, n in zip(parts, prompt_lens)]
    assert [p.tolist() for p in positions[keep].split(kept)] == wanted
    assert (keep.diff() > 0).all()


def test_head_is_eq_1():
    """Linear(d/4 -> 2)(GELU(Linear(d -> d/4)(x))), and keep minus drop, in float32 for any x."""
    torch.manual_seed(0)
    head, x = PruneHead(32), 3 * torch.randn(20, 32)
    w1, b1, w2, b2 = (p.detach().double() for p in head.parameters())
    hidden = x.double() @ w1.T + b1
    pi = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)) @ w2.T + b2
    assert hidden.shape == (20, 8) and pi.std() > 0.3
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        logits, score = head.logits(x.to(dtype)), head(x.to(dtype))
        assert logits.dtype == score.dtype == torch.float32
        assert (logits - pi).abs().max() < tolerance
        assert (score - (pi[:, 0] - pi[:, 1])).abs().max() < 2 * tolerance


@each_model
@each_schedule
def test_pruning_equals_masking(fields, schedule, span):
    """Prefill and decoding of a ragged batch and of single prompts: logits, keys and values."""
    model, lens = tiny.build(**fields), [40, 1, 5, 2, 50, 4, 3]
    heads, whole = heads_of(schedule), [tiny.ids(n + 9, n) for n in lens]
    expected = [masked(model, ids, n, heads, schedule, span) for ids, n in zip(whole, lens)]
    prompts = [ids[:n] for ids, n in zip(whole, lens)]
    first, cache = prefill(model, torch.cat(prompts), heads, schedule, lens, span=span)
    assert first.shape == (7, 61) and cache.alive == cache.seqlens() and cache.alive[4][0] < 40
    for prompt, logits, (wanted, _) in zip(prompts, first, expected):
        single, _ = prefill(model, prompt, heads, schedule, span=span)
        assert close(logits, wanted[len(prompt) - 1]) and close(single[0], wanted[len(prompt) - 1])
    for layer, held in enumerate(cache.layers):
        rows = zip(*(t.split(held.seqlens) for t in held.rows()))
        for (k, v, positions), (_, layers) in zip(rows, expected, strict=True):
            alive, all_k, all_v = layers[layer]
            assert torch.equal(positions, alive)
            assert close(k, all_k[alive]) and close(v, all_v[alive])
    at = list(lens)
    for step in ([1] * 7, [1] * 7, [4, 1, 2, 1, 5, 2, 1], [1] * 7):
        ids = torch.cat([ids[a : a + s] for ids, a, s in zip(whole, at, step)])
        positions = torch.cat([torch.arange(a, a + s) for a, s in zip(at, step)])
        got = model(ids, positions, step, cache).split(step)
        wanted = [e[a : a + s] for (e, _), a, s in zip(expected, at, step)]
        assert all(map(close, got, wanted))
        at = [a + s for a, s in zip(at, step)]


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_1_change_no_bit(fields, dtype, monkeypatch):
    """With select called at every stage, logits and cache are those of a dense prefill."""
    model, lens, calls = tiny.build(dtype, **fields), [40, 3, 21], []
    monkeypatch.setattr(sdtp, "select", lambda *args: calls.append(args) or select(*args))
    ids = torch.cat([tiny.ids(n) for n in lens])
    dense, dense_cache = prefill(model, ids, seqlens=lens)
    assert not calls
    whole, cache = prefill(model, ids, heads_of(STAGES), dict.fromkeys(STAGES, 1.0), lens)
    assert len(calls) == 3 and torch.equal(whole, dense)
    for a, b in zip(cache.layers, dense_cache.layers):
        assert all(map(torch.equal, a.rows(), b.rows()))


def test_prefill_costs_what_is_alive():
    """The LM head runs on one row a prompt, blocks and bytes are those of the tokens alive."""
    model, rows, cache = tiny.build(num_hidden_layers=5), [], KVCache(5, extra=3)
    for module in (*model.layers, model.norm):
        module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    prefill(model, tiny.ids(50), heads_of(STAGES), STAGES, None, cache)
    assert rows == [50, 30, 18, 18, 11, 1]
    assert cache.nbytes() == sum(n + 3 for n in rows[:5]) * 2 * 2 * 8 * 8  # k, v, heads, D, float64


@pytest.mark.parametrize(
    "schedule, heads, named",
    [
        ({6: 0.5}, [6], "layer 6"),
        ({1: 1.5}, [1], "1.5"),
        ({1: math.nan}, [1], "nan"),
        ({2: 0.6, 1: 0.5}, [1, 2], "0.6 at layer 2"),
        ({1: 0.5, 2: 0.4}, [1], "no head for the stage at layer 2"),
        ({}, [1], "heads without a schedule"),
    ],
)
def test_refused_schedules(schedule, heads, named):
    """Never a silent dense run: what a stage lacks is named."""
    model = tiny.build()
    with pytest.raises(ValueError, match=named):
        prefill(model, tiny.ids(30), dict.fromkeys(heads, PruneHead(32)), schedule)


@each_model
@pytest.mark.parametrize("schedule, span", [({}, 1), (STAGES, 1), (STAGES, 16)])
def test_generate_greedy(fields, schedule, span):
    model, lens, expected = tiny.build(**fields), [30, 5, 17], []
    heads = heads_of(schedule)
    for prompt in map(tiny.ids, lens):
        ids = prompt
        for _ in range(9):
            logits, _ = masked(model, ids, len(prompt), heads, schedule, span)
            ids = torch.cat((ids, logits[-1:].argmax(-1)))
        expected.append(ids[len(prompt) :].tolist())
    method, prompts = pruned(heads, schedule, span), torch.cat([tiny.ids(n) for n in lens])
    assert generate(model, prompts, 9, method, seqlens=lens) == expected
    assert [generate(model, tiny.ids(n), 9, method)[0] for n in lens] == expected
    tied = model.config.tie_word_embeddings  # such a random model repeats itself
    assert len({t for tokens in expected for t in tokens}) > (1 if tied else 5)


def test_generate_stops():
    """By and with the first end-of-sequence token of each, not before min_new_tokens."""
    model, lens, steps = tiny.build(), [20, 11], []
    ids = torch.cat([tiny.ids(n) for n in lens])
    free = generate(model, ids, 10, seqlens=lens)
    eos = free[0][3]
    cut = [f[: f.index(eos) + 1] if eos in f else f for f in free]
    how = dict(seqlens=lens, eos_token_ids=(60, eos), on_token=steps.append)
    assert generate(model, ids, 10, **how) == cut and len(cut[0]) < 10
    assert len(steps) == max(map(len, cut)) and [s[0] for s in steps][: len(cut[0])] == cut[0]
    cache = KVCache(3, extra=10)
    assert generate(model, ids[:20], 10, cache=cache, eos_token_ids=[eos]) == cut[:1]
    assert cache.seqlens() == [[20 + len(cut[0]) - 1]] * 3
    with pytest.raises(ValueError, match="empty cache"):
        prefill(model, ids[:20], cache=cache)
    assert generate(model, ids, 0, seqlens=lens) == [[], []]
    assert generate(model, ids, 10, seqlens=lens, temperature=2.0, top_p=1e-6) == free
    first = free[0][0]
    ((new, *more),) = generate(model, ids[:20], 3, eos_token_ids=[first], min_new_tokens=1)
    logits = model(ids[:20])[-1].index_fill(0, torch.tensor(first), -math.inf)
    assert new == logits.argmax() and more  # the best token that does not end the text


def test_generate_refuses():
    """Tokens beyond the model's positions (exactly filled they may be); settings out of range."""
    model = tiny.build()
    assert len(generate(model, tiny.ids(60), 4)[0]) == 4
    with pytest.raises(ValueError, match="65 prompt and new tokens .* 64 positions"):
        generate(model, tiny.ids(60), 5)
    wrong = {"temperature": (math.nan, math.inf, -1.0), "top_p": (math.nan, 0.0, 1.5)}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} {value}: "):
                generate(model, tiny.ids(5), 2, **{name: value})


@pytest.mark.parametrize("temperature, top_p", [(0.5, 1.0), (2.0, 0.7), (1.0, 0.4)])
def test_sampling_distribution(temperature, top_p):
    """40,000 draws are of softmax(logits / temperature), cut to the smallest set with top_p."""
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    probs, total, wanted = (logits / temperature).softmax(-1), 0.0, torch.zeros(8)
    for i in probs.argsort(descending=True):
        if total < top_p:
            wanted[i] = probs[i]
        total += probs[i]
    generator = torch.Generator().manual_seed(1)
    draws = sdtp.sample_token(logits.expand(40000, 8), temperature, top_p, generator)
    got = draws.bincount(minlength=8) / 40000
    assert (got - wanted / wanted.sum()).abs().max() < 0.01
    assert torch.equal(got == 0, wanted == 0)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint read from disk, and heads written for it; of one stage at a share of 0 too."""
    torch.manual_seed(0)
    model = Transformer.from_pretrained(tiny.write(tmp_path / "ckpt"), torch.float32)
    heads, schedule = {0: PruneHead(32), 1: PruneHead(32)}, {0: 0.7, 1: 0.49, 2: 0.0}
    save_heads(tmp_path / "heads", heads, model, schedule, 4, teacher="grad_norm", ckpt="tiny")
    return model, heads, schedule, tmp_path


def test_heads_round_trip(saved):
    """Loaded heads prune as the saved ones, bit for bit, with schedule, span and info; frozen."""
    model, heads, schedule, folder = saved
    loaded, loaded_schedule, span, info = load_heads(folder / "heads", model)
    assert loaded_schedule == schedule and span == 4 and list(loaded) == [0, 1]
    assert info["teacher"] == "grad_norm" and info["ckpt"] == "tiny"
    a, b = (prefill(model, tiny.ids(30), h, schedule, span=4)[0] for h in (heads, loaded))
    assert torch.equal(a, b)
    assert not any(p.requires_grad for head in loaded.values() for p in head.parameters())


def test_heads_of_a_class(saved):
    """A class of one's own is loaded by its name, and by no other."""
    model, _, _, folder = saved

    class Wide(PruneHead):
        def __init__(self, hidden_size):
            super().__init__(hidden_size, divisor=2)

    save_heads(folder / "wide", {1: Wide(32)}, model, {1: 0.5})
    assert load_heads(folder / "wide", model, Wide)[0][1].fc1.weight.shape == (16, 32)
    for name, head in (("wide", PruneHead), ("heads", Wide)):
        with pytest.raises(ValueError, match=f"class .*, not {head.__name__}"):
            load_heads(folder / name, model, head)


def test_fingerprint(saved):
    """One checkpoint in float32 and bfloat16; another for any changed tensor, or a tied output."""
    model, _, _, folder = saved
    wanted = sdtp.fingerprint(model)
    half = Transformer.from_pretrained(folder / "ckpt", torch.bfloat16)
    assert sdtp.fingerprint(half) == wanted and load_heads(folder / "heads", half)
    for p in model.parameters():
        p.view(-1)[0] += 1
        assert sdtp.fingerprint(model) != wanted
        p.view(-1)[0] -= 1
    tied = Transformer.from_pretrained(tiny.write(folder / "tied", tie_word_embeddings=True))
    with pytest.raises(ValueError, match="other weights: those of --ckpt tiny"):
        load_heads(folder / "heads", tied)


def edit(**changes):
    """Changes heads.json in a folder."""

    def spoil(folder):
        meta = json.loads((folder / "heads.json").read_text())
        (folder / "heads.json").write_text(json.dumps({**meta, **changes}))

    return spoil


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda f: (f / "heads.json").unlink(), "/heads.json does not exist"),
        (lambda f: (f / "heads.safetensors").unlink(), "/heads.safetensors"),
        (write("heads.safetensors", "0"), "heads.safetensors is damaged"),
        (write("heads.json", "{"), "heads.json"),
        (edit(format=None), "heads of another version"),
        (edit(schedule=None), "heads.json"),
        (edit(schedule={"7": 0.5}), "layer 7"),
        (edit(schedule={"0": 0.7, "1": 0.5, "2": 0.4}), "2.fc1.weight"),
        (edit(schedule={"1": 0.5}), "0.fc1.weight"),
        (edit(schedule={"0": "most"}), "most"),
        (edit(span="many"), "many"),
    ],
)
def test_damaged_heads(spoil, named, saved):
    model, _, _, folder = saved
    spoil(folder / "heads")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_heads(folder / "heads", model)
    found = str(caught.value).split(str(folder / "heads"))
    assert len(found) == 2 and named in found[1] and "\n" not in found[1]


def test_write_atomic(tmp_path, monkeypatch):
    """A write that fails leaves the old file whole; the folder is made."""
    path = tmp_path / "new" / "file"
    sdtp.write_atomic(path, b"old")
    monkeypatch.setattr(sdtp.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sdtp.write_atomic(path, b"lost")
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


@tiny.on_cuda
@each_model
@pytest.mark.parametrize("schedule, span", [({}, 1), (STAGES, 1), ({1: 0.6, 2: 0.0}, 16)])
def test_cuda_equals_cpu(fields, schedule, span):
    """A ragged batch in float64, dense and pruned: tokens kept, logits, and what is generated."""
    model, lens = tiny.build(**fields), [30, 5, 17]
    ids = torch.cat([tiny.ids(n) for n in lens])
    heads = heads_of(schedule)
    expected, cache = prefill(model, ids, heads, schedule, lens, span=span)
    tokens = generate(model, ids, 12, pruned(heads, schedule, span), seqlens=lens)
    model.cuda()
    heads = {layer: head.cuda() for layer, head in heads.items()}
    got, cuda_cache = prefill(model, ids.cuda(), heads, schedule, lens, span=span)
    assert (got.cpu() - expected).abs().max() < 1e-9
    for a, b in zip(cache.layers, cuda_cache.layers):
        assert torch.equal(a.rows()[2], b.rows()[2].cpu())
    assert generate(model, ids.cuda(), 12, pruned(heads, schedule, span), seqlens=lens) == tokens
