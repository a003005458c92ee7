"""eval_tasks.py: scores against a masked forward in float64, and the tables' arithmetic by hand."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_sdtp import checkpoint_with_heads, masked

import cli
import data
import eval_tasks
import saliency
import scorers
from cli import Results
from data import Example
from eval_tasks import MORE_TOKENS, needles, perplexity, plans, score_response
from flops import alive_per_layer, at_keep, executed_flops
from model import KVCache
from scorers import filter_flops
from sdtp import PruneHead, pruned
from tokenizer import Tokenizer

SIZES = ((30, 6), (41, 1), (24, 9))  # tokens of a prompt and of its response
EXAMPLES = [Example(tiny.ids(n).tolist(), tiny.ids(m, seed=n).tolist()) for n, m in SIZES]
DEEP = {"num_hidden_layers": 6}  # as many layers as the peers' stages need
SCHEDULE = {1: 0.8, 3: 0.6, 5: 0.0}
WINDOW = {"model_type": "mistral", "sliding_window": 7}


def heads(seed=0):
    torch.manual_seed(seed)
    return {layer: PruneHead(32) for layer, share in SCHEDULE.items() if share}


def stages(schedule=SCHEDULE, seed=0, span=1):
    """As cli.given_stages() has them for one folder."""
    return {"": (heads(seed), schedule, span)}


def counted(calls):
    """score_response(), each call noted."""
    return lambda *args: calls.append(1) or score_response(*args)


def by_name(rows):
    return {row["method"]: row for row in rows}


@pytest.mark.parametrize("schedule", [{}, SCHEDULE], ids=["dense", "sdtp"])
@pytest.mark.parametrize("fields", [DEEP, DEEP | WINDOW], ids=["full", "window"])
def test_score_equals_a_masked_forward(fields, schedule):
    """After a pruned prompt each response token sees, at each layer, what is alive there."""
    model, heads_of = tiny.build(**fields), schedule and heads()
    for example in EXAMPLES:
        ids, n = torch.tensor(example.prompt + example.response), len(example.prompt)
        logits, _ = masked(model, ids, n, heads_of, schedule)
        expected = F.cross_entropy(logits[n - 1 : -1], ids[n:], reduction="none")
        nats = score_response(model, example, pruned(heads_of, schedule))
        torch.testing.assert_close(nats.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [DEEP, DEEP | WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("name", ["dense", "sdtp", "gemfilter"])
def test_what_a_prompt_costs(fields, name):
    """Tokens alive, FLOPs with heads and passes before, bytes held, whatever comes after."""
    model, n, notes = tiny.build(**fields), 41, {}
    plan = plans(model.config, [name], stages(), [0.0], n)[0.0, name]
    method, cache = eval_tasks.measured(plan.method(), plan.heads, notes), KVCache(6, extra=5)
    method(model, torch.tensor(EXAMPLES[1].prompt), [n], cache)
    held = [layer.positions[0, : layer.seqlens[0]] for layer in cache.layers]
    *passes, scored = executed_flops(model.config, n, held, plan.heads)
    before = filter_flops(name, model.config, n) if name == "gemfilter" else 0
    assert notes["flops"] == sum(passes) + scored + before
    assert notes["head_flops"] == scored and (scored > 0) == (name == "sdtp")
    assert notes["alive"] == list(map(len, held)) == alive_per_layer(plan.schedule, n, 6)
    assert notes["kv_bytes"] == sum(map(len, held)) * 2 * 2 * 8 * 8  # k and v, heads, size, float64


def test_needle_by_hand():
    """A hit is the value as a whole word of the greedy answer, not a part of one."""
    model, prompt, answer = tiny.build(), tiny.ids(30, seed=2).tolist(), []
    while len(answer) < 1 + MORE_TOKENS and answer[-1:] != [0]:
        answer.append(model(torch.tensor(prompt + answer))[-1].argmax().item())
    part = next(v for v in range(1, 10) if v not in answer and str(v) in str(answer))
    missing = next(v for v in range(10, 61) if v not in answer)
    examples = [Example(prompt, [value]) for value in (answer[0], answer[-1], part, missing)]
    numerals = SimpleNamespace(eos_token_ids=[0], decode=lambda ids: " ".join(map(str, ids)))
    given = {"": (None, {1: 0.5, 2: 0.3}, 1)}
    first, row = needles(numerals, model, examples, ["earliest"], given)
    assert first["accuracy"] == 0.5 > row["accuracy"] and not first["dense_fails"]
    assert row["accuracy_diff"] == row["accuracy"] - 0.5 and "over_sdtp" not in row
    assert row["low"] <= row["accuracy_diff"] <= row["high"]


@pytest.mark.parametrize("name", ["magic", "", "sdtp@16", "random@4@2", "dense+", "sdtp+h2o@0.2"])
def test_unknown_methods(name):
    """No other grammar of names than NAME, NAME+h2o, NAME+snapkv; the error lists what there is."""
    message = f"unknown method {name!r} (known: dense, sdtp, teacher, random, most_recent"
    with pytest.raises(ValueError, match=re.escape(message) + ".*with [+]h2o or [+]snapkv"):
        plans(tiny.build().config, ["dense", name], stages(), [0.0], 30)


@pytest.mark.parametrize("keep, span", [(0.0, 1), (0.9, 4), (0.8, 1)])
def test_all_methods_execute_the_same_flops(keep, span):
    """At the median prompt, within 1 % of sdtp's; self_information beside its dense pass."""
    fields = {"num_hidden_layers": 9, "max_position_embeddings": 320}
    model, schedule = tiny.build(torch.float32, **fields), {2: 0.8, 5: 0.5, 8: 0.0}
    given = {"": ({layer: PruneHead(32) for layer in schedule}, schedule, span)}
    examples = [Example(tiny.ids(n).tolist(), [5, 6]) for n in (300, 280, 310)]
    methods, run = [name for name in scorers.METHODS if name != "dense"], eval_tasks.response_nats
    results = eval_tasks.evaluate(run, "test", model, examples, methods, given, keeps=[keep])
    assert [name for _, name in results] == ["dense", *methods]
    flops = {name: found[0]["flops"] for (_, name), found in results.items()}
    flops["self_information"] -= filter_flops("self_information", model.config, 300)
    for name in methods:
        assert flops[name] == pytest.approx(flops["sdtp"], rel=0.01), name
        assert flops[name] < 0.95 * flops["dense"]
    wanted = at_keep(model.config, schedule, keep, 300) if keep else schedule
    for name in ("sdtp", "teacher", "random"):
        assert results[keep, name][0]["alive"] == alive_per_layer(wanted, 300, 9)


