"""eval_tasks.py: scores against one full forward, and the table's arithmetic by hand."""

import json
import math
import sys

import pytest
import tiny
import torch

import cli
import eval_tasks
from data import Example
from eval_tasks import METHODS, perplexity, score
from sdtp import PruneHead, Schedule, protected_count

EXAMPLES = [Example(tiny.ids(n).tolist(), tiny.ids(m, seed=n).tolist()) for n, m in ((30, 6), (41, 1), (24, 9))]
SCHEDULE = Schedule(3, {1: 0.7, 2: 0.45})


def heads():
    torch.manual_seed(0)
    return {layer: PruneHead(32) for layer in SCHEDULE}


@pytest.mark.parametrize("fields", [{}, {"model_type": "mistral", "sliding_window": 7}], ids=["full", "window"])
def test_dense_score_equals_a_full_forward(fields):
    """Dense: nats of each response token are those of one forward over prompt and response, every token alive."""
    model = tiny.build(**fields)
    for example in EXAMPLES:
        (nats,), (alive,), seconds = score(model, [example])
        ids, n = torch.tensor(example.prompt + example.response), len(example.prompt)
        log_probs = model(ids).log_softmax(-1)
        expected = [-log_probs[i - 1, ids[i]].item() for i in range(n, len(ids))]
        assert nats.tolist() == pytest.approx(expected, abs=1e-5)
        assert alive == [n] * 3 and seconds > 0


def test_rows_by_hand():
    """Every number of every row follows from score() of the single examples."""
    model, ranker = tiny.build(), heads()
    rows = perplexity(model, EXAMPLES, ["sdtp", "dense", "floor", "most_recent"], SCHEDULE, ranker)
    assert [r["method"] for r in rows] == ["dense", "sdtp", "floor", "most_recent"]
    recent = dict.fromkeys(range(3), lambda x, positions, seqlens, block: positions.float())
    runs = {
        "dense": (None, None),
        "sdtp": (ranker, SCHEDULE),
        "floor": (recent, Schedule(3, {1: 0.0})),
        "most_recent": (recent, SCHEDULE),
    }
    losses = {}
    for row in rows:
        ranks, stages = runs[row["method"]]
        nats = sum((score(model, [e], ranks, stages)[0][0].tolist() for e in EXAMPLES), [])
        loss = losses[row["method"]] = sum(nats) / 16
        lengths = [len(e.prompt) for e in EXAMPLES]
        kept = sum(sum(stages.alive(n)) / 3 if stages else n for n in lengths)
        if row["method"] == "floor":
            assert kept == pytest.approx(sum((n + 2 * protected_count(n)) / 3 for n in lengths))
        expected = {
            "prompts": 3, "prompt_tokens": 95, "scored_tokens": 16, "loss": loss, "loss_diff": loss - losses["dense"], "ppl": math.exp(loss),
            "ppl_diff": math.exp(loss) / math.exp(losses["dense"]) - 1, "mean_alive": kept / 95, "compression": 95 / kept,
        }  # fmt: skip
        assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert row["prefill_speedup"] > 0
    assert len({round(v, 4) for v in losses.values()}) == 4


def test_speedup_is_the_median_of_the_examples(monkeypatch):
    """prefill_speedup is the median over examples of dense seconds over the method's, after a warm-up that does not count."""
    model, ticks = tiny.build(), iter([0, 1, 0, 5, 0, 8, 0, 4, 0, 9, 0, 3, 0, 6, 0, 6])
    monkeypatch.setattr(eval_tasks, "clock", lambda model: next(ticks))
    rows = perplexity(model, EXAMPLES, ["most_recent"], SCHEDULE)
    assert [r["prefill_speedup"] for r in rows] == [1, 2]


def test_ratio_one_is_dense():
    """Pruning that keeps everything gives the dense numbers exactly."""
    everything = Schedule(3, {1: 1.0, 2: 1.0})
    dense, *others = perplexity(tiny.build(), EXAMPLES, [m for m in METHODS if m != "floor"], everything, heads())
    assert len(others) == 5
    for row in others:
        assert row["loss"] == dense["loss"] and row["loss_diff"] == row["ppl_diff"] == 0 and row["mean_alive"] == 1


