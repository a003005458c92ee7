"""eval_tasks.py: scores against one full forward, and the table's arithmetic by hand."""

import json
import math
import random
import sys

import pytest
import tiny
import torch

import cli
import eval_tasks
import scorers
from data import Example
from kv import Compression
from eval_tasks import KNOWN, METHODS, PEERS, SCORERS, check_methods, compare, gemfilter, perplexity, policy, score
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
        (nats,), (alive,), seconds, (held,) = score(model, [example])
        ids, n = torch.tensor(example.prompt + example.response), len(example.prompt)
        log_probs = model(ids).log_softmax(-1)
        expected = [-log_probs[i - 1, ids[i]].item() for i in range(n, len(ids))]
        assert nats.tolist() == pytest.approx(expected, abs=1e-5)
        assert alive == held == [n] * 3 and seconds > 0


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


def test_compression_beside_each_method():
    """With kv every method has a second row, scored over the compressed cache; alive and pruning stay as they were."""
    model, ranker, kv = tiny.build(), heads(), Compression("h2o", 0.4)
    plain = perplexity(model, EXAMPLES, ["sdtp@2"], SCHEDULE, ranker)
    rows = perplexity(model, EXAMPLES, ["sdtp@2"], SCHEDULE, ranker, kv=kv)
    assert [r["method"] for r in rows] == ["dense", "dense+h2o", "sdtp@2", "sdtp@2+h2o"]
    for row, expected in zip(rows[::2], plain, strict=True):
        same = row.keys() - {"prefill_speedup", "low", "high"}
        assert {k: row[k] for k in same} == {k: expected[k] for k in same} and row["held"] == row["mean_alive"]
    for before, row, args in ((rows[0], rows[1], ()), (rows[2], rows[3], (ranker, Schedule(3, SCHEDULE, span=2)))):
        stages = [args[1].alive(len(e.prompt)) if args else [len(e.prompt)] * 3 for e in EXAMPLES]
        held = [min(c, int(len(e.prompt) * 0.4 + 0.5)) for e, counts in zip(EXAMPLES, stages) for c in counts]
        assert row["held"] == pytest.approx(sum(held) / 3 / 95) and row["mean_alive"] == before["mean_alive"]
        products = sum(kv.flops(model.config, counts, len(e.prompt)) for e, counts in zip(EXAMPLES, stages))
        dense = sum(flops_by_hand(model, [len(e.prompt)] * 3) for e in EXAMPLES)
        assert row["flops_share"] == pytest.approx(before["flops_share"] + products / dense)
        nats = sum((score(model, [e], *args, kv=kv)[0][0].tolist() for e in EXAMPLES), [])
        assert row["loss"] == pytest.approx(sum(nats) / 16, rel=1e-5) and abs(row["loss"] - before["loss"]) > 1e-3
    with pytest.raises(ValueError, match="gemfilter"):
        perplexity(model, EXAMPLES, ["gemfilter"], SCHEDULE, kv=kv)


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


# ---------------------------------------------------------------------------- spans, peers, intervals

DEEPER = dict(num_hidden_layers=6)  # as many layers as the peers' stages need
STAGES = Schedule(6, {1: 0.9, 3: 0.6, 5: 0.5}, span=8)  # 0.767 on average
MEAN = (1 + 0.9 + 0.9 + 0.6 + 0.6 + 0.5) / 6


@pytest.mark.parametrize("span", ["", "@1", "@4"])
@pytest.mark.parametrize("name", sorted(set(KNOWN) - {"dense"}))
def test_policy(name, span):
    """Stages, span and scorer of every method: a peer's are its own, at the mean share of the schedule given."""
    model, generator = tiny.build(**DEEPER), torch.Generator()
    ranker = {layer: PruneHead(32) for layer in STAGES}
    rankers, stages = policy(name + span, model, STAGES, ranker, generator)
    own = {"lazyllm": [4], "fastkv": [3], "self_information": [0], "floor": [1]}
    assert list(stages) == own.get(name, [1, 3, 5]) and stages.keys() == rankers.keys()
    if name == "floor":
        assert list(stages.values()) == [0]
    else:
        assert stages.mean_share() == pytest.approx(MEAN)
        assert span and stages.span == int(span[1:]) or not span and stages.span == (1 if name in PEERS else 8)
    if name not in own:
        assert list(stages.values()) == list(STAGES.values())
    # what ranks
    given = {"lazyllm": scorers.last_attention(1), "fastkv": scorers.last_attention(8, pool=7)}
    given |= {"last_attention_w32": scorers.last_attention(32), "last_attention_best3": scorers.last_attention(8, 3)}
    x, block = torch.randn(40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), model.layers[3]
    rows = (x, torch.arange(40), [40], block)
    if name == "sdtp":
        assert rankers is ranker
    elif name in given:
        assert all(torch.equal(r(*rows), given[name](*rows)) for r in rankers.values())
    elif name in SCORERS:
        assert all(r is SCORERS[name] for r in rankers.values())