def test_a_peer_that_cannot_be_so_cheap_is_left_out(capsys):
    """In one line that names it; stages that cannot, and no prompts, are errors."""
    model, deep = tiny.build(**DEEP), {"": (None, {0: 0.4}, 1)}
    rows = perplexity(model, EXAMPLES, ["fastkv", "random"], deep, keeps=[0.0, 0.9])
    assert [row["method"] for row in rows] == "dense random dense fastkv random".split()
    out = capsys.readouterr().out
    assert re.search("^fastkv is left out: stages at layers .3. cannot cost as little", out)
    assert out.count("left out") == 1
    with pytest.raises(ValueError, match="--keep 0.5: stages at layers .5. cannot cost"):
        perplexity(model, EXAMPLES, ["random"], {"": (None, {5: 0.5}, 1)}, keeps=[0.5])
    with pytest.raises(ValueError, match="no prompt"):
        perplexity(model, [], ["random"], deep)


def test_folders():
    """With several folders each scorer runs at each one's stages and span; dense runs once."""
    model, names = tiny.build(**DEEP), ["sdtp", "most_recent+snapkv", "dense+h2o"]
    both = {":a": (heads(0), SCHEDULE, 1), ":b": (heads(1), {1: 0.7, 3: 0.5}, 4)}
    rows = by_name(perplexity(model, EXAMPLES, names, both))
    order = "dense sdtp:a most_recent+snapkv:a dense+h2o sdtp:b most_recent+snapkv:b"
    assert " ".join(rows) == order
    for suffix, given in both.items():
        for name, one in by_name(perplexity(model, EXAMPLES, names, {"": given})).items():
            row = rows[name if name.startswith("dense") else name + suffix]
            assert (row["loss"], row["kv_bytes"]) == (one["loss"], one["kv_bytes"])
    ratio = rows["sdtp:b"]["ppl"] / rows["sdtp:a"]["ppl"]
    assert rows["sdtp:b"]["over_sdtp"] == pytest.approx(ratio - 1) != 0


