"""eval_tasks.py: scores against one full forward, and the table's arithmetic by hand."""

import json
import math
import random
import re
import sys

import numpy as np
import pytest
import tiny
import torch

import cli
import data
import eval_tasks
import scorers
from data import Example
from eval_tasks import (
    ADAPTIVE, KNOWN, LATE, METHODS, MORE_TOKENS, PEERS, WITH_HEADS, Results, compare, compressed, gemfilter, gemfilter_scores, needle, parse,
    perplexity, policy, score,
)  # fmt: skip
from kv import Compression
from model import Transformer
from sdtp import LateKV, PruneHead, Schedule, calibrate, generate, prefill, protected_count
from tokenizer import Tokenizer

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


def test_dense_perplexity_is_that_of_a_transformers_loop(tmp_path):
    """Windows of a text through a plain loop over transformers' own model of the same folder."""
    from transformers import AutoModelForCausalLM

    folder = tiny.checkpoint(tmp_path / "tiny")
    windows = data.text_windows("some words. and others here: 123! " * 20, Tokenizer(folder), 40, 9)[:6]
    row = perplexity(Transformer.from_pretrained(folder, torch.float32), windows, [], SCHEDULE)[0]
    reference, nats = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for window in windows:
        ids = torch.tensor([window.prompt + window.response])
        labels = ids.clone()
        labels[:, : len(window.prompt)] = -100
        with torch.no_grad():
            nats.append(reference(ids, labels=labels).loss.item())  # mean over the response, which is 9 tokens in all
    assert row["scored_tokens"] == 6 * 9 and row["ppl"] == pytest.approx(math.exp(sum(nats) / 6), rel=1e-4)


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
        "most_recent": (recent, policy("most_recent", model.config, SCHEDULE, ranker, 30)),
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
    model, ticks = tiny.build(), iter([0, 1, 0, 8, 0, 4, 0, 9, 0, 3, 0, 6, 0, 6])
    monkeypatch.setattr(eval_tasks, "clock", lambda model: next(ticks))
    rows = perplexity(model, EXAMPLES, ["most_recent"], SCHEDULE)
    assert [r["prefill_speedup"] for r in rows] == [1, 2]


def test_ratio_one_is_dense():
    """Pruning that keeps everything gives the dense numbers exactly."""
    everything = Schedule(3, {1: 1.0, 2: 1.0})
    names = [m for m in METHODS if m != "floor"] + ["dense+h2o@1", "sdtp+snapkv@1.0"]
    dense, *others = perplexity(tiny.build(), EXAMPLES, names, everything, heads())
    assert len(others) == 7
    for row in others:
        assert row["loss"] == dense["loss"] and row["loss_diff"] == row["ppl_diff"] == 0 and row["mean_alive"] == 1


def test_batches_score_as_single_prompts():
    """Ragged batches give every method's numbers of one prompt at a time."""
    model, names = tiny.build(), ["sdtp", "random", "most_recent", "last_attention", "teacher", *PEERS, "floor"]
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
    reversed_heads = heads()
    for head in reversed_heads.values():
        head.fc2.weight.data.neg_()
    for method, changes in {
        "sdtp": {"heads": reversed_heads},
        "random": {"seed": 1},
        "teacher": {"teacher": "attention_entropy"},
    }.items():
        other = losses(**changes)
        assert [m for m in plain if plain[m] != other[m]] == [method]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_compression_by_hand(tmp_path, batch_size):
    """METHOD+h2o prunes as METHOD does and scores over what H2O leaves: loss, FLOPs and KV bytes by hand, a key of its own."""
    model, ranker, settings = tiny.build(), heads(), {"batch_size": batch_size, "rows": tmp_path / "rows.jsonl"}
    plain = perplexity(model, EXAMPLES, ["sdtp@2"], SCHEDULE, ranker, **settings)
    names = ["dense", "dense+h2o", "sdtp@2", "sdtp@2+h2o@0.4", "sdtp@2+h2o@0.2"]
    rows = perplexity(model, EXAMPLES, names, SCHEDULE, ranker, **settings)
    assert [r["method"] for r in rows] == names and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 15
    assert [rows[0], rows[2]] == plain  # compression changes no key but its own
    stages = policy("sdtp@2", model.config, SCHEDULE, ranker, 30)
    for row, share, args in zip(rows, (1, 0.4, 1, 0.4, 0.2), [()] * 2 + [(ranker, stages)] * 3):
        kv, like = Compression("h2o", share), plain[bool(args)]
        alive = [stages.alive(len(e.prompt)) if args else [len(e.prompt)] * 3 for e in EXAMPLES]
        held = sum(min(c, int(len(e.prompt) * share + 0.5)) for e, counts in zip(EXAMPLES, alive) for c in counts)
        assert row["kv_bytes"] == held / 3 * 2 * 2 * 8 * 8  # k and v, heads, head_dim, float64
        assert row["mean_alive"] == like["mean_alive"]
        products = sum(kv.flops(model.config, counts, len(e.prompt)) for e, counts in zip(EXAMPLES, alive))
        dense = sum(flops_by_hand(model, [len(e.prompt)] * 3) for e in EXAMPLES)
        assert row["flops_share"] == pytest.approx(like["flops_share"] + products / dense)
        nats = sum((score(model, [e], *args, kv=kv)[0][0].tolist() for e in EXAMPLES), [])
        assert row["loss"] == pytest.approx(sum(nats) / 16, rel=1e-5)
    assert len({round(row["loss"], 3) for row in rows}) == 5


