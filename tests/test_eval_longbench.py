"""eval_longbench.py: metrics by hand and as published, prompts by hand, runs on a tiny model."""

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
from test_sdtp import checkpoint_with_heads

import eval_longbench as longbench
import eval_tasks
from eval_longbench import PROMPTS, SETS, prompt_ids, read_rows, score
from flops import alive_per_layer
from model import Transformer
from sdtp import dense, generate
from tokenizer import Tokenizer

LONG = " ".join(f"w{i}" for i in range(1200))


@pytest.mark.parametrize(
    "dataset, prediction, answers, expected",
    [
        ("hotpotqa", "The Eiffel Tower!", ["eiffel tower"], 1),
        ("hotpotqa", "in Paris, a city", ["Paris"], 0.5),  # 1 of 3 words, 1 of 1
        ("hotpotqa", "paris paris", ["London", "Paris is Paris"], 0.8),  # the best answer counts
        ("triviaqa", "\nBob\nAlice", ["Bob"], 1),
        ("hotpotqa", "\nBob\nAlice", ["Bob"], 2 / 3),  # no first-line rule there
        ("multifieldqa_zh", "北京。", ["北京"], 1),
        ("gov_report", "the cat sat", ["the cat ran"], 2 / 3),
        ("gov_report", "", ["the cat ran"], 0),  # the package raises
        ("gov_report", "x " + LONG, ["x"], 0),  # raises RecursionError
        ("samsum", "\n\ncat sat\nDialogue: dog", ["cat sat"], 1),
        ("vcsum", "今天天气", ["今天天气"], 1),
        ("passage_count", "3 or 4, say 3", ["3"], 2 / 3),
        ("passage_retrieval_en", "Paragraph 12", ["Paragraph 12"], 1),
        ("passage_retrieval_en", "12 of 30", ["Paragraph 12"], 0.5),
        ("passage_retrieval_zh", "段落7", ["段落7"], 1),
        ("lcc", "\n# note\nreturn x\nreturn y", ["return x"], 1),
        ("lcc", "`return x`\n//return x\n#return x", ["return x"], 0),
        ("lcc", "abcd\n", ["abxd"], 0.75),
        ("lcc", "abcde", ["ab"], 0.57),  # 4 / 7, to whole percents
        ("lcc", "abab", ["baab"], 0.5),  # python-Levenshtein would say 0.75
    ],
)
def test_scores_by_hand(dataset, prediction, answers, expected):
    assert score(dataset, prediction, answers, None) == pytest.approx(expected, abs=1e-6)


def published_classification(prediction, ground_truth, all_classes):
    """classification_score of LongBench's metrics.py, transcribed."""
    em_match_list = []
    for class_name in all_classes:
        if class_name in prediction:
            em_match_list.append(class_name)
    for match_term in em_match_list:
        if match_term in ground_truth and match_term != ground_truth:
            em_match_list.remove(match_term)
    return 1.0 / len(em_match_list) if ground_truth in em_match_list else 0.0


def test_classification_as_published():
    draw = random.Random(0)
    for i in range(300):
        classes = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(6)]
        text, answer = "".join(draw.choices("ab ", k=12)), draw.choice(classes)
        wanted = published_classification(text, answer, classes)
        assert score(("trec", "lsht")[i % 2], f"\n{text}\n{answer}", [answer], classes) == wanted


def test_recursion_border_does_not_depend_on_the_caller():
    """What is too long for the package `rouge` is so wherever score() is called from."""

    def fits(depth):
        if depth:
            return fits(depth - 1)
        texts = ["x " + " ".join(LONG.split()[:n]) for n in range(900, 1000)]
        return [score("gov_report", text, ["x"], None) > 0 for text in texts]

    border = fits(0)
    assert border == fits(60) == sorted(border, reverse=True) and 0 < sum(border) < 100


def test_sets():
    assert set(PROMPTS) - {"about"} == set(SETS) and len(SETS) == 21
    assert Counter(s.max_new_tokens for s in SETS.values()) == {128: 4, 64: 6, 32: 7, 512: 4}
    no_question = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
    for dataset in SETS:
        text = PROMPTS[dataset].format(context="C{0}", input="INPUT")
        assert (text.count("C{0}"), text.count("INPUT")) == (1, dataset not in no_question)