def test_teacher_ranks_by_the_response():
    model, schedule, nats = tiny.build(), {1: 0.5, 2: 0.3}, 0
    for example in EXAMPLES:
        ids, n = torch.tensor(example.prompt + example.response), len(example.prompt)
        labels = {layer: [x] for layer, x in saliency.label(model, ids, n, [1, 2]).items()}
        method = scorers.method("teacher", schedule, labels=labels)
        nats += score_response(model, example, method).sum().item()
    row = by_name(perplexity(model, EXAMPLES, ["teacher"], {"": (None, schedule, 1)}))["teacher"]
    assert row["loss"] == pytest.approx(nats / 16, rel=1e-9)


def test_rows_by_hand():
    how = tiny.build(**DEEP), EXAMPLES, ["sdtp", "dense", "most_recent"], stages()
    rows = by_name(perplexity(*how))
    found = eval_tasks.evaluate(eval_tasks.response_nats, "test", *how)
    found = {name: results for (_, name), results in found.items()}
    assert [r["count"] for r in found["sdtp"]] == [6, 1, 9]
    losses = {name: sum(r["value"] for r in results) / 16 for name, results in found.items()}
    whole = sum(r["flops"] for r in found["dense"])
    for name, row in rows.items():
        tokens = sum(sum(r["alive"]) for r in found[name])
        flops, scored = (sum(r[key] for r in found[name]) for key in ("flops", "head_flops"))
        assert (row["keep"], row["prompts"], row["prompt_tokens"]) == (0, 3, 95)
        expected = {
            "loss": losses[name],
            "ppl": math.exp(losses[name]),
            "ppl_diff": math.exp(losses[name] - losses["dense"]) - 1,
            "over_sdtp": math.exp(losses[name] - losses["sdtp"]) - 1,
            "mean_alive": tokens / 6 / 95,
            "compression": 6 * 95 / tokens,
            "flops_share": flops / whole,
            "head_share": scored / flops,
            "kv_bytes": 256 * tokens / 3,
        }
        assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert row["low"] <= row["ppl_diff"] <= row["high"] and row["prefill_speedup"] > 0
        assert row["over_sdtp_low"] <= row["over_sdtp"] <= row["over_sdtp_high"]
    assert len({round(loss, 4) for loss in losses.values()}) == 3


def test_speedup_is_the_median_of_the_prompts(monkeypatch):
    ticks = iter([0, 8, 0, 4, 0, 9, 0, 3, 0, 6, 0, 6])
    monkeypatch.setattr(cli, "clock", lambda model: next(ticks))
    rows = perplexity(tiny.build(**DEEP), EXAMPLES, ["most_recent"], stages())
    assert [row["prefill_speedup"] for row in rows] == [1, 2]


def untimed(rows):
    return [row | {"prefill_speedup": 0} for row in rows]


