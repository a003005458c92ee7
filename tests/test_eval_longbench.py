"""eval_longbench.py: metrics against hand-worked values and the published code, prompts by hand, runs on a tiny model."""

import difflib
import json
import math
import random
import statistics
import sys
import zipfile
from collections import Counter

import pytest
import tiny
import torch

import eval_longbench as longbench
import eval_tasks
from data import Example
from eval_longbench import PROMPTS, SETS, SETS_E, LongBenchConfig, prompt_ids, read_predictions, score
from model import Transformer
from sdtp import PruneHead, Schedule, generate, load_heads, save_heads
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------- metrics

RETRIEVED = "Paragraph 12"


@pytest.mark.parametrize(
    "dataset, prediction, answers, expected",
    [
        ("hotpotqa", "The Eiffel Tower!", ["eiffel tower"], 1),
        ("hotpotqa", "in Paris, a city", ["Paris"], 0.5),  # 1 of 3 words, 1 of 1
        ("hotpotqa", "paris paris", ["Paris is Paris", "London"], 0.8),  # 2 of 2, 2 of 3; the best answer counts
        ("qasper", "", ["yes"], 0),
        ("qasper", "the", ["a"], 0),  # only articles
        ("triviaqa", "\nBob\nAlice", ["Bob"], 1),
        ("hotpotqa", "\nBob\nAlice", ["Bob"], 2 / 3),  # no first-line rule there
        ("multifieldqa_zh", "北京。", ["北京"], 1),
        ("multifieldqa_zh", "", ["北京"], 0),
        ("gov_report", "the cat sat", ["the cat ran"], 2 / 3),
        ("gov_report", "", ["the cat ran"], 0),  # the package raises
        ("gov_report", " ".join(f"w{i}" for i in range(1200)), ["x"], 0),
        ("gov_report", " ".join(["x"] + [f"w{i}" for i in range(1200)]), ["x"], 0),  # raises RecursionError
        ("samsum", "\n\ncat sat\nDialogue: dog", ["cat sat"], 1),
        ("vcsum", "今天天气", ["今天天气"], 1),
        ("passage_count", "3 or 4, say 3", ["3"], 2 / 3),
        ("passage_count", "13", ["3"], 0),
        ("passage_count", "none", ["3"], 0),
        ("passage_retrieval_en", "Paragraph 12", [RETRIEVED], 1),
        ("passage_retrieval_en", "12 of 30", [RETRIEVED], 0.5),
        ("passage_retrieval_zh", "段落7", ["段落7"], 1),
        ("lcc", "\n# note\nreturn x\nreturn y", ["return x"], 1),
        ("lcc", "`return x`\n//return x\n#return x", ["return x"], 0),
        ("lcc", "abcd\n", ["abxd"], 0.75),
        ("repobench-p", "abc", ["ab"], 0.8),
        ("lcc", "abcde", ["ab"], 0.57),  # 4 / 7, to whole percents
    ],
)
def test_scores_by_hand(dataset, prediction, answers, expected):
    assert score(dataset, prediction, answers, None) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "classes, prediction, answer, expected",
    [
        (["Food", "Date"], "Date", "Date", 1),
        (["Food", "Date"], "Date or Food", "Date", 0.5),
        (["Food", "Date"], "Food\nDate", "Date", 0),  # the first line only
        (
            ["Manner", "Manner of an action"],
            "Manner of an action",
            "Manner of an action",
            1,
        ),  # part of the answer: removed
        # all three are found; "a" is removed, which skips "ab": two are left
        (["a", "ab", "abc"], "abc", "abc", 0.5),
        (["abc", "ab", "a"], "abc", "abc", 0.5),
        (["ab", "x", "a", "abc"], "abc x", "abc", 0.5),
        (["Food"], "nothing", "Food", 0),
    ],
)
def test_classification_by_hand(classes, prediction, answer, expected):
    for dataset in ("trec", "lsht"):
        assert score(dataset, prediction, [answer], classes) == expected