def test_policy_mean_shares():
    """lazyllm and fastkv meet any mean share that their first stage can reach, whatever the stages of the schedule given."""
    model = tiny.build(**DEEPER)
    for schedule in (STAGES, Schedule(6, {4: 0.4}), Schedule(6, {0: 0.7})):
        for name in ("lazyllm", "fastkv", "self_information"):
            stages = policy(name, model, schedule, None, None)[1]
            assert stages.mean_share() == pytest.approx(schedule.mean_share()) and stages.span == 1


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
    """What its first pass leaves of the compute is kept of the prompt, in order, protected tokens too; the response is untouched."""
    model, mean = tiny.build(num_hidden_layers=layers), 0.95
    for example in EXAMPLES:
        n = len(example.prompt)
        count = int(n * (mean - depth / layers) + 0.5)
        kept, protected = kept_by_gemfilter(model, example.prompt, depth, count)
        got = gemfilter(model, example, mean)
        assert got.prompt == [example.prompt[p] for p in kept] and got.response == example.response
        assert len(got.prompt) == count < n and set(protected) <= set(kept)
        floor = gemfilter(model, example, depth / layers + 1e-6)  # next to nothing is left: the protected tokens are
        assert floor.prompt == [example.prompt[p] for p in protected]


def test_gemfilter_leaves_nothing():
    """A compute that the first pass alone takes up, or exceeds, is refused by name."""
    model = tiny.build(**DEEPER)
    for mean in (2 / 6, 0.2):
        with pytest.raises(ValueError, match="gemfilter: its first pass of 2 of 6 layers"):
            gemfilter(model, EXAMPLES[0], mean)


def compared(nats, base_nats, lens):
    """compare() of nats summed by example, the losses from these."""
    row, base = ({"loss": sum(values) / sum(lens)} for values in (nats, base_nats))
    examples = [Example([0], [0] * n) for n in lens]
    return list(compare(row, nats, base, base_nats, ("a", "b", "c"), examples).items())


def test_compare():
    """The value is the ratio of perplexities less 1; the interval is a bootstrap's over examples, both sides drawn together."""
    draw = random.Random(0)
    lens = [draw.randint(1, 60) for _ in range(40)]
    base = [n * draw.uniform(1, 5) for n in lens]  # differs much more between examples than from the other
    nats = [b + n * draw.gauss(0.1, 0.1) for b, n in zip(base, lens)]
    (_, value), (_, low), (_, high) = compared(nats, base, lens)
    assert value == pytest.approx(math.exp(sum(nats) / sum(lens)) / math.exp(sum(base) / sum(lens)) - 1)
    values = []
    for _ in range(4000):
        drawn = [draw.randrange(40) for _ in lens]
        values.append(math.exp(sum(nats[i] - base[i] for i in drawn) / sum(lens[i] for i in drawn)) - 1)
    values.sort()
    assert (low, high) == pytest.approx((values[100], values[3900]), abs=0.01) and low < value < high < low + 0.15
    assert [name for name, _ in compared(nats, base, lens)] == ["a", "b", "c"]


def test_compare_without_spread():
    """No width where there is nothing to draw: equal methods, one example, and a constant shift of every token, lengths aside."""
    lens, base = [3, 50, 7, 1], [9.0, 70.0, 3.5, 8.0]
    assert [v for _, v in compared(base, list(base), lens)] == [0, 0, 0]
    for shift in (0.2, -0.1):
        shifted = [b + n * shift for b, n in zip(base, lens)]
        assert [v for _, v in compared(shifted, base, lens)] == pytest.approx([math.expm1(shift)] * 3)
    assert [v for _, v in compared([10.0], [9.0], [4])] == pytest.approx([math.expm1(0.25)] * 3)


def flops_by_hand(model, alive):
    """FLOPs of a prefill with so many tokens alive at each layer: two for every weight and row, and for every product of attention."""
    total = 0
    for block, n in zip(model.layers, alive):
        weights = sum(p.numel() for name, p in block.named_parameters() if "proj.weight" in name)
        pairs = sum(i + 1 for i in range(n))
        total += 2 * n * weights + 2 * 2 * pairs * 8 * 4  # q k and weights v, of 4 heads of 8
    return total


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
    ]
    rows = {r["method"]: r for r in perplexity(model, EXAMPLES, names, STAGES, ranker)}
    assert list(rows) == ["dense", *names]
    dense = sum(flops_by_hand(model, [n] * 6) for n in lens)
    for method, row in rows.items():
        name, filtering = method.partition("@")[0], 0
        if name == "dense":
            alive = [[n] * 6 for n in lens]
        elif name == "gemfilter":
            alive = [[len(gemfilter(model, e, MEAN).prompt)] * 6 for e in EXAMPLES]
            filtering = sum(flops_by_hand(model, [n] * 2) for n in lens)
        else:
            stages = policy(method, model, STAGES, ranker, torch.Generator())[1]
            alive = [stages.alive(n) for n in lens]
            filtering = dense if name == "self_information" else 0
        assert row["mean_alive"] == pytest.approx(sum(map(sum, alive)) / 6 / sum(lens))
        flops = sum(flops_by_hand(model, counts) for counts in alive) + filtering
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
    model, stages = tiny.build(), Schedule(3, {0: SCHEDULE.mean_share()})
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
    "method", ["random@x", "random@0", "random@-4", "random@2.5", "random@", "magic@4", "@4", "", "dense@4"]
)
def test_unknown_methods(method):
    """A span that is no whole number above 0, a span of the dense run and a method that is none are refused by name."""
    with pytest.raises(ValueError, match=f"unknown method '{method}'"):
        check_methods(["dense", method])


def test_known_methods():
    """Every method there is, and every one but dense with a span, is accepted."""
    check_methods([*KNOWN, *(f"{name}@16" for name in KNOWN if name != "dense")])


def test_errors():
    """An unknown method, no heads for sdtp, and nothing to evaluate on are errors."""
    model = tiny.build()
    for methods, examples, message in (
        (["magic"], EXAMPLES, "'magic'"),
        (["sdtp"], EXAMPLES, "needs heads"),
        (["sdtp@4"], EXAMPLES, "needs heads"),
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