def test_at_floor(capsys):
    """Marked where a share asks for fewer tokens than are protected, not where it is 0."""
    for schedule, share in (({1: 0.2}, 2 / 3), ({1: 0.1}, 1), ({1: 0.9, 2: 0}, 0)):
        rows = perplexity(tiny.build(), EXAMPLES, ["random"], {"": (None, schedule, 1)})
        assert [row["at_floor"] for row in rows] == [0, pytest.approx(share)]
        eval_tasks.print_rows(rows)
        assert ("at the floor" in capsys.readouterr().out) == (share == 1)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """The same rows, no result twice in the file, none computed again; a method can join later."""
    model, names = tiny.build(**DEEP), ["sdtp", "random", "teacher", "fastkv", "random+h2o"]
    expected = perplexity(model, EXAMPLES, names, stages())
    path, ran, add = tmp_path / "rows.jsonl", [], Results.add

    def killed(self, result):
        if len(self) == 4:
            raise KeyboardInterrupt
        add(self, result)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Results, "add", killed)
        perplexity(model, EXAMPLES, names, stages(), rows=path)
    monkeypatch.setattr(eval_tasks, "score_response", counted(ran))
    rows = perplexity(model, EXAMPLES, names, stages(), rows=path)
    assert untimed(rows) == untimed(expected) and len(ran) == 18 - 4 + 1
    more = perplexity(model, EXAMPLES, [*names, "earliest"], stages(), rows=path)
    assert more[:-1] == rows and len(ran) == 15 + 3 + 1
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len({*keys}) == len(keys) == 21