def published_classification(prediction, ground_truth, all_classes):
    """classification_score of LongBench's metrics.py, transcribed."""
    em_match_list = []
    for class_name in all_classes:
        if class_name in prediction:
            em_match_list.append(class_name)
    for match_term in em_match_list:
        if match_term in ground_truth and match_term != ground_truth:
            em_match_list.remove(match_term)
    if ground_truth in em_match_list:
        return 1.0 / len(em_match_list)
    return 0.0


def published_f1(prediction, ground_truth):
    """f1_score of LongBench's metrics.py, transcribed."""
    common = Counter(prediction) & Counter(ground_truth)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction)
    recall = 1.0 * num_same / len(ground_truth)
    return (2 * precision * recall) / (precision + recall)


def test_scores_as_published():
    """On random texts, bit for bit the published code's."""
    draw = random.Random(0)
    for _ in range(300):
        classes = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(6)]
        text, answer = "".join(draw.choices("ab ", k=12)), draw.choice(classes)
        assert score("trec", text, [answer], classes) == published_classification(text, answer, classes)
        one, two = (draw.choices("pqrst", k=draw.randint(0, 9)) for _ in range(2))
        assert score("musique", " ".join(one), [" ".join(two)], None) == published_f1(one, two)


def test_edit_similarity_without_levenshtein():
    """difflib finds "ab" alone; python-Levenshtein, which fuzzywuzzy prefers where it is there, would say 0.75."""
    assert score("lcc", "abab", ["baab"], None) == 0.5
    assert longbench.fuzz.SequenceMatcher is difflib.SequenceMatcher


def test_recursion_border_does_not_depend_on_the_caller():
    """What is too long for the package `rouge` is so wherever score() is called from."""

    def longest(depth):
        if depth:
            return longest(depth - 1)
        words = [f"w{i}" for i in range(1000)]
        return [score("gov_report", " ".join(["x", *words[:n]]), ["x"], None) > 0 for n in range(900, 1000)]

    border = longest(0)
    assert border == longest(60) and border == sorted(border, reverse=True) and 0 < sum(border) < 100


# ---------------------------------------------------------------------------- the sets and their prompts


def test_sets():
    assert set(PROMPTS) - {"about"} == set(SETS) and len(SETS) == 21 and len(SETS_E) == 13 and set(SETS_E) < set(SETS)
    assert Counter(s.category for s in SETS.values()) == {
        "Single": 3,
        "Multi": 3,
        "Summ": 3,
        "FewShot": 3,
        "Code": 2,
        None: 7,
    }
    assert Counter(s.max_new_tokens for s in SETS.values()) == {128: 4, 64: 6, 32: 7, 512: 4}
    no_question = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
    for dataset in SETS:
        text = PROMPTS[dataset].format(context="CONTEXT{0}", input="INPUT")
        assert text.count("CONTEXT{0}") == 1 and text.count("INPUT") == (dataset not in no_question)
    ends = {d: PROMPTS[d][-9:] for d in ("lcc", "passage_count", "triviaqa", "trec")}
    assert ends == {"lcc": "of code:\n", "passage_count": "swer is: ", "triviaqa": "\n\n{input}", "trec": "}\n{input}"}


ROW = {"context": "abcdefghij" * 60, "input": "why?", "answers": ["j"], "length": 60, "all_classes": None}
TEMPLATE = "{{ bos_token }}<|{{ messages[0]['content'] }}|>"