ROW = dict(context="abcdefghij" * 60, input="why?", answers=["j"], length=60, all_classes=None)
TEMPLATE = "{{ bos_token }}<|{{ messages[0]['content'] }}|>"


def test_prompt_by_hand(tmp_path):
    """First and last half of the tokens stay (BOS is one), then the template, then BOS once."""
    plain = Tokenizer(tiny.checkpoint(tmp_path / "plain"))
    chatty = Tokenizer(tiny.checkpoint(tmp_path / "chatty", TEMPLATE))
    for dataset in ("hotpotqa", "trec"):
        text = PROMPTS[dataset].format(**ROW).lower()
        n = len(text) + 1
        assert len(plain.encode(text)) == n
        for length in (n, n + 5, n - 1, 101, 100):
            half = length // 2
            kept = text if n <= length else text[: half - 1] + text[len(text) - half :]
            kept = kept.encode("ascii", "replace").decode()
            ids = prompt_ids(plain, dataset, ROW, length)
            assert ids == plain.encode(kept) and len(ids) <= length and ids.count(1) == 1
            ids = prompt_ids(chatty, dataset, ROW, length)
            wanted = f"<|{kept}|>" if dataset == "hotpotqa" else kept
            assert ids == plain.encode(wanted) and ids.count(1) == 1


def test_zip(place, tmp_path):
    """The hub's data.zip has the same files in data/."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.write(place / "trec.jsonl", "data/trec.jsonl")
    assert read_rows(tmp_path / "data.zip", "trec") == read_rows(place, "trec")
    with pytest.raises(FileNotFoundError, match="lcc.jsonl does not exist"):
        read_rows(tmp_path / "data.zip", "lcc")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no row"),
        ("{", "not readable"),
        (json.dumps({**ROW, "all_classes": ["a"]}) + '\n{"input": ""}', "row 2 has no 'context'"),
        (json.dumps(ROW), "row 1 has no 'all_classes'"),
    ],
)
def test_bad_rows(tmp_path, text, message):
    (tmp_path / "trec.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path, "trec")


LIMIT, LAYERS, ANSWER = 1100, 6, 8
MAX_LENGTH = LIMIT - 16 - 512 - 1  # 16 spared, the longest answer, BOS
DATASETS = ["hotpotqa", "trec"]
METHODS = ["dense", "sdtp", "most_recent", "random", "sdtp+h2o", "gemfilter"]
FLAGS = "--methods", ",".join(METHODS[1:])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, two folders of heads for it, and rows of two sets as the benchmark has them."""
    folder = tmp_path_factory.mktemp("longbench")
    sizes = dict(num_hidden_layers=LAYERS, max_position_embeddings=LIMIT)
    checkpoint_with_heads(folder, {"heads": {2: 0.5}, "all": {2: 1.0}}, **sizes)
    draw = random.Random(1)
    for dataset in DATASETS:
        rows, more = [], {"answers": ["w", "z"], "all_classes": list("bkzw.")}
        for size in (100, 500, 900):
            rows.append({**ROW, **more, "context": "".join(draw.choices("abcdefg ", k=size))})
        text = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0]])  # one twice
        (folder / f"{dataset}.jsonl").write_text(text)
    return folder


def run(place, monkeypatch, out, *flags):
    """main() on the two sets, with short answers; returns scores.json."""
    for dataset in DATASETS:
        monkeypatch.setitem(SETS, dataset, SETS[dataset]._replace(max_new_tokens=ANSWER))
    fixed = f"--ckpt {place}/tiny --data {place} --out_dir {out} --datasets {','.join(DATASETS)}"
    heads = [] if "--heads" in flags or "dense" in flags else ["--heads", place / "heads"]
    argv = ["eval_longbench.py", *fixed.split(), "--dtype", "float32", *heads, *flags]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    longbench.main()
    return json.loads((out / "scores.json").read_text())