def test_compression_of_needles():
    """A compressed needle run generates over the compressed cache; with all of it kept its rows are those without."""
    model, prompts = tiny.build(), [tiny.ids(n, seed=2).tolist() for n in (30, 38)]
    kv, found = {}, []
    for name in ("sdtp", "sdtp+h2o@0.2", "sdtp+snapkv@1"):
        kv, examples = compressed(name), [Example(p, [5]) for p in prompts]
        run = lambda *args, **more: found.append(eval_tasks.needle_results(Numerals(), *args, **more))
        eval_tasks.run_method(run, name, model, examples, SCHEDULE, [], heads(), None)
        for result, prompt in zip(found[-1], prompts):
            args = model, torch.tensor(prompt), 1 + MORE_TOKENS, heads(), SCHEDULE
            output = generate(*args, kv=kv, eos_token_ids=[0])[0]
            assert result["answer"] == Numerals().decode(output) and result["alive"] == SCHEDULE.alive(len(prompt))
    answers = [[r["answer"] for r in results] for results in found]
    assert answers[0] == answers[2] != answers[1]


def test_teacher_labels_by_the_response(monkeypatch):
    """Method teacher labels each example by the loss of its response."""
    calls, label = [], eval_tasks.saliency.label
    monkeypatch.setattr(eval_tasks.saliency, "label", lambda *a: calls.append((a[1].tolist(), *a[4:])) or label(*a))
    perplexity(tiny.build(), EXAMPLES, ["teacher"], SCHEDULE)
    sizes = [len(e.prompt) + len(e.response) for e in EXAMPLES]
    asked = [(e.prompt + e.response, [n], [len(e.prompt)]) for e, n in zip(EXAMPLES, sizes)]
    assert calls == asked


def test_a_method_named_twice_runs_once():
    """A repeated method gives one row, the same as named once."""
    names = ["dense", "most_recent", "dense", "most_recent"]
    rows = perplexity(tiny.build(), EXAMPLES, names, SCHEDULE)
    once = perplexity(tiny.build(), EXAMPLES, names[:2], SCHEDULE)
    assert [(r["method"], r["loss"], r["mean_alive"]) for r in rows] == [
        (r["method"], r["loss"], r["mean_alive"]) for r in once
    ]


# ---------------------------------------------------------------------------- spans, peers, intervals

DEEPER = dict(num_hidden_layers=6)  # as many layers as the peers' stages need
STAGES = Schedule(6, {1: 0.9, 3: 0.75, 5: 0.5}, span=8)


def flops_by_hand(model, alive, head_rows=1):
    """FLOPs of a prefill with so many tokens alive at each layer: two for every weight and row, and for every product of attention."""
    total = 2 * head_rows * 61 * 32
    for block, n in zip(model.layers, alive):
        weights = sum(p.numel() for name, p in block.named_parameters() if "proj.weight" in name)
        pairs = sum(i + 1 for i in range(n))
        total += 2 * n * weights + 2 * 2 * pairs * 8 * 4  # q k and weights v, of 4 heads of 8
    return total


def method_flops_by_hand(method, model, n, alive):
    """flops_by_hand() of a method's prefill, with its heads or its first pass over the prompt of n tokens."""
    name, total = method.partition("@")[0], flops_by_hand(model, alive)
    if name == "gemfilter":
        total += flops_by_hand(model, [n] * 2, 0)
    if name == "self_information":
        total += flops_by_hand(model, [n] * 6, n)
    if name in WITH_HEADS:
        total += sum(2 * alive[layer - 1] * (32 * 8 + 8 * 2) for layer in STAGES)
    return total


@tiny.on_cuda
@pytest.mark.parametrize("late", [False, True])
def test_cuda_equals_cpu(late):
    """Every method's loss and tokens alive on CUDA, with heads of all options and with a LateKV, are those on the CPU."""
    torch.manual_seed(0)
    options = {"norm": True, "position": True, "matches": 2, "ending": True, "attention": 4}
    model, stages, heads = tiny.build(**DEEPER), STAGES, {layer: PruneHead(32, **options) for layer in STAGES}
    # of the adaptive ones those with exact scores: the one that calibrate() finds is a span's own, where rounding decides
    methods = {*KNOWN, "most_recent@4@0", "sdtp+h2o", "dense+snapkv"} - {*ADAPTIVE}
    methods |= {"earliest_adaptive", "most_recent_adaptive"}
    if late:
        stages, others = late_heads(model)
        heads = {1: heads[1], 3: others[3]}
    methods = sorted(methods if late else methods - {*LATE})
    expected = perplexity(model, EXAMPLES, methods, stages, heads, batch_size=2)
    heads = {layer: head.cuda() for layer, head in heads.items()}
    got = perplexity(model.cuda(), EXAMPLES, methods, stages, heads, batch_size=2)
    for a, b in zip(got, expected, strict=True):
        assert (a["method"], a["mean_alive"]) == (b["method"], b["mean_alive"])
        assert a["method"].startswith("random") or a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize("keep", [0.0, 0.9, 0.8])
@pytest.mark.parametrize("span", ["", "@1", "@4", "@4@2", "@1@0"])
@pytest.mark.parametrize("name", sorted(set(KNOWN) - {"dense"}))
def test_policy(name, span, keep):
    """Stages and span of every method, a peer's its own; executed FLOPs are the budget's within 0.5 %, heads and first passes included."""
    model, n = tiny.build(**DEEPER), 300
    heads = {layer: PruneHead(32) for layer in STAGES}
    if span.count("@") == 2 and name in (*WITH_HEADS, *LATE, "floor", *PEERS):
        return
    stages = policy(name + span, model.config, STAGES, heads, n, keep)
    own = {"lazyllm": [4], "fastkv": [3], "gemfilter": [0], "self_information": [0], "floor": [1]}
    own |= {name: [int(span[-1])]} if span.count("@") == 2 else {}
    assert list(stages) == own.get(name, [1, 3, 5])
    assert stages.span == (int(span[1]) if span else 1 if name in PEERS else 8)
    if name == "floor":
        assert list(stages.values()) == [0]
        return
    paper = [n] * 4 + [round(n * keep)] * 2  # the paper's stages in six layers: one, at 4
    budget = flops_by_hand(model, paper) if keep else method_flops_by_hand("sdtp", model, n, STAGES.alive(n))
    alive = stages.alive(n)
    flops = method_flops_by_hand(name, model, n, alive)
    if name == "self_information":
        flops -= flops_by_hand(model, [n] * 6, n)
    assert flops == pytest.approx(budget, rel=0.005) and alive[-1] < n
    if name == "sdtp" and not keep:
        assert stages == Schedule(6, STAGES)