@pytest.mark.parametrize(
    "changed, again",
    [
        ({"seed": 1}, ["random"]),
        ({"ranker": 1}, ["sdtp"]),
        ({"weight": 1}, ["dense", "random", "sdtp", "teacher"]),
        ({"theta": 99.0}, ["dense", "random", "sdtp", "teacher"]),
        ({"teacher": ("grad_norm", "all")}, ["teacher"]),
        ({"dtype": torch.bfloat16}, ["dense", "random", "sdtp", "teacher"]),
        ({"schedule": {1: 0.7, 3: 0.5}}, ["random", "sdtp", "teacher"]),
        ({"span": 2}, ["random", "sdtp", "teacher"]),
        ({"example": EXAMPLES[1]}, ["dense", "random", "sdtp", "teacher"]),
        ({"schedule": SCHEDULE | {3: 0.6001}}, []),  # the same counts
    ],
    ids=str,
)
def test_rows_are_for_their_run(tmp_path, changed, again):
    """What a method's result depends on makes it another; what only others depend on does not."""
    how = dict(dtype=torch.float32, weight=0, ranker=0, schedule=SCHEDULE, span=1, seed=0)
    found, path = [], tmp_path / "new" / "rows.jsonl"
    for run in (how, how | changed):
        model = tiny.build(run["dtype"], **DEEP, rope_theta=run.get("theta", 1e4))
        model.layers[1].mlp.up_proj.weight.data[0, 0] += run["weight"]
        given = stages(run["schedule"], span=run["span"])
        given[""][0][3].fc2.weight.data *= 1 - 2 * run["ranker"]  # the other way round
        names, examples = ["sdtp", "random", "teacher"], [run.get("example", EXAMPLES[0])]
        more = {"teacher": run["teacher"]} if "teacher" in run else {}
        perplexity(model, examples, names, given, rows=path, seed=run["seed"], **more)
        found.append([json.loads(line) for line in path.read_text().splitlines()])
    new = found[1][len(found[0]) :]
    assert sorted(row["method"] for row in new) == again
    assert not {row["value"] for row in new} & {row["value"] for row in found[0]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a checkpoint, heads for it, a text and rows; the working folder."""
    fields = {"num_hidden_layers": 6, "max_position_embeddings": 700}
    checkpoint_with_heads(tmp_path, {"heads/tiny": SCHEDULE, "late": {5: 0.9}}, **fields)
    (tmp_path / "t.txt").write_text("".join(chr(ord("a") + i) * 50 for i in range(20)))
    row = {"instruction": "what?", "response": "yes"}
    contexts = [f"{i} " + "x" * (7 * i % 600) for i in range(200)]
    lines = [json.dumps(row | {"context": context}) for context in contexts]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(monkeypatch, flags):
    """cli.run(main) with these flags; returns the rows of --json."""
    argv = "eval_tasks.py --ckpt tiny --dtype float32 --json r.json " + flags
    monkeypatch.setattr(sys, "argv", argv.split())
    cli.run(eval_tasks.main)
    return json.loads(open("r.json").read())


WINDOWS = "--text t.txt --prompt_len 37 --score_len 13 --limit 5"


def test_script_windows(place, monkeypatch, capsys):
    """--limit windows spread over the text, a table for each budget, rows with origin, a figure."""
    seen, run = [], eval_tasks.response_nats
    monkeypatch.setattr(eval_tasks, "response_nats", lambda *a: seen.append(a[1]) or run(*a))
    flags = f"{WINDOWS} --methods sdtp,random+h2o --keep 0.9,0.8 --seed 3"
    rows = script(monkeypatch, flags + " --rows all.jsonl --figure f.png")
    letters = dict.fromkeys("".join(tiny.ALPHABET[t] for t in e.response)[0] for e in seen)
    assert list(letters) == list("aeimq")
    assert [row["method"] for row in rows] == ["dense", "sdtp", "random+h2o"] * 2
    assert rows[1]["flops_share"] > rows[4]["flops_share"]
    origin = {"commit", "command", "versions", "machine", "source", "mean_alive", "flops_share"}
    assert all(origin <= row.keys() and row["seed"] == 3 for row in rows)
    assert capsys.readouterr().out.count("% of their prefill's FLOPs") == 1
    assert len(place.joinpath("all.jsonl").read_text().splitlines()) == 5 * (1 + 2 * 2)
    assert place.joinpath("f.png").is_file()


def test_script_rows_and_folders(place, monkeypatch):
    """Held-out rows of MIN_PROMPT, 100, to MAX_PROMPT tokens; --heads A,B compares folders."""
    tokenizer = Tokenizer(place / "tiny")
    held_out = data.load("d.jsonl", tokenizer, score_len=2, min_prompt=100, max_prompt=400)[1]
    seen, run = [], eval_tasks.response_nats
    monkeypatch.setattr(eval_tasks, "response_nats", lambda *a: seen.append(a[1]) or run(*a))
    flags = "--data d.jsonl --limit 9 --methods sdtp,earliest --score_len 2"
    monkeypatch.setattr(eval_tasks, "MAX_PROMPT", 400)
    rows = script(monkeypatch, f"{flags} --heads heads/tiny,late")
    assert [e for i, e in enumerate(seen) if e not in seen[:i]] == held_out[:9]
    names = "dense sdtp:tiny earliest:tiny sdtp:late earliest:late"
    assert " ".join(row["method"] for row in rows) == names


def test_script_needles(place, monkeypatch, capsys):
    """--limit prompts of each length, of those held out, a table of each, in one file."""
    seen, find = [], eval_tasks.needle_found
    monkeypatch.setattr(eval_tasks, "needle_found", lambda *a: seen.append(a) or find(*a))
    rows = script(monkeypatch, "--text t.txt --needles 100,400 --limit 3 --methods random")
    found = [(row["length"], row["method"], row["prompts"]) for row in rows]
    assert found == [(n, m, 3) for n in (100, 400) for m in ("dense", "random")]
    assert all(int(tokenizer.decode(e.response)) % 2 for tokenizer, _, e, _ in seen)  # odd values
    assert capsys.readouterr().out.count("dense finds fewer than half") == 2


@tiny.on_cuda
def test_cuda_equals_cpu():
    """Every method's loss and tokens alive on CUDA are those on the CPU; random draws anew."""
    model, names = tiny.build(**DEEP), [*scorers.METHODS, "sdtp+h2o", "dense+snapkv"]
    expected = perplexity(model, EXAMPLES, names, stages())
    on_gpu = {layer: head.cuda() for layer, head in heads().items()}
    got = perplexity(model.cuda(), EXAMPLES, names, {"": (on_gpu, SCHEDULE, 1)})
    for row, other in zip(got, expected, strict=True):
        assert row["mean_alive"] == other["mean_alive"]
        assert row["method"] == "random" or row["loss"] == pytest.approx(other["loss"], abs=1e-5)