def predictions(out):
    """{METHOD/SET: records}, without what depends on the clock."""
    found = {}
    for path in out.glob("pred/*/*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            assert 0 < record.pop("seconds") < record.pop("total_seconds")
        found[f"{path.parent.name}/{path.stem}"] = records
    return found


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """An unbroken run and its rows."""
    out = tmp_path_factory.mktemp("out") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        return out, run(place, monkeypatch, out, *FLAGS)


def test_predictions_in_the_official_layout(place, whole):
    """A line a row with the published fields; dense greedy text by a loop without a cache."""
    model = Transformer.from_pretrained(place / "tiny", torch.float32)
    tokenizer, found = Tokenizer(place / "tiny"), predictions(whole[0])
    assert sorted(found) == sorted(f"{m}/{d}" for m in METHODS for d in DATASETS)
    for name, records in found.items():
        rows = read_rows(place, name.split("/")[1])
        assert [r["row"] for r in records] == [0, 1, 2, 3]
        for record, row in zip(records, rows, strict=True):
            assert all(record[k] == row[k] for k in ("answers", "all_classes", "length"))
            assert record["prompt_tokens"] <= MAX_LENGTH
    ids = prompt_ids(tokenizer, "hotpotqa", read_rows(place, "hotpotqa")[0], MAX_LENGTH)
    new, first = [], found["dense/hotpotqa"][0]
    while len(new) < ANSWER and new[-1:] != [2]:
        new.append(int(model(torch.tensor(ids + new))[-1].argmax()))
    assert (first["pred"], first["new_tokens"]) == (tokenizer.decode(new), len(new))
    texts = {str([r["pred"] for r in found[f"{m}/hotpotqa"]]) for m in METHODS}
    assert len(texts) == len(METHODS)  # nobody idles


def test_rows_by_hand(whole):
    names, found = [*DATASETS, "all"], predictions(whole[0])
    assert [(r["set"], r["method"]) for r in whole[1]] == [(s, m) for s in names for m in METHODS]
    for row in whole[1]:
        sets, means, flops = DATASETS if row["set"] == "all" else [row["set"]], [], []
        for method in ("dense", row["method"]):
            flat = [(d, r) for d in sets for r in found[f"{method}/{d}"]]
            scores = [score(d, r["pred"], r["answers"], r["all_classes"]) for d, r in flat]
            means.append(100 * statistics.mean(scores))  # the sets have as many rows
            flops.append(sum(r["flops"] for _, r in flat))
        assert row["score"] == pytest.approx(means[1]) and row["n"] == len(flat)
        assert row["diff"] == pytest.approx(means[1] - means[0])
        assert row["flops_share"] == pytest.approx(flops[1] / flops[0])
        assert row["max_length"] == MAX_LENGTH
    assert len({row["score"] for row in whole[1]}) > 5


def test_keep_is_a_budget_at_the_median_prompt(place, tmp_path, monkeypatch):
    made, plans = [], eval_tasks.plans
    monkeypatch.setattr(eval_tasks, "plans", lambda *a: made.append((plans(*a), a)) or plans(*a))
    run(place, monkeypatch, tmp_path, "--methods", "sdtp", "--keep", "0.9")
    for dataset, (planned, (*_, keeps, n)) in zip(DATASETS, made, strict=True):
        records, schedule = predictions(tmp_path)[f"sdtp/{dataset}"], planned[0.9, "sdtp"].schedule
        lens = [r["prompt_tokens"] for r in records]
        assert keeps == [0.9] and n == int(statistics.median(lens)) < max(lens)
        alive = [alive_per_layer(schedule, n, LAYERS) for n in lens]
        assert [r["alive"] for r in records] == alive != [[n] * LAYERS for n in lens]


def test_stopped_and_started_again(place, whole, tmp_path, monkeypatch):
    """Killed within a line: no row twice, none missing, the same answers; nothing is run again."""
    answer, left = longbench.answer, [8]

    def stop(*args):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError
        return answer(*args)

    monkeypatch.setattr(longbench, "answer", stop)
    with pytest.raises(RuntimeError):
        run(place, monkeypatch, tmp_path, *FLAGS)
    torn = tmp_path / "pred/sdtp/hotpotqa.jsonl"
    assert sum(map(len, predictions(tmp_path).values())) == 8
    torn.write_bytes(torn.read_bytes()[:-30])  # the last line is not whole
    left[0] = 48 - 7
    rows = run(place, monkeypatch, tmp_path, *FLAGS)
    assert left[0] == 0 and predictions(tmp_path) == predictions(whole[0])
    assert [r["score"] for r in rows] == [r["score"] for r in whole[1]]


def test_another_run_in_the_folder(place, whole, monkeypatch):
    """Predictions of other flags or heads are neither mixed with these nor lost."""
    before = predictions(whole[0])
    flags = [("--limit", 2), ("--keep", 0.8), ("--max_length", 300), ("--seed", 5)]
    for flag, value in [*flags, ("--heads", place / "all")]:
        with pytest.raises(ValueError, match="holds predictions of other.*--out_dir"):
            run(place, monkeypatch, whole[0], *FLAGS, flag, value)
    assert predictions(whole[0]) == before


def test_two_folders_of_heads_and_nothing_pruned(place, tmp_path, monkeypatch):
    """A folder's name joins the method's; where everything is kept, dense's own predictions."""
    both = f"{place}/heads,{place}/all"
    rows = run(place, monkeypatch, tmp_path, "--methods", "sdtp", "--heads", both, "--limit", 2)
    assert [r["method"] for r in rows[:3]] == ["dense", "sdtp:heads", "sdtp:all"]
    found = predictions(tmp_path)
    assert {name.split("/")[0] for name in found} == {"dense", "sdtp-heads", "sdtp-all"}
    ours, reference = (found[f"{m}/hotpotqa"] for m in ("sdtp-all", "dense"))
    assert [r["pred"] for r in ours] == [r["pred"] for r in reference]
    assert rows[2]["mean_alive"] == 1 and rows[2]["diff"] == rows[2]["low"] == rows[2]["high"] == 0


def test_samsum_stops_at_a_newline(place, monkeypatch):
    """Of samsum alone a newline ends the answer; its first token is neither that nor the end."""
    model = Transformer.from_pretrained(place / "tiny", torch.float32)
    prompt = (tokenizer := Tokenizer(place / "tiny")).encode("abcdefg")
    (free,) = generate(model, torch.tensor(prompt), 128, eos_token_ids=[2])
    for newline in (free[0], next(t for t in free if t != free[0])):
        monkeypatch.setattr(tokenizer, "encode", lambda text, **_: {"\n": [newline]}[text])
        logits = model(torch.tensor(prompt))[-1]
        logits[[2, newline]] = -math.inf
        new = [int(logits.argmax())]
        while len(new) < 128 and new[-1] not in (2, newline):
            new.append(int(model(torch.tensor(prompt + new))[-1].argmax()))
        found = longbench.answer(tokenizer, "samsum", model, prompt, dense)
        assert (found["pred"], found["new_tokens"]) == (tokenizer.decode(new), len(new))
        found = longbench.answer(tokenizer, "qasper", model, prompt, dense)
        assert found["pred"] == tokenizer.decode(free)


def test_groups():
    """The paper's categories and its AVG are there once all of their sets are."""
    found = longbench.groups(list(SETS))
    assert list(found)[21:] == ["Single", "Multi", "Summ", "FewShot", "Code", "AVG", "all"]
    assert found["Code"] == ["lcc", "repobench-p"] and len(found["AVG"]) == 14
    assert list(longbench.groups(["2wikimqa", "hotpotqa", "musique"]))[3:] == ["Multi", "all"]


def test_sets_weigh_alike():
    """In score, difference and interval, whatever their number of rows."""
    costs = {"prompt_tokens": 9, "alive": [9], "flops": 1, "head_flops": 0, "kv_bytes": 1}
    costs |= {"seconds": 1, "total_seconds": 1}
    records = {"qasper": {}, "trec": {}}
    for d, n, value, diff in (("qasper", 30, 50, 2), ("trec", 8, 20, 4)):
        records[d]["sdtp"] = [{**costs, "score": value}] * n
        records[d]["dense"] = [{**costs, "score": value - diff}] * n
    row = longbench.summary("all", "sdtp", list(records), records)
    assert row["score"] == 35 and row["diff"] == pytest.approx(3)
    assert 2 <= row["low"] < 2.8 and 3.2 < row["high"] <= 4


def test_few_positions_and_a_repetition_penalty(place, tmp_path, monkeypatch, capsys):
    """256 positions are enough for short prompts; what is not applied is named."""
    folder = tiny.checkpoint(tmp_path / "tiny", max_position_embeddings=256)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    flags = ["--ckpt", folder, "--methods", "dense", "--max_length"]
    rows = run(place, monkeypatch, tmp_path / "out", *flags, 100)
    assert rows[0]["prompt_tokens"] <= 100 and len(predictions(tmp_path / "out")) == 2
    assert "repetition_penalty 1.5 is not applied" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--max_length 232: .* leave 2 to 231"):  # 256 - 16 - 8 - 1
        run(place, monkeypatch, tmp_path / "none", *flags, 232)