def test_policy_with_a_floor():
    """NAME@SPAN@LAYER/FLOOR: one stage, and the protected tokens alone from the floor on, at the budget; from a later layer where that alone is cheaper."""
    model, n = tiny.build(**DEEPER), 300
    stages = policy("random@4@1/5", model.config, STAGES, None, n, 0.5)
    assert list(stages) == [1, 5] and stages[5] == 0 < stages[1] < 1 and stages.span == 4
    budget = flops_by_hand(model, [n] * 4 + [150] * 2)
    assert method_flops_by_hand("random", model, n, stages.alive(n)) == pytest.approx(budget, rel=0.005)
    assert list(policy("random@4@1/4", model.config, STAGES, None, n, 0.5)) == [1, 5]
    assert list(policy("random@4@1/5", model.config, STAGES, None, n, 0.9)) == [1]


def late_heads(model):
    """(Schedule with a LateKV at layer 3, a head at layer 1 and the LateKV)."""
    torch.manual_seed(0)
    return Schedule(6, {1: 0.8, 3: 0.0}, span=8, late=True), {1: PruneHead(32), 3: LateKV(model.config, 3).double()}


@pytest.mark.parametrize("keep", [0.0, 0.9, 0.8])
@pytest.mark.parametrize("name", ["sdtp", "sdtp_adaptive", "earliest_late", "teacher_late", "random_late", "earliest"])
def test_policy_with_a_late_kv(name, keep):
    """sdtp and NAME_late have its stages at the budget, what it computes included; scorers drop, from 5/6 of the layers on."""
    model, n = tiny.build(**DEEPER), 300
    schedule, heads = late_heads(model)

    def by_hand(name, alive):
        left, kv_weights = alive[2] - alive[3], 2 * 16 * 32
        late = 2 * left * kv_weights * 3 + 3 * 2 * 2 * 8 * 4 * (alive[3] - 4) * left  # of layers 3, 4 and 5
        return (
            flops_by_hand(model, alive) + late * (name != "earliest") + 2 * n * (32 * 8 + 8 * 2) * (name in WITH_HEADS)
        )

    stages = policy(name, model.config, schedule, heads, n, keep)
    floor = {"earliest": [] if keep else [5]}  # which moves up to none where it alone is cheaper than the budget
    assert list(stages) == [1, *floor.get(name, [3])] and stages.late == (name != "earliest")
    budget = flops_by_hand(model, [n] * 4 + [round(n * keep)] * 2) if keep else by_hand("sdtp", schedule.alive(n))
    if keep and name != "earliest":  # more than it can spend: nothing is dropped at layer 1
        assert stages[1] == pytest.approx(1) and by_hand(name, stages.alive(n)) < budget
    else:
        assert by_hand(name, stages.alive(n)) == pytest.approx(budget, rel=0.005) and stages.alive(n)[1] < n
    if stages.alive(n)[1] < n or name != "earliest":
        share = by_hand(name, stages.alive(n)) / flops_by_hand(model, [n] * 6)
        assert eval_tasks.flops_share(name, model.config, [n], [stages.alive(n)], heads) == pytest.approx(share)


def test_late_methods():
    """Each ranks by its own scorer and leaves keys and values by the heads' LateKV, all of which its row counts; heads without one are refused."""
    model, n = tiny.build(**DEEPER), 40
    schedule, heads = late_heads(model)
    examples = [Example(tiny.ids(n, seed).tolist(), tiny.ids(9, seed).tolist()) for seed in range(2)]
    names = ["sdtp", "sdtp_adaptive", "earliest_late", "teacher_late", "random_late", "earliest", "sdtp+h2o"]
    rows = {r["method"]: r for r in perplexity(model, examples, names, schedule, heads)}
    assert len({r["loss"] for r in rows.values()}) == len(rows) == 8
    stages = policy("earliest_late", model.config, schedule, heads, n)
    nats = []
    for e in examples:
        _, cache = prefill(model, torch.tensor(e.prompt), {1: scorers.earliest, 3: heads[3]}, stages)
        nats.append(eval_tasks.score(model, [e], {1: scorers.earliest, 3: heads[3]}, stages)[0][0].sum().item())
    assert rows["earliest_late"]["loss"] == pytest.approx(sum(nats) / 18)
    assert (
        rows["earliest_late"]["kv_bytes"]
        == cache.nbytes()
        == 2 * 16 * 8 * sum(stages.alive(n)[i] for i in (0, 1, 2, 2, 2, 2))
    )
    assert rows["sdtp+h2o"]["kv_bytes"] == 2 * 16 * 8 * 16 * 6
    with pytest.raises(ValueError, match="'random_late' needs heads with a LateKV"):
        perplexity(model, examples, ["random_late"], STAGES, {layer: PruneHead(32) for layer in STAGES})


def test_policy_out_of_reach(capsys):
    """Stages that begin too late, or a first pass that takes up the budget, are refused by name; in a run they are left out of it."""
    model, deep = tiny.build(**DEEPER), Schedule(6, {0: 0.4})
    for method, layers in (("gemfilter", "0"), ("random@4@5", "5"), ("fastkv", "3")):
        with pytest.raises(ValueError, match=f"{method}: stages at layers .{layers}. cannot cost as little as 0.267"):
            policy(method, model.config, deep, None, 300)
    rows = perplexity(model, EXAMPLES, ["gemfilter", "random", "random@4@5"], deep, keeps=[0.0, 0.9])
    kept = [(r["keep"], r["method"]) for r in rows]
    assert kept == [
        (0, "dense"), (0, "random"), (0.9, "dense"), (0.9, "gemfilter"), (0.9, "random"), (0.9, "random@4@5"),
    ]  # fmt: skip
    assert capsys.readouterr().out.count("(left out)\n") == 2