def test_batches_score_as_single_prompts():
    """Ragged batches give every method's numbers of one prompt at a time."""
    model, names = tiny.build(), ["sdtp", "most_recent", "last_attention", "teacher", "floor"]
    single = perplexity(model, EXAMPLES, names, SCHEDULE, heads())
    for batch_size in (2, 3):
        rows = perplexity(model, EXAMPLES, names, SCHEDULE, heads(), batch_size=batch_size)
        for row, expected in zip(rows, single, strict=True):
            assert row.pop("prefill_speedup") > 0 and row.pop("method") == expected["method"]
            assert row == pytest.approx({k: expected[k] for k in row}, rel=1e-5, abs=1e-6)


def test_rankings_matter():
    """Another ranking keeps other tokens and scores otherwise; the teacher ranks by its own labels; random by its seed."""
    model = tiny.build()

    def losses(**changes):
        rows = perplexity(model, EXAMPLES, ["sdtp", "random", "teacher"], SCHEDULE, **{"heads": heads(), **changes})
        return {r["method"]: r["loss"] for r in rows}

    plain = losses()
    assert plain == losses()
    reversed_heads = {layer: lambda *args, head=head: -head(*args) for layer, head in heads().items()}
    for method, changes in {
        "sdtp": {"heads": reversed_heads},
        "random": {"seed": 1},
        "teacher": {"teacher": "attention_entropy"},
    }.items():
        other = losses(**changes)
        assert [m for m in plain if plain[m] != other[m]] == [method]


def test_teacher_labels_by_the_response(monkeypatch):
    """Method teacher labels each example by the loss of its response."""
    calls, label = [], eval_tasks.saliency.label
    monkeypatch.setattr(eval_tasks.saliency, "label", lambda *a: calls.append((a[1].tolist(), *a[4:])) or label(*a))
    perplexity(tiny.build(), EXAMPLES, ["teacher"], SCHEDULE)
    sizes = [len(e.prompt) + len(e.response) for e in EXAMPLES]
    asked = [(e.prompt + e.response, [n], [len(e.prompt)]) for e, n in zip(EXAMPLES, sizes)]
    assert calls == [asked[0], *asked]


def test_a_method_named_twice_runs_once():
    """A repeated method gives one row, the same as named once."""
    names = ["dense", "most_recent", "dense", "most_recent"]
    rows = perplexity(tiny.build(), EXAMPLES, names, SCHEDULE)
    once = perplexity(tiny.build(), EXAMPLES, names[:2], SCHEDULE)
    assert [(r["method"], r["loss"], r["mean_alive"]) for r in rows] == [
        (r["method"], r["loss"], r["mean_alive"]) for r in once
    ]


def test_errors():
    """An unknown method, no heads for sdtp, and nothing to evaluate on are errors."""
    model = tiny.build()
    for methods, examples, message in (
        (["magic"], EXAMPLES, "'magic'"),
        (["sdtp"], EXAMPLES, "needs heads"),
        (["random"], [], "no prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(model, examples, methods, SCHEDULE)


def test_script_spreads_its_windows(tmp_path, monkeypatch):
    """--text takes --limit windows spread over the whole file; --json holds a row per method with its origin."""
    folder = tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=5)
    (tmp_path / "t.txt").write_text("".join(chr(ord("a") + i) * 20 for i in range(20)))
    flags = f"--ckpt {folder} --text {tmp_path}/t.txt --prompt_len 17 --score_len 4 --limit 5 --methods random --json {tmp_path}/r.json --seed 3 --dtype float32"
    monkeypatch.setattr(sys, "argv", ["eval_tasks.py", *flags.split()])
    seen, perplexity = [], eval_tasks.perplexity
    monkeypatch.setattr(
        eval_tasks,
        "perplexity",
        lambda model, examples, *args: seen.extend(examples) or perplexity(model, examples, *args),
    )
    cli.run(eval_tasks.main)
    assert ["".join(tiny.ALPHABET[t] for t in e.response)[0] for e in seen] == list("aeimq")
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [r["method"] for r in rows] == ["dense", "random"]
    assert all({"commit", "command", "versions", "machine", "source"} <= r.keys() and r["seed"] == 3 for r in rows)