def test_prompt_by_hand(tmp_path):
    """The middle goes, first half and last half of the tokens stay (BOS is one), then the chat template, then BOS once."""
    plain = Tokenizer(tiny.checkpoint(tmp_path / "plain"))
    chatty = Tokenizer(tiny.checkpoint(tmp_path / "chatty", TEMPLATE))
    for dataset in ("hotpotqa", "trec"):
        text = PROMPTS[dataset].format(**ROW).lower()
        whole = plain.encode(text)
        n = len(text) + 1
        assert len(whole) == n
        for length in (n, n + 5, n - 1, 101, 100):
            kept = text if n <= length else text[: length // 2 - 1] + text[len(text) - length // 2 :]
            kept = kept.encode("ascii", "replace").decode()
            ids = prompt_ids(plain, dataset, ROW, length)
            assert ids == plain.encode(kept) and len(ids) <= length and ids.count(1) == 1
            ids = prompt_ids(chatty, dataset, ROW, length)
            assert ids == plain.encode(f"<|{kept}|>" if dataset == "hotpotqa" else kept) and ids.count(1) == 1


# ---------------------------------------------------------------------------- runs

FIELDS = dict(num_hidden_layers=6, max_position_embeddings=1100)
MAX_LENGTH = 1100 - 16 - 512 - 1  # 16 spared, the longest answer, BOS
NEWLINE = tiny.ALPHABET.index("\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, heads for it, and rows of four sets (and of LongBench-E) as the benchmark has them."""
    folder = tmp_path_factory.mktemp("longbench")
    tiny.checkpoint(folder / "tiny", **FIELDS)
    model = Transformer.from_pretrained(folder / "tiny", torch.float32)
    torch.manual_seed(0)
    save_heads(folder / "heads", {2: PruneHead(32)}, model, Schedule(6, {2: 0.5}))
    draw = random.Random(1)
    for dataset in ("hotpotqa", "trec", "samsum", "passage_count"):
        rows = [
            {
                "context": "".join(draw.choices("abcdefg ", k=draw.randint(100, 900))),
                "input": "what is it?",
                "answers": [draw.choice("abcdefg"), "7"],
                "length": (3999, 4000, 7999, 8000)[i],
                "all_classes": ["a", "b", "ab"] if dataset == "trec" else None,
            }
            for i in range(4)
        ]
        for name in (dataset, f"{dataset}_e"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def run(place, monkeypatch, out, *flags):
    """main() on the three short-answered sets; returns scores.json."""
    argv = [
        "eval_longbench.py",
        "--ckpt",
        place / "tiny",
        "--heads",
        place / "heads",
        "--data",
        place,
        "--out_dir",
        out,
    ]
    argv += ["--datasets", "hotpotqa,trec,passage_count", "--dtype", "float32", *flags]
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    longbench.main()
    return json.loads((out / "scores.json").read_text())


def files(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.glob("pred*/*/*") if p.name != "result.json"}


def answers(out):
    """What of the predictions does not depend on the clock."""
    return {
        name: [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in text.splitlines()]
        for name, text in files(out).items()
    }


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """An unbroken run and its rows."""
    out = tmp_path_factory.mktemp("out") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        return out, run(place, monkeypatch, out, "--methods", "sdtp,most_recent,random")


METHODS = ["dense", "sdtp", "most_recent", "random"]


def test_predictions_in_the_official_layout(place, whole):
    """A line a row in the rows' order, with the published fields; dense greedy text by a loop without a cache."""
    out, _ = whole
    model, tokenizer = Transformer.from_pretrained(place / "tiny", torch.float32), Tokenizer(place / "tiny")
    found = answers(out)
    assert sorted(found) == sorted(
        f"pred/{m}/{d}.jsonl" for m in METHODS for d in ("hotpotqa", "trec", "passage_count")
    )
    for name, records in found.items():
        dataset = name.split("/")[-1].removesuffix(".jsonl")
        rows = [json.loads(line) for line in (place / f"{dataset}.jsonl").read_text().splitlines()]
        assert [r["row"] for r in records] == [0, 1, 2, 3]
        for record, row in zip(records, rows, strict=True):
            assert list(record)[:4] == ["pred", "answers", "all_classes", "length"]
            assert all(record[k] == row[k] for k in ("answers", "all_classes", "length"))
            assert record["prompt_tokens"] <= MAX_LENGTH
        if name == "pred/dense/hotpotqa.jsonl":
            record, ids = records[0], prompt_ids(tokenizer, dataset, rows[0], MAX_LENGTH)
            new = []
            while len(new) < 32 and new[-1:] != [2]:
                new.append(int(model(torch.tensor(ids + new))[-1].argmax()))
            assert record["pred"] == tokenizer.decode(new) and record["new_tokens"] == len(new)


def test_rows_by_hand(place, whole):
    """Scores, differences, counts and times of sets and of all, from the predictions."""
    out, rows = whole
    assert [(r["set"], r["method"]) for r in rows] == [
        (s, m) for s in ("hotpotqa", "trec", "passage_count", "all") for m in METHODS
    ]
    found = {n: [json.loads(line) for line in t.splitlines()] for n, t in files(out).items()}
    means, flops = {}, {(r["method"], r["set"]): r["flops_share"] for r in rows}
    model = Transformer.from_pretrained(place / "tiny", torch.float32)
    heads, schedule, _ = load_heads(place / "heads", model)
    for row in rows:
        sets = [row["set"]] if row["set"] != "all" else ["hotpotqa", "trec", "passage_count"]
        records = {d: found[f"pred/{row['method']}/{d}.jsonl"] for d in sets}
        for d in sets:
            values = [score(d, r["pred"], r["answers"], r["all_classes"]) for r in records[d]]
            means[row["method"], d] = 100 * sum(values) / 4
        flat = sum(records.values(), [])
        assert row["n"] == len(flat) and row["sets"] == len(sets)
        assert row["score"] == pytest.approx(sum(means[row["method"], d] for d in sets) / len(sets))
        dense = sum(means["dense", d] for d in sets) / len(sets)
        assert row["diff"] == pytest.approx(row["score"] - dense)
        assert row["low"] <= row["score"] <= row["high"] and row["diff_low"] <= row["diff"] <= row["diff_high"]
        assert row["seconds"] == pytest.approx(sum(r["seconds"] for r in flat) / len(flat))
        assert row["prefill_seconds"] == pytest.approx(sum(r["prefill_seconds"] for r in flat) / len(flat))
        assert 0 < row["prefill_seconds"] < row["seconds"]
        tokens = sum(r["prompt_tokens"] for r in flat)
        alive = 0
        for d in sets:
            lens = [r["prompt_tokens"] for r in records[d]]
            stages = eval_tasks.policy(row["method"], model.config, schedule, heads, int(statistics.median(lens)))
            assert [r["alive"] for r in records[d]] == [stages.alive(n) if stages else [n] * 6 for n in lens]
            alive += sum(sum(r["alive"]) / 6 for r in records[d])
        assert row["mean_alive"] == pytest.approx(alive / tokens)
        assert row["flops_share"] == pytest.approx(
            flops["sdtp", row["set"]] if row["method"] != "dense" else 1, abs=0.01
        )
        assert row["max_length"] == MAX_LENGTH
    for m in METHODS:
        result = json.loads((out / "pred" / m / "result.json").read_text())
        assert result == {d: round(means[m, d], 2) for d in ("hotpotqa", "trec", "passage_count")}
    assert (
        len({json.dumps([r["pred"] for r in found[f"pred/{m}/hotpotqa.jsonl"]]) for m in METHODS}) == 4
    )  # nobody idles


def test_stopped_and_started_again(place, whole, tmp_path, monkeypatch, capsys):
    """Killed in the middle of a line: no row twice, none missing, the same answers and scores; nothing is run again."""
    predict, left = longbench.predict, [7]

    def stop(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return predict(*args)

    monkeypatch.setattr(longbench, "predict", stop)
    flags = ["--methods", "sdtp,most_recent,random"]
    with pytest.raises(KeyboardInterrupt):
        run(place, monkeypatch, tmp_path, *flags)
    kept = files(tmp_path)
    torn = tmp_path / "pred/sdtp/hotpotqa.jsonl"
    assert sum(t.count(b"\n") for t in kept.values()) == 7 and torn.read_bytes().count(b"\n") == 2
    torn.write_bytes(torn.read_bytes()[:-30])  # the second line is not whole
    left[0] = 42  # 48 in all
    rows = run(place, monkeypatch, tmp_path, *flags)
    assert left[0] == 0 and answers(tmp_path) == answers(whole[0])
    assert [r["score"] for r in rows] == [r["score"] for r in whole[1]]
    assert files(tmp_path)["pred/dense/hotpotqa.jsonl"].startswith(kept["pred/dense/hotpotqa.jsonl"])
    left[0] = 12
    run(place, monkeypatch, tmp_path, "--methods", "norm")  # another method joins: only it is run
    assert left[0] == 0


def test_another_run_in_the_folder(place, whole, monkeypatch):
    """Settings that predictions depend on must be the run's; methods and sets may join."""
    for flag, value in (
        ("--limit", 2),
        ("--keep", 0.8),
        ("--max_length", 300),
        ("--seed", 5),
        ("--heads", "elsewhere"),
    ):
        with pytest.raises((ValueError, OSError), match=f"holds a run with {flag[2:]}|elsewhere"):
            run(place, monkeypatch, whole[0], "--methods", "most_recent,random", flag, value)


@pytest.mark.parametrize("flags", [["--keep", "1"], ["--heads", "all"]], ids=["keep", "heads"])
def test_nothing_pruned_is_dense(place, tmp_path, monkeypatch, flags):
    """Everything kept through the pruning path, by the budget or by sdtp's schedule: dense's predictions, every token alive."""
    model, methods = Transformer.from_pretrained(place / "tiny", torch.float32), "last_attention"
    if flags[0] == "--heads":
        save_heads(tmp_path / "all", {2: PruneHead(32)}, model, Schedule(6, {2: 1.0}))
        flags, methods = ["--heads", tmp_path / "all"], "sdtp,last_attention"
    rows = run(place, monkeypatch, tmp_path / "out", "--methods", methods, "--limit", "2", *flags)
    found = answers(tmp_path / "out")
    for name, records in found.items():
        assert records == found[f"pred/dense/{name.split('/')[-1]}"]
    assert len(found) == 3 * (2 + methods.count(","))
    assert all(r["mean_alive"] == 1 and r["diff"] == r["diff_low"] == r["diff_high"] == 0 for r in rows)


def test_batches_and_processes(place, whole, tmp_path, monkeypatch):
    """Ragged batches, and rows split over three processes whose files are merged, give the predictions of one by one."""
    flags = ["--methods", "sdtp,most_recent"]
    run(place, monkeypatch, tmp_path / "batches", *flags, "--batch_size", "3")
    expected = {n: records for n, records in answers(whole[0]).items() if "random" not in n}
    assert answers(tmp_path / "batches") == expected
    config = LongBenchConfig(out_dir=str(tmp_path / "ranks"), max_length=MAX_LENGTH)
    model, tokenizer = Transformer.from_pretrained(place / "tiny", torch.float32), Tokenizer(place / "tiny")
    heads, schedule, _ = load_heads(place / "heads", model)
    path = longbench.predictions_path(config, "most_recent", "trec")
    rows = longbench.read_rows(place, "trec")
    prompts = longbench.read_prompts(config, model, tokenizer, {"trec": rows}, 0)
    plan = longbench.plans(config, model.config, prompts, ["most_recent"], schedule, heads)["trec"]
    prompts = prompts["trec"]
    for rank in (2, 0):
        longbench.predict_set(config, model, tokenizer, "trec", rows, prompts, plan, heads, rank, 3)
    assert sorted(p.name for p in path.parent.iterdir()) == ["trec.jsonl.rank0", "trec.jsonl.rank2"]
    assert sorted(read_predictions(path)) == [0, 2, 3]
    longbench.predict_set(config, model, tokenizer, "trec", rows, prompts, plan, heads, 0, 1)  # as one process
    assert sorted(longbench.merge(path)) == [0, 1, 2, 3] and [p.name for p in path.parent.iterdir()] == ["trec.jsonl"]
    assert answers(tmp_path / "ranks")["pred/most_recent/trec.jsonl"] == expected["pred/most_recent/trec.jsonl"]


def test_samsum_stops_at_a_newline(place):
    """Of samsum, and of it only, a newline ends the answer; its first token is neither that nor the end."""
    model, tokenizer = Transformer.from_pretrained(place / "tiny", torch.float32), Tokenizer(place / "tiny")
    prompts = [tokenizer.encode("".join(random.Random(i).choices("abcdefgh ", k=20))) for i in range(40)]
    free = [generate(model, torch.tensor(ids), 128, eos_token_ids=[2])[0] for ids in prompts]
    empty = [i for i, new in enumerate(free) if new[0] in (2, NEWLINE)]  # would be answered by nothing
    lines = [i for i, new in enumerate(free) if NEWLINE in new[1:]]
    ended = 0
    for i in (empty[0], *lines[:3], *range(3)):
        ids = prompts[i]
        run = {d: longbench.answer(tokenizer, d, model, [Example(ids, [])])[0] for d in ("samsum", "qasper")}
        assert run["qasper"]["pred"] == tokenizer.decode(free[i])
        new = []
        while len(new) < 128 and (not new or new[-1] not in (2, NEWLINE)):
            logits = model(torch.tensor(ids + new))[-1]
            if not new:
                logits[[2, NEWLINE]] = -math.inf
            new.append(int(logits.argmax()))
        assert run["samsum"]["pred"] == tokenizer.decode(new) and run["samsum"]["new_tokens"] == len(new)
        ended += new[-1] == NEWLINE
    assert ended >= 3


def test_gemfilter_and_self_information(place, tmp_path, monkeypatch):
    """The methods that read the prompt before the prefill run, and keep what their schedules ask for."""
    rows = run(
        place, monkeypatch, tmp_path, "--methods", "gemfilter,self_information,fastkv,lazyllm@4", "--keep", "0.95"
    )
    model = Transformer.from_pretrained(place / "tiny", torch.float32)
    heads, schedule, _ = load_heads(place / "heads", model)
    for name, records in answers(tmp_path).items():
        n = int(statistics.median(r["prompt_tokens"] for r in records))
        stages = eval_tasks.policy(name.split("/")[1], model.config, schedule, heads, n, 0.95)
        for r in records:
            alive = stages.alive(r["prompt_tokens"]) if stages else [r["prompt_tokens"]] * 6
            assert r["alive"] == (alive[:1] * 6 if "gemfilter" in name else alive)
    assert len(rows) == 20
    shares = {r["method"]: r["flops_share"] for r in rows if r["set"] == "all"}
    assert shares["fastkv"] == pytest.approx(shares["gemfilter"], abs=0.01) and shares["self_information"] > 1


def test_compression(place, whole, tmp_path, monkeypatch):
    """METHOD+h2o keeps METHOD's tokens alive and answers otherwise; at a share of 1 it answers as METHOD."""
    run(place, monkeypatch, tmp_path, "--methods", "sdtp+h2o@0.2,sdtp+h2o@1")
    found, plain = answers(tmp_path), answers(whole[0])
    for d in ("hotpotqa", "trec", "passage_count"):
        assert found[f"pred/sdtp+h2o@1/{d}.jsonl"] == (sdtp := plain[f"pred/sdtp/{d}.jsonl"])
        some = found[f"pred/sdtp+h2o@0.2/{d}.jsonl"]
        assert [r["alive"] for r in some] == [r["alive"] for r in sdtp] and some != sdtp


def test_adaptive(place, whole, tmp_path, monkeypatch):
    """The prompts of a set keep as many tokens together as by their shares, each its own number; in batches as one by one."""
    for out, flags in (("one", []), ("three", ["--batch_size", "3"])):
        run(place, monkeypatch, tmp_path / out, "--methods", "sdtp_adaptive", *flags)
    found, shares = answers(tmp_path / "one"), answers(whole[0])
    assert answers(tmp_path / "three") == found
    for d in ("hotpotqa", "trec", "passage_count"):
        alive = [r["alive"][-1] for r in found[f"pred/sdtp_adaptive/{d}.jsonl"]]
        asked = [r["alive"][-1] for r in shares[f"pred/sdtp/{d}.jsonl"]]
        assert alive != asked and abs(sum(alive) - sum(asked)) <= 2


def test_longbench_e(place, tmp_path, monkeypatch):
    """Lengths below 4,000, below 8,000 and above; result.json in the published form, NaN for a bin without rows."""
    rows = run(place, monkeypatch, tmp_path, "--e", "--methods", "most_recent")
    found = answers(tmp_path)
    assert all(n.startswith("pred_e/") for n in found)
    records = found["pred_e/dense/trec.jsonl"]
    values = [100 * score("trec", r["pred"], r["answers"], r["all_classes"]) for r in records]
    result = json.loads((tmp_path / "pred_e/dense/result.json").read_text())
    assert result["trec"] == {"0-4k": values[0], "4-8k": round((values[1] + values[2]) / 2, 2), "8k+": values[3]}
    counts = {(r["set"], r["n"]) for r in rows}
    assert counts >= {
        ("trec 0-4k", 1),
        ("trec 4-8k", 2),
        ("trec 8k+", 1),
        ("all 0-4k", 3),
        ("all 4-8k", 6),
        ("all 8k+", 3),
    }
    assert math.isnan(longbench.official_result({0: {"length": 1}}, {0: 1.0}, True)["8k+"])
    run(place, monkeypatch, tmp_path / "one", "--e", "--methods", "most_recent", "--limit", "1")


def test_groups():
    """The paper's categories and its AVG are there once all of their sets are."""
    records = {d: {0: {"length": 1}} for d in SETS}
    names = {name: list(sets) for name, sets in longbench.groups(records, False)}
    assert list(names)[21:] == ["Single", "Multi", "Summ", "FewShot", "Code", "AVG", "all"]
    assert names["Code"] == ["lcc", "repobench-p"] and len(names["AVG"]) == 14 and len(names["all"]) == 21
    del records["lcc"]
    assert list(dict(longbench.groups(records, False)))[20:] == ["Single", "Multi", "Summ", "FewShot", "all"]


def test_interval():
    """A bootstrap by rows within each set, of the mean over sets."""
    draw = random.Random(0)
    samples = [[draw.gauss(m, s) for _ in range(n)] for m, s, n in ((50, 10, 30), (20, 1, 8))]
    values = sorted(sum(sum(draw.choice(s) for _ in s) / len(s) for s in samples) / 2 for _ in range(2000))
    assert longbench.interval(samples) == pytest.approx([values[50], values[1950]], abs=0.3)


# ---------------------------------------------------------------------------- mistakes


def test_zip(place, tmp_path):
    """The hub's data.zip has the same files in data/."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.write(place / "trec.jsonl", "data/trec.jsonl")
    assert longbench.read_rows(tmp_path / "data.zip", "trec") == longbench.read_rows(place, "trec")
    with pytest.raises(FileNotFoundError, match="lcc.jsonl does not exist"):
        longbench.read_rows(tmp_path / "data.zip", "lcc")
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="not readable"):
        longbench.read_rows(tmp_path / "bad.zip", "lcc")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--datasets", "trec,hotpot"], "unknown dataset 'hotpot'"),
        (["--e", "--datasets", "vcsum"], "unknown dataset 'vcsum' .known in LongBench-E"),
        (["--methods", "sdtp,best"], "unknown method 'best'"),
        (["--methods", "teacher"], "teacher"),
        (["--methods", "teacher_late"], "teacher"),
        (["--datasets", "lcc"], "lcc.jsonl does not exist"),
        (["--limit", "-1"], "--limit -1"),
        (["--max_length", "1"], "--max_length 1"),
        (["--max_length", "1020"], "--max_length 1020: the model's positions leave 2 to 1019"),  # 1100 - 16 - 64 - 1
        (["--batch_size", "0"], "--batch_size 0"),
    ],
    ids=str,
)
def test_mistakes(place, tmp_path, monkeypatch, flags, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(place, monkeypatch, tmp_path / "out", "--methods", "most_recent", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no row"),
        ("{", "not readable"),
        ("3", "row 1 has no 'input'"),
        (json.dumps({k: v for k, v in ROW.items() if k != "length"}), "row 1 has no 'length'"),
        (json.dumps({**ROW, "all_classes": ["a"]}) + "\n" + json.dumps(ROW), "row 2 has no 'all_classes'"),
    ],
    ids=str,
)
def test_bad_rows(tmp_path, text, message):
    (tmp_path / "trec.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        longbench.read_rows(tmp_path, "trec")


def test_damaged_predictions(tmp_path):
    """A line that is no record, in the middle of a file, is named."""
    (tmp_path / "trec.jsonl").write_text('{"row": 0}\n{"row"\n{"row": 2}\n')
    with pytest.raises(ValueError, match="trec.jsonl: line 2 is damaged"):
        read_predictions(tmp_path / "trec.jsonl")