def test_scorers_of_methods(monkeypatch):
    """Each method ranks by its own scorer, with its weights and its layers."""
    model, seen = tiny.build(**DEEPER), {}
    given = {"lazyllm": scorers.last_attention(1), "fastkv": scorers.last_attention(8, pool=7)}
    given |= {
        "last_attention_w32@4@2": scorers.last_attention(32),
        "last_attention_best3": scorers.last_attention(8, 3),
    }
    given |= {
        "norm": scorers.norm,
        "accumulated_attention": scorers.accumulated_attention,
        "floor": scorers.most_recent,
    }
    x, block = torch.randn(40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), model.layers[3]
    for method, expected in given.items():
        stages = policy(method, model.config, STAGES, None, 300)
        run = lambda model, examples, rankers, stages, method=method: seen.update({method: (rankers, stages)})
        eval_tasks.run_method(run, parse(method)[0], model, [], stages, [], None, None)
        rankers, ran = seen[method]
        assert ran is stages and rankers.keys() == stages.keys()
        for ranker in rankers.values():
            assert torch.equal(ranker(x, torch.arange(40), [40], block), expected(x, torch.arange(40), [40], block))


def kept_by_gemfilter(model, ids, depth, count):
    """Positions that the last query's products with the keys choose after `depth` layers, plain loops and a Python sort."""
    x, n = model.embed(torch.tensor(ids)), len(ids)
    for block in model.layers[:depth]:
        x = block(x, torch.arange(n), [n])
    block = model.layers[depth]
    q, k, _ = block.self_attn.qkv(block.input_layernorm(x), torch.arange(n))
    dots = [sum(float(q[-1, h] @ k[j, h // 2]) for h in range(4)) for j in range(n)]
    scores = [sum(dots[max(0, j - 2) : j + 3]) / 5 for j in range(n)]
    protected = [p for p in range(n) if p < 4 or p >= n - max(1, int(n * 0.1 + 0.5))]
    others = sorted((p for p in range(n) if p not in protected), key=lambda p: (-scores[p], -p))
    return sorted(protected + others[: count - len(protected)]), protected


@pytest.mark.parametrize("layers, depth", [(6, 2), (5, 2), (2, 1), (9, 4)])
def test_gemfilter(layers, depth):
    """A share of the prompt is kept, in order, protected tokens too; the response is untouched."""
    model = tiny.build(num_hidden_layers=layers)
    for example in EXAMPLES:
        n = len(example.prompt)
        scores = gemfilter_scores(model, torch.tensor(example.prompt), [n])
        kept, protected = kept_by_gemfilter(model, example.prompt, depth, int(n * 0.45 + 0.5))
        got = gemfilter(example, scores, Schedule(layers, {0: 0.45}))
        assert got.prompt == [example.prompt[p] for p in kept] and got.response == example.response
        assert len(got.prompt) == int(n * 0.45 + 0.5) < n and set(protected) <= set(kept)
        floor = gemfilter(example, scores, Schedule(layers, {0: 0.0}))
        assert floor.prompt == [example.prompt[p] for p in protected]


def compared(nats, base_nats, lens):
    """compare() of nats summed by example."""
    found, base = ([{"value": v, "count": n} for v, n in zip(values, lens)] for values in (nats, base_nats))
    return compare(found, base, np.expm1)


def test_compare():
    """The value is the ratio of perplexities less 1; the interval is a bootstrap's over examples, both sides drawn together."""
    draw = random.Random(0)
    lens = [draw.randint(1, 60) for _ in range(40)]
    base = [n * draw.uniform(1, 5) for n in lens]  # differs much more between examples than from the other
    nats = [b + n * draw.gauss(0.1, 0.1) for b, n in zip(base, lens)]
    value, low, high = compared(nats, base, lens)
    assert value == pytest.approx(math.exp(sum(nats) / sum(lens)) / math.exp(sum(base) / sum(lens)) - 1)
    values = []
    for _ in range(4000):
        drawn = [draw.randrange(40) for _ in lens]
        values.append(math.exp(sum(nats[i] - base[i] for i in drawn) / sum(lens[i] for i in drawn)) - 1)
    values.sort()
    assert (low, high) == pytest.approx((values[100], values[3900]), abs=0.01) and low < value < high < low + 0.15


def test_compare_without_spread():
    """No width where there is nothing to draw: equal methods, one example, and a constant shift of every token, lengths aside."""
    lens, base = [3, 50, 7, 1], [9.0, 70.0, 3.5, 8.0]
    assert compared(base, list(base), lens) == (0, 0, 0)
    for shift in (0.2, -0.1):
        shifted = [b + n * shift for b, n in zip(base, lens)]
        assert compared(shifted, base, lens) == pytest.approx([math.expm1(shift)] * 3)
    assert compared([10.0], [9.0], [4]) == pytest.approx([math.expm1(0.25)] * 3)


def test_spans_and_peers_in_one_run():
    """Methods with spans and all peers: tokens alive, FLOPs with a filtering pass, loss and intervals of each, by hand."""
    model, lens = tiny.build(**DEEPER), [len(e.prompt) for e in EXAMPLES]
    ranker = {layer: PruneHead(32) for layer in STAGES}
    names = [
        *PEERS,
        *(f"{name}@4" for name in PEERS),
        "sdtp",
        "sdtp@1",
        "last_attention@4",
        "teacher@4",
        "random@4",
        "floor@4",
        "most_recent@4@0",
        "teacher@1@2",
    ]
    rows = {r["method"]: r for r in perplexity(model, EXAMPLES, names, STAGES, ranker)}
    assert list(rows) == ["dense", *names]
    dense = sum(flops_by_hand(model, [n] * 6) for n in lens)
    for method, row in rows.items():
        stages = policy(method, model.config, STAGES, ranker, 30)
        alive = [stages.alive(n) if stages else [n] * 6 for n in lens]
        if method.startswith("gemfilter"):
            alive = [[int(n * stages[0] + 0.5)] * 6 for n in lens]
        assert row["mean_alive"] == pytest.approx(sum(map(sum, alive)) / 6 / sum(lens))
        flops = sum(method_flops_by_hand(method, model, n, counts) for n, counts in zip(lens, alive))
        assert row["flops_share"] == pytest.approx(flops / dense)
        assert row["low"] <= row["ppl_diff"] <= row["high"]
        assert row["over_sdtp"] == pytest.approx(row["ppl"] / rows["sdtp"]["ppl"] - 1, abs=1e-9)
        assert row["over_sdtp_low"] <= row["over_sdtp"] <= row["over_sdtp_high"]
    for method in ("sdtp", "dense"):
        fields = ("over_sdtp", "over_sdtp_low", "over_sdtp_high") if method == "sdtp" else ("ppl_diff", "low", "high")
        assert [rows[method][f] for f in fields] == [0, 0, 0]
    for name in (*PEERS, "sdtp"):  # the span does something
        other = rows["sdtp@1" if name == "sdtp" else f"{name}@4"]
        assert other["loss"] != rows[name]["loss"]


def test_self_information_is_the_prompt_s():
    """self_information keeps the tokens that the model itself expects least of the prompt, from the first layer on."""
    model = tiny.build()
    stages = policy("self_information", model.config, SCHEDULE, None, 30)
    row = perplexity(model, EXAMPLES, ["self_information"], SCHEDULE)[1]
    nats = []
    for e in EXAMPLES:
        ids = torch.tensor(e.prompt)
        logits = [model(ids[:i])[-1] for i in range(1, len(ids))]
        labels = [math.inf, *(-x.log_softmax(-1)[t].item() for x, t in zip(logits, ids[1:]))]
        ranker = {0: lambda x, positions, seqlens, block, labels=torch.tensor(labels): labels}
        nats += score(model, [e], ranker, stages)[0][0].tolist()
    assert row["loss"] == pytest.approx(sum(nats) / 16, rel=1e-5)


@pytest.mark.parametrize(
    "method",
    "random@x random@0 random@-4 random@2.5 random@ random@00@1 random@4@ random@4@x random@@2 random@4@2@1 random@4/2 random@4@2/ random@4@2/x random@4@2/2 random@4@3/2 random@4@2/3/4 magic@4 magic@4@2 @4".split()
    + [""],
)
def test_unknown_methods(method):
    """A span that is no whole number above 0, a layer that is none, a floor below a stage and a method that is none are refused by name."""
    with pytest.raises(ValueError, match=f"unknown method '{method}'"):
        parse(method)


@pytest.mark.parametrize("name", [*WITH_HEADS, "floor", *PEERS, "dense"])
def test_methods_without_a_layer(name):
    """One stage at a layer is for what ranks at the heads' stages; dense has no span either."""
    with pytest.raises(ValueError, match=f"method '{name}@4@2': {name} has"):
        parse(f"{name}@4@2")
    if name == "dense":
        with pytest.raises(ValueError, match="method 'dense@4': dense has no stages"):
            parse("dense@4")


def test_known_methods():
    """Every method there is, every one but dense with a span, and scorers at a layer."""
    assert [parse(name) for name in KNOWN] == [(name, None, []) for name in KNOWN]
    assert all(parse(f"{name}@16") == (name, 16, []) for name in KNOWN if name != "dense")
    assert parse("random@32@0") == ("random", 32, [0]) and parse("teacher@8@12/13") == ("teacher", 8, [12, 13])


def test_methods_with_compression():
    """Every method but gemfilter with a share of its KV cache, the paper's where none is said; what is none is refused by name."""
    for name in sorted(set(KNOWN) - {"gemfilter"}):
        assert parse(f"{name}+h2o") == parse(name) and compressed(f"{name}+h2o") == Compression("h2o", 0.4)
        assert compressed(name) is None
    assert parse("random@32@0+snapkv@0.25") == ("random", 32, [0])
    assert compressed("random@32@0+snapkv@0.25") == Compression("snapkv", 0.25)
    for kv in ("+", "+magic", "+h2o@x", "+h2o@0", "+h2o@1.5", "+h2o@nan", "+h2o@0.4@2", "+h2o+snapkv"):
        with pytest.raises(ValueError, match=re.escape(f"unknown KV compression in method 'dense{kv}'")):
            parse(f"dense{kv}")
    with pytest.raises(ValueError, match="method 'gemfilter[+]h2o': gemfilter's"):
        parse("gemfilter+h2o")


def test_errors():
    """An unknown method, no heads for sdtp, and nothing to evaluate on are errors."""
    model = tiny.build()
    for methods, examples, message in (
        (["magic"], EXAMPLES, "'magic'"),
        (["sdtp"], EXAMPLES, "needs heads"),
        (["sdtp@4"], EXAMPLES, "needs heads"),
        (["random"], [], "no prompt"),
        (["random@4@3"], EXAMPLES, "'random@4@3': the model has layers 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(model, examples, methods, SCHEDULE)


# ---------------------------------------------------------------------------- budgets, resuming, needles


def test_keeps():
    """Several budgets in one run: each has the rows of a run of its own, and dense's prompts are run once."""
    model, names, ranker = tiny.build(num_hidden_layers=6), ["sdtp", "random", "teacher@4@2"], heads_of(STAGES)
    runs, run = [], eval_tasks.perplexity_results

    def spy(model, examples, rankers=None, schedule=None):
        runs.append(bool(schedule))
        return run(model, examples, rankers, schedule)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_tasks, "perplexity_results", spy)
        rows = perplexity(model, EXAMPLES, names, STAGES, ranker, keeps=[0.9, 0.8])
    assert runs.count(False) == 3 + 1 and runs.count(True) == 2 * 3 * 3  # one of dense is the warm-up
    single = [row for keep in (0.9, 0.8) for row in perplexity(model, EXAMPLES, names, STAGES, ranker, keeps=[keep])]
    for row, expected in zip(rows, single, strict=True):
        assert row.pop("prefill_speedup") > 0 < expected.pop("prefill_speedup") and row == expected
    assert [(r["keep"], r["method"]) for r in rows] == [(keep, m) for keep in (0.9, 0.8) for m in ("dense", *names)]
    assert rows[1]["loss"] != rows[5]["loss"] and rows[1]["mean_alive"] > rows[5]["mean_alive"]


def heads_of(schedule):
    torch.manual_seed(0)
    return {layer: PruneHead(32) for layer in schedule}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_random_is_its_own(batch_size):
    """Method random scores a prompt the same whatever else runs, in whatever batch; spans and budgets draw anew."""
    model = tiny.build()
    alone = perplexity(model, EXAMPLES, ["random"], SCHEDULE, heads())[1]
    rows = perplexity(
        model,
        EXAMPLES[::-1],
        ["random@4", "sdtp", "random"],
        SCHEDULE,
        heads(),
        batch_size=batch_size,
        keeps=[0.9, 0.0],
    )
    same = [r for r in rows if (r["method"], r["keep"]) == ("random", 0)]
    assert len(same) == 1 and same[0]["loss"] == pytest.approx(alone["loss"], rel=1e-9)
    assert perplexity(model, EXAMPLES, ["random"], SCHEDULE, heads(), seed=1)[1]["loss"] != alone["loss"]


def test_rows_resume(tmp_path, monkeypatch):
    """A run killed at any point goes on: the same rows, no result twice in the file, none computed again."""
    model, names, ranker = tiny.build(), ["sdtp", "random", "teacher", "gemfilter", "most_recent@4@0"], heads()
    run, add, path = eval_tasks.perplexity_results, Results.add, tmp_path / "rows.jsonl"
    expected = perplexity(model, EXAMPLES, names, SCHEDULE, ranker)
    ran = []

    def spy(model, examples, *args):
        ran.append(len(examples))
        return run(model, examples, *args)

    def killed(self, result):
        if len(self) == stop:
            raise KeyboardInterrupt
        add(self, result)

    monkeypatch.setattr(eval_tasks, "perplexity_results", spy)
    monkeypatch.setattr(Results, "add", killed)
    for stop in (5, 13):
        with pytest.raises(KeyboardInterrupt):
            perplexity(model, EXAMPLES, names, SCHEDULE, ranker, rows=path)
        assert len(path.read_text().splitlines()) == stop
        with open(path, "a") as file:
            file.write('{"key": "torn off in the mid')
    stop = None
    ran.clear()
    rows = perplexity(model, EXAMPLES, names, SCHEDULE, ranker, rows=path)
    assert sum(ran) == 18 - 13 + 1
    for row, other in zip(rows, expected, strict=True):
        assert row.pop("prefill_speedup") > 0 < other.pop("prefill_speedup") and row == other
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 18
    for line in lines:
        assert {"method", "keep", "value", "count", "alive", "seconds"} < line.keys() and len(line["alive"]) == 3
    # again, and with a method more
    ran.clear()
    assert [r["loss"] for r in perplexity(model, EXAMPLES, names, SCHEDULE, ranker, rows=path)] == [
        r["loss"] for r in expected
    ]
    assert ran == []
    more = perplexity(model, EXAMPLES, [*names, "norm"], SCHEDULE, ranker, rows=path)
    assert sum(ran) == 3 + 1 and [r["loss"] for r in more[:-1]] == [r["loss"] for r in expected]
    assert len(path.read_text().splitlines()) == 21


@pytest.mark.parametrize(
    "changed, again",
    [
        (dict(seed=1), ["random"]),
        (dict(teacher="grad_x_input"), ["teacher"]),
        (dict(label_loss="all"), ["teacher"]),
        (dict(heads="other"), ["sdtp"]),
        (dict(model="other"), ["dense", "random", "sdtp", "teacher"]),
        (dict(model="bfloat16"), ["dense", "random", "sdtp", "teacher"]),
        (dict(schedule=Schedule(3, {1: 0.6, 2: 0.4})), ["random", "sdtp", "teacher"]),
        (dict(schedule=Schedule(3, SCHEDULE, span=2)), ["random", "sdtp", "teacher"]),
        (dict(), []),
    ],
)
def test_rows_are_for_their_run(tmp_path, changed, again):
    """What a method's result depends on makes it another result; what only others depend on does not."""
    models = {"one": tiny.build(torch.float32), "bfloat16": tiny.build(torch.bfloat16)}
    models["other"] = tiny.build(torch.float32, rms_norm_eps=1e-5)
    models["other"].layers[1].mlp.up_proj.weight.data[0, 0] += 1
    rankers, path = {"one": heads(), "other": heads()}, tmp_path / "new" / "rows.jsonl"
    rankers["other"][2].fc1.bias.data += 0.1

    def run(model="one", heads="one", schedule=SCHEDULE, **settings):
        names = ["sdtp", "random", "teacher"]
        perplexity(models[model], EXAMPLES[:1], names, schedule, rankers[heads], rows=path, **settings)
        return [json.loads(line)["method"] for line in path.read_text().splitlines()]

    first = run()
    assert sorted(run(**changed)[len(first) :]) == again


@pytest.mark.parametrize("line", ["[1]", "{}", '{"method": "dense"}', "key", "null", ""])
def test_rows_of_another_file(tmp_path, line):
    """A file that holds something else is refused by name and line, and left as it is."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"key": "a"}}\n{line}\ntail')
    with pytest.raises(ValueError, match="rows.jsonl, line 2: not a result"):
        Results(path)
    assert path.read_text().endswith("tail")


class Numerals:
    """A tokenizer whose tokens are written as their ids."""

    eos_token_ids = [0]

    def decode(self, ids):
        return " ".join(map(str, ids))


def greedy(model, prompt, count):
    """The most likely continuation, from full forwards, ended by token 0."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor(ids))[-1].argmax().item())
        if ids[-1] == 0:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_needle_by_hand(batch_size):
    """A hit is the value as a whole word of the greedy answer, not a part of one; accuracies and differences follow."""
    model, prompts = tiny.build(), [tiny.ids(n, seed=2).tolist() for n in (30, 38, 24, 33, 27)]
    answers = [greedy(model, prompt, 1 + MORE_TOKENS) for prompt in prompts]
    wanted = []
    for i, answer in enumerate(answers):
        parts = [v for v in range(1, 10) if v not in answer and any(str(v) in str(a) for a in answer)]
        missing = [v for v in range(10, 61) if v not in answer]
        wanted.append([answer[-1], answer[len(answer) // 2], parts[0], missing[0], answer[0]][i])
    assert answers[3] != answers[4]
    examples = [Example(prompt, [value]) for prompt, value in zip(prompts, wanted)]
    rows = needle(Numerals(), model, examples, ["sdtp", "most_recent"], SCHEDULE, heads(), batch_size=batch_size)
    accuracy = {}
    for row in rows:
        stages = policy(row["method"], model.config, SCHEDULE, heads(), 30)
        ranker = {"dense": None, "sdtp": heads()}.get(row["method"], dict.fromkeys(range(3), scorers.most_recent))
        found = [
            generate(model, torch.tensor(p), 1 + MORE_TOKENS, ranker, stages, eos_token_ids=[0])[0] for p in prompts
        ]
        hits = [value in output for value, output in zip(wanted, found)]
        accuracy[row["method"]] = row["accuracy"]
        assert row["accuracy"] == sum(hits) / 5 and row["prompts"] == 5 and not row["dense_fails"]
        assert row["mean_alive"] == pytest.approx(
            sum(sum(stages.alive(len(p))) if stages else 3 * len(p) for p in prompts) / 3 / sum(map(len, prompts))
        )
        assert row["accuracy_diff"] == pytest.approx(row["accuracy"] - accuracy["dense"])
        assert row["low"] <= row["accuracy_diff"] <= row["high"]
    assert accuracy["dense"] == 0.6
    for row in rows:
        assert row["over_sdtp"] == pytest.approx(row["accuracy"] - accuracy["sdtp"])
    assert rows[0]["over_sdtp_low"] <= rows[0]["over_sdtp"] <= rows[0]["over_sdtp_high"]
    fails = needle(Numerals(), model, examples[2:], ["sdtp"], SCHEDULE, heads())
    assert [r["dense_fails"] for r in fails] == [True, True]


def test_script_needles(tmp_path, monkeypatch, capsys):
    """--tasks needle: --limit prompts of each length in the held-out words, a table of each; --rows goes on; --json holds all."""
    folder = tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=5, max_position_embeddings=700)
    (tmp_path / "t.txt").write_text("some words. and others here. " * 20)
    flags = f"--ckpt {folder} --tasks needle --text {tmp_path}/t.txt --lengths 100,400 --limit 3 --methods random,norm@4@0 --keep 0.9,0.8 --json {tmp_path}/r.json --rows {tmp_path}/rows.jsonl --dtype float32"
    monkeypatch.setattr(sys, "argv", ["eval_tasks.py", *flags.split()])
    cli.run(eval_tasks.main)
    rows = json.loads((tmp_path / "r.json").read_text())
    names = ["dense", "random", "norm@4@0"]
    assert [(r["length"], r["keep"], r["method"]) for r in rows] == [
        (length, keep, name) for length in (100, 400) for keep in (0.9, 0.8) for name in names
    ]
    assert all(r["prompts"] == 3 and r["dense_fails"] for r in rows)  # a random model finds nothing
    out = capsys.readouterr().out
    assert out.count("dense below 50 %") == 2 and out.count("r = 0.9") == 2
    written = (tmp_path / "rows.jsonl").read_text()
    assert len(written.splitlines()) == 2 * 3 * (1 + 2 * 2)
    cli.run(eval_tasks.main)
    assert (tmp_path / "rows.jsonl").read_text() == written
    assert [r["accuracy"] for r in json.loads((tmp_path / "r.json").read_text())] == [r["accuracy"] for r in rows]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "give --text FILE or --data SOURCE"),
        ("--text t.txt --limit -1", "--limit -1: at least 0"),
        ("--text t.txt --label_loss respons", "--label_loss respons: choose response, all"),
        ("--text t.txt --num_fewshot 0", "--num_fewshot are for tasks of lm-eval"),
        ("--tasks needle --data dolly", "give --text FILE"),
        ("--tasks needle --text t.txt --lengths 10,x", "--lengths 10,x"),
        ("--tasks needle --text t.txt --lengths 400", "beyond the model's 64 positions"),
        ("--text t.txt --keep 0.9,2", "--keep 0.9,2"),
        ("--text t.txt --methods random@4@9", "'random@4@9': the model has layers 0 to 4"),
        ("--text t.txt --methods sdtp@4@1", "sdtp has stages of its own"),
    ],
)
def test_script_mistakes(tmp_path, monkeypatch, flags, message):
    """A user's mistake ends in one line that names it."""
    folder = tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=5)
    (tmp_path / "t.txt").write_text("some words. " * 60)
    monkeypatch.chdir(tmp_path)
    more = f"--ckpt {folder} --prompt_len 17 --score_len 4 --dtype float32" + " --methods random" * (
        "--methods" not in flags
    )
    monkeypatch.setattr(sys, "argv", ["eval_tasks.py", *flags.split(), *more.split()])
    with pytest.raises(SystemExit, match=message):
        cli.run(eval_tasks.main)


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
        lambda model, examples, *args, **more: seen.extend(examples) or perplexity(model, examples, *args, **more),
    )
    cli.run(eval_tasks.main)
    assert ["".join(tiny.ALPHABET[t] for t in e.response)[0] for e in seen] == list("aeimq")
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [r["method"] for r in rows] == ["dense", "random"]
    assert all({"commit", "command", "versions", "machine", "source"} <= r.keys() and r["seed"] == 3 for r in rows)


def test_script_finds_the_heads_of_a_span(tmp_path, monkeypatch):
    """Method sdtp with a span asks for the heads as sdtp does."""
    folder = tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=5)
    (tmp_path / "t.txt").write_text("some words. " * 20)
    monkeypatch.chdir(tmp_path)
    for method in ("sdtp", "sdtp@4"):
        flags = f"--ckpt {folder} --text t.txt --prompt_len 17 --score_len 4 --methods {method} --dtype float32"
        monkeypatch.setattr(sys, "argv", ["eval_tasks.py", *flags.split()])
        with pytest.raises(SystemExit, match="heads/tiny/heads.json does not exist"):
            cli.run(eval_tasks.main)


def test_sdtp_adaptive(tmp_path):
    """Thresholds by which the prompts that are measured cost the budget together; they are in the keys."""
    model, ranker, path = tiny.build(num_hidden_layers=6), heads_of(STAGES), tmp_path / "rows.jsonl"

    def run(method, keep, examples=EXAMPLES):
        return perplexity(model, examples, ["sdtp", method], STAGES, ranker, keeps=[keep], rows=path)[1:]

    for method, keep in (("sdtp_adaptive", 0.0), ("sdtp_adaptive", 0.8), ("sdtp_adaptive@2", 0.0)):
        stages = policy(method, model.config, STAGES, ranker, 30, keep)
        found = calibrate(model, [e.prompt for e in EXAMPLES], ranker, stages)
        adaptive = Schedule(6, stages, span=stages.span, threshold=found.threshold, adaptive=True)
        runs = [score(model, [e], ranker, adaptive) for e in EXAMPLES]
        alive, lens = [counts for _, (counts,), _ in runs], [len(e.prompt) for e in EXAMPLES]
        sdtp, row = run(method, keep)
        assert alive != [stages.alive(n) for n in lens]
        assert row["mean_alive"] == pytest.approx(sum(map(sum, alive)) / 6 / sum(lens))
        assert row["mean_alive"] == pytest.approx(sdtp["mean_alive"], abs=0.05)  # a span is 8 of 95 tokens
        assert row["loss"] == pytest.approx(sum(nats.sum().item() for (nats,), _, _ in runs) / 16)
        flops = sum(method_flops_by_hand("sdtp", model, n, counts) for n, counts in zip(lens, alive))
        assert row["flops_share"] == pytest.approx(flops / sum(flops_by_hand(model, [n] * 6) for n in lens))
    before = len(path.read_text().splitlines())
    run("sdtp_adaptive", 0.0)
    assert len(path.read_text().splitlines()) == before
    run("sdtp_adaptive", 0.0, EXAMPLES[:2])  # other thresholds
    assert len(path.read_text().splitlines()) == before + 2
    adaptive, fixed = perplexity(model, EXAMPLES, ["sdtp_adaptive", "sdtp"], STAGES, ranker)[1:]
    assert adaptive["over_sdtp"] == 0  # the first of the two is what others are compared with
    assert fixed["over_sdtp"] == pytest.approx(fixed["ppl"] / adaptive["ppl"] - 1)
    with pytest.raises(ValueError, match="needs heads"):
        perplexity(model, EXAMPLES, ["sdtp_adaptive"], STAGES)


def test_at_floor_is_of_the_first_stage():
    """A prompt that an adaptive stage leaves whole, and a later floor cuts, is not at the floor from the first stage on."""
    model, method, results = tiny.build(num_hidden_layers=6), "earliest_adaptive@1@1/5", eval_tasks.perplexity_results
    found = eval_tasks.evaluate(results, "perplexity", model, EXAMPLES, [method], STAGES, keeps=[0.5])
    whole = [r["alive"][1] == len(e.prompt) for r, e in zip(found[0.5, method], EXAMPLES)]
    row = eval_tasks.table(found, model, EXAMPLES, None, lambda difference: difference)[1]
    assert any(whole) and not all(whole) and row["at_floor"] == 0


@pytest.mark.parametrize("method", ["earliest_adaptive@1@2", "most_recent_adaptive@1@2"])
def test_positional_scorers_adaptive(method):
    """Above a threshold of position are as many of the first tokens in a long prompt as in a short one, or of the last."""
    model, results = tiny.build(num_hidden_layers=6, max_position_embeddings=128), eval_tasks.perplexity_results
    examples = [Example(tiny.ids(n, seed=n).tolist(), [5, 6]) for n in (80, 90, 100)]
    found = eval_tasks.evaluate(results, "perplexity", model, examples, [method], STAGES, keeps=[0.5])[0.5, method]
    counts = [result["alive"][2] for result in found]
    if method.startswith("earliest"):  # the protected last tenth grows beside them
        counts = [count - protected_count(len(e.prompt)) for count, e in zip(counts, examples)]
    assert counts[0] == counts[1] == counts[2] < 72
