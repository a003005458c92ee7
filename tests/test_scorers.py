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


@each_model
def test_last_attention_of_what_is_alive(fields):
    """Packed rows with dropped tokens between them score as one sequence at a time, windows by original position."""
    model, w = tiny.build(**fields), 3
    block, attention = model.layers[1], model.layers[1].self_attn
    positions = [[0, 1, 4, 6, 7, 11, 12], [0, 3, 4, 5, 9]]
    x = [
        torch.randn(len(p), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(len(p))) for p in positions
    ]
    got = scorers.last_attention(w)(torch.cat(x), torch.tensor(sum(positions, [])), [7, 5], block).split([7, 5])
    for rows, p, scores in zip(x, positions, got):
        q, k, _ = attention.qkv(block.input_layernorm(rows), torch.tensor(p))
        expected = [0.0] * len(p)
        for i in range(len(p) - w, len(p)):
            for h in range(4):
                seen = [j for j in range(i + 1) if p[i] - p[j] < fields.get("sliding_window", 99)]
                e = {j: math.exp(float(q[i, h] @ k[j, h // 2]) / math.sqrt(attention.head_dim)) for j in seen}
                for j in seen:
                    expected[j] += e[j] / sum(e.values()) / (4 * w)
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_most_recent_keeps_the_latest():
    """Pruning by most_recent leaves the first tokens and the end of each prompt."""
    model, schedule = tiny.build(), Schedule(3, {1: 0.6, 2: 0.35})
    ids = torch.cat([tiny.ids(40), tiny.ids(20)])
    _, cache = prefill(model, ids, dict.fromkeys(schedule, scorers.most_recent), schedule, [40, 20])
    for layer, share in schedule.items():
        expected = []
        for n in (40, 20):
            expected += [*range(4), *range(n - (int(n * share + 0.5) - 4), n)]
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


def test_from_labels_reads_by_position():
    """Labels follow their tokens, prompt by prompt, after others were dropped."""
    labels = [torch.tensor([5.0, 1.0, 4.0, 2.0], dtype=torch.float64), torch.tensor([7.0, 8.0])]
    got = scorers.from_labels(labels)(torch.zeros(3, 8), torch.tensor([1, 3, 0]), [2, 1], None)
    assert got.tolist() == [1.0, 2.0, 7.0] and got.dtype == torch.float32
