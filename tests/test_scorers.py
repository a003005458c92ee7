"""scorers.py against transformers' eager attention and plain loops."""

import math

import pytest
import tiny
import torch

import scorers
from model import Transformer
from sdtp import Schedule, prefill

FIELDS = {"llama": {}, "window": {"model_type": "mistral", "sliding_window": 5}}
each_model = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)


@each_model
@pytest.mark.parametrize("n, w", [(20, 8), (6, 8)], ids=["long", "shorter than w"])
def test_last_attention_equals_transformers(fields, n, w, tmp_path):
    """last_attention is the mean over heads and the last w rows of transformers' eager attention weights."""
    from transformers import AutoModelForCausalLM

    ids = tiny.ids(n)
    hf = AutoModelForCausalLM.from_pretrained(
        tiny.write(tmp_path, **fields), attn_implementation="eager", dtype=torch.float64
    )
    out = hf(ids[None], output_attentions=True, output_hidden_states=True)
    model = Transformer.from_pretrained(tmp_path, torch.float64)
    for layer, block in enumerate(model.layers):
        got = scorers.last_attention(w)(out.hidden_states[layer][0], torch.arange(n), [n], block)
        rows = out.attentions[layer][0][:, max(0, n - w) :]
        expected = sum(rows[h, i] for h in range(rows.shape[0]) for i in range(rows.shape[1])) / (
            rows.shape[0] * rows.shape[1]
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert expected.max() - expected.min() > 0.02


def some_alive():
    """Two sequences with gaps in their positions: [positions], [rows (T, 32) float64]."""
    positions = [[0, 1, 4, 6, 7, 11, 12], [0, 3, 4, 5, 9]]
    return positions, [
        torch.randn(len(p), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(len(p))) for p in positions
    ]


def loop_attention(block, rows, positions, window):
    """Attention weights [head][query][key] of one sequence, one dot product at a time."""
    q, k, _ = block.self_attn.qkv(block.input_layernorm(rows), torch.tensor(positions))
    n, weights = len(positions), []
    for h in range(4):
        weights.append([[0.0] * n for _ in range(n)])
        for i in range(n):
            seen = [j for j in range(i + 1) if positions[i] - positions[j] < window]
            e = {j: math.exp(float(q[i, h] @ k[j, h // 2]) / math.sqrt(block.self_attn.head_dim)) for j in seen}
            for j in seen:
                weights[h][i][j] = e[j] / sum(e.values())
    return weights


@each_model
@pytest.mark.parametrize("heads, pool", [("mean", 1), ("max", 1), (2, 1), (3, 3), ("mean", 3)])
def test_last_attention_of_what_is_alive(fields, heads, pool):
    """Packed rows with dropped tokens between them score as one sequence at a time, windows by original position."""
    block, w = tiny.build(**fields).layers[1], 3
    positions, x = some_alive()
    scorer = scorers.last_attention(w, heads, pool)
    got = scorer(torch.cat(x), torch.tensor(sum(positions, [])), [7, 5], block).split([7, 5])
    for rows, p, scores in zip(x, positions, got):
        weights, expected = loop_attention(block, rows, p, fields.get("sliding_window", 99)), []
        for j in range(len(p)):
            by_head = sorted(
                (sum(weights[h][i][j] for i in range(len(p) - w, len(p))) / w for h in range(4)), reverse=True
            )
            best = by_head[: {"mean": 4, "max": 1}.get(heads, heads)]
            expected.append(sum(best) / len(best))
        expected = [max(expected[max(0, j - pool // 2) : j + pool // 2 + 1]) for j in range(len(p))]
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


@each_model
@pytest.mark.parametrize("rows", [1, 3, 256])
def test_accumulated_attention_of_what_is_alive(fields, rows):
    """In blocks of any number of rows, the attention that each token gets from all queries and heads of its own sequence."""
    block = tiny.build(**fields).layers[1]
    positions, x = some_alive()
    got = scorers.accumulated_attention(torch.cat(x), torch.tensor(sum(positions, [])), [7, 5], block, rows)
    for x_i, p, scores in zip(x, positions, got.split([7, 5])):
        weights = loop_attention(block, x_i, p, fields.get("sliding_window", 99))
        expected = [sum(weights[h][i][j] for h in range(4) for i in range(len(p))) for j in range(len(p))]
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
        assert sum(expected) == pytest.approx(4 * len(p))  # every query gives 1 per head


@each_model
def test_accumulated_attention_equals_transformers(fields, tmp_path):
    """accumulated_attention is the sum over heads and queries of transformers' eager attention weights."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(
        tiny.write(tmp_path, **fields), attn_implementation="eager", dtype=torch.float64
    )
    out = hf(tiny.ids(20)[None], output_attentions=True, output_hidden_states=True)
    model = Transformer.from_pretrained(tmp_path, torch.float64)
    for layer, block in enumerate(model.layers):
        got = scorers.accumulated_attention(out.hidden_states[layer][0], torch.arange(20), [20], block, rows=6)
        torch.testing.assert_close(got, out.attentions[layer][0].sum((0, 1)), rtol=0, atol=1e-5)


@each_model
@pytest.mark.parametrize("neighbours", [1, 5])
def test_last_query(fields, neighbours):
    """The last token's query times each key, summed over heads; mean over the neighbours, absent ones counting 0 as in GemFilter's code."""
    block = tiny.build(**fields).layers[1]
    positions, x = some_alive()
    got = scorers.last_query(torch.cat(x), torch.tensor(sum(positions, [])), [7, 5], block, neighbours).split([7, 5])
    for rows, p, scores in zip(x, positions, got):
        q, k, _ = block.self_attn.qkv(block.input_layernorm(rows), torch.tensor(p))
        dots = [sum(float(q[-1, h] @ k[j, h // 2]) for h in range(4)) for j in range(len(p))]
        half = neighbours // 2
        expected = [sum(dots[max(0, j - half) : j + half + 1]) / neighbours for j in range(len(p))]
        assert scores.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4) and scores.dtype == torch.float32


def test_norm():
    """norm is the root of the sum of squares of each row, in float32 whatever x is."""
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        got = scorers.norm(x.to(dtype), torch.arange(9), [4, 5], None)
        expected = [sum(v * v for v in row) ** 0.5 for row in x.to(dtype).tolist()]
        assert got.tolist() == pytest.approx(expected, rel=1e-5) and got.dtype == torch.float32


@each_model
def test_self_information(fields):
    """Nats of each token under a forward over those before it alone; each sequence's first token highest; packed equals single."""
    model, lens = tiny.build(**fields), [12, 1, 9]
    prompts = [tiny.ids(n) for n in lens]
    got = scorers.self_information(model, torch.cat(prompts), lens).split(lens)
    for ids, nats in zip(prompts, got):
        expected = [-model(ids[:i])[-1].log_softmax(-1)[ids[i]].item() for i in range(1, len(ids))]
        assert nats[1:].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert nats[0] > max(expected, default=0) and nats.dtype == torch.float32
        single = scorers.self_information(model, ids, [len(ids)])
        torch.testing.assert_close(nats, single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scorer", [scorers.most_recent, scorers.earliest])
def test_position_scorers_keep_one_end(scorer):
    """Pruning by most_recent leaves the first tokens and the end of each prompt, by earliest its beginning and the protected end."""
    model, schedule = tiny.build(), Schedule(3, {1: 0.6, 2: 0.35})
    ids = torch.cat([tiny.ids(40), tiny.ids(20)])
    _, cache = prefill(model, ids, dict.fromkeys(schedule, scorer), schedule, [40, 20])
    for layer, share in schedule.items():
        expected = []
        for n in (40, 20):
            count, latest = int(n * share + 0.5), scorer is scorers.most_recent
            first = 4 if latest else count - n // 10  # of the beginning
            expected += [*range(first), *range(n - (count - first), n)]
        assert cache[layer].rows()[2].tolist() == expected


def test_random_is_seeded_and_new_at_every_stage():
    """The same seed keeps the same tokens; two stages of a run, and two seeds, draw different scores."""
    model, schedule = tiny.build(), Schedule(3, {1: 0.7, 2: 0.5})

    def run(seed):
        drawn = []
        scorer = scorers.random(torch.Generator().manual_seed(seed))

        def spy(*args):
            drawn.append(scorer(*args))
            return drawn[-1]

        _, cache = prefill(model, tiny.ids(40), dict.fromkeys(schedule, spy), schedule)
        return drawn, cache[2].rows()[2].tolist()

    (first, kept), (again, kept_again), (_, other) = run(0), run(0), run(1)
    assert all(map(torch.equal, first, again)) and kept == kept_again != other
    assert not torch.equal(first[0][: len(first[1])], first[1])
    assert first[0].dtype == torch.float32 and 0.2 < torch.cat(first).std() < 0.4


def test_random_of_packed_prompts():
    """With a generator for each prompt, a prompt's scores are those it has alone; one too few is an error."""
    seeded = lambda *seeds: scorers.random(*(torch.Generator().manual_seed(s) for s in seeds))
    x = torch.zeros(9, 8)
    both = seeded(3, 4)(x, None, [5, 4], None)
    assert torch.equal(both[:5], seeded(3)(x[:5], None, [5], None))
    assert torch.equal(both[5:], seeded(4)(x[:4], None, [4], None))
    with pytest.raises(ValueError, match="longer"):
        seeded(3)(x, None, [5, 4], None)


def test_from_labels_reads_by_position():
    """Labels follow their tokens, prompt by prompt, after others were dropped."""
    labels = [torch.tensor([5.0, 1.0, 4.0, 2.0], dtype=torch.float64), torch.tensor([7.0, 8.0])]
    got = scorers.from_labels(labels)(torch.zeros(3, 8), torch.tensor([1, 3, 0]), [2, 1], None)
    assert got.tolist() == [1.0, 2.0, 7.0] and got.dtype == torch.float32
