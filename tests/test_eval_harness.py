"""eval_harness.py against the harness's own transformers model, on one checkpoint folder."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_sdtp import checkpoint_with_heads, heads_of

import cli
import eval_harness
from data import Example
from eval_harness import HarnessLM, load_tasks, local_rows, samples, score_choices, task_rows
from kv import compressed
from model import KVCache, Transformer
from scorers import method as made
from sdtp import dense, pruned
from tokenizer import Tokenizer

SCHEDULE = {1: 0.7, 2: 0.45}
LONG = "too long for the model: " + "0123456789" * 5
QUESTIONS = [  # context, continuation
    ("is it so? answer:", " yes"),
    ("is it so? answer:", " no"),
    ("is it so? answer:", "!"),
    ("a space at the end ", "x"),
    ("", "without a context"),
    ("<s>begins with bos", " z"),
    (LONG, " abc"),
    (LONG, "f"),
]


def ask(kind, pairs):
    return [Instance(kind, {}, pair, 0, ("task", i, 1)) for i, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(our model, our tokenizer, the harness's hf model) of one folder."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("ckpt") / "tiny")
    reference = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return Transformer.from_pretrained(folder, torch.float32), Tokenizer(folder), reference


def test_dense_is_the_harness_hf_model(both):
    """Log-likelihoods and greedy flags, some of a greedy continuation, some of a shortened text."""
    reference, lm, how = both[2], HarnessLM(*both[:2]), {"until": [], "max_gen_toks": 3}
    (greedy,) = reference.generate_until(ask("generate_until", [("is it so? answer:", how)]))
    requests = ask("loglikelihood", [*QUESTIONS, ("is it so? answer:", greedy)])
    expected, found = reference.loglikelihood(requests), lm.loglikelihood(requests)
    assert [n for n, _ in found] == pytest.approx([n for n, _ in expected], abs=1e-4)
    assert [flag for _, flag in found] == [flag for _, flag in expected] and found[-1][1]
    assert len(lm.examples) == 6 and max(len(e.prompt) for e in lm.examples) == 64
    with pytest.raises(ValueError, match="a choice of 70 tokens is beyond 64 positions"):
        lm.loglikelihood(ask("loglikelihood", [("is it so?", "1234567890" * 7)]))


METHODS = {
    "dense": dense,
    "sdtp": pruned(heads_of(SCHEDULE), SCHEDULE),
    "sdtp+h2o": compressed(pruned(heads_of(SCHEDULE), SCHEDULE), "h2o", 0.3),
    "gemfilter": made("gemfilter", {0: 0.5}),
}


@pytest.mark.parametrize("name", METHODS)
def test_choices_are_scored_exactly(name):
    """By one prefill, as by one for each choice whose tokens are then fed one by one."""
    model, prompt, calls = tiny.build(), tiny.ids(40), []
    choices = [tiny.ids(m, seed=m).tolist() for m in (1, 5, 2, 5, 1)]
    method = lambda *given: calls.append(1) or METHODS[name](*given)  # noqa: E731
    found = score_choices(model, Example(prompt.tolist(), choices), method)["answers"]
    assert calls == [1]
    for choice, (nats, greedy) in zip(choices, found, strict=True):
        total, best, cache = 0.0, True, KVCache(len(model.layers))
        logits = METHODS[name](model, prompt, [40], cache)
        position = torch.tensor([20 if name == "gemfilter" else 40])  # that reads a shorter prompt
        for token in choice:
            total += logits.log_softmax(-1)[0, token].item()
            best = best and int(logits.argmax()) == token
            logits = model(torch.tensor([token]), position, [1], cache)
            position = position + 1
        assert nats == pytest.approx(total, abs=1e-5) and greedy == best


def write_rows(folder, n=12):
    """The local files of both sets, with n rows."""
    boolq = [{"question": f"is {i} a", "passage": f"p{i}.", "answer": i % 3 == 0} for i in range(n)]
    piqa = [{"goal": f"g{i}", "sol1": f"one {i}", "sol2": f"two {i * i}"} for i in range(n)]
    for name, rows in (("boolq_val", boolq), ("piqa_valid", piqa)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa_valid-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(n)))
    return folder


def test_labels_of_boolq(tmp_path):
    """Every form in which BoolQ's file goes around; the string "false" must not be true."""
    for field, no, yes in (("answer", False, True), ("label", "False", "True")):
        for values in ((no, yes), (yes, "false")):
            rows = [{"question": "q\u2028", "passage": "p", field: value} for value in values]
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            (tmp_path / "boolq_val.jsonl").write_text(text)
            if values == (no, yes):
                assert [row["label"] for row in local_rows(tmp_path, "boolq")] == [0, 1]
        with pytest.raises(ValueError, match="boolq_val.jsonl does not hold the rows of boolq"):
            local_rows(tmp_path, "boolq")


def test_local_tasks_are_the_harness_own(tmp_path, both):
    """Prompts and choices by hand; shots are other rows of the file, and differ between rows."""
    tasks, shots = load_tasks(["boolq", "piqa"], write_rows(tmp_path, 6), 4), set()
    for name, pattern in (("boolq", r"is (\d)"), ("piqa", r"g(\d)")):
        samples(name, tasks[name], HarnessLM(*both[:2]), None)
        for i in range(6):
            requests = [r for r in tasks[name].instances if r.doc_id == i]
            wanted = f"p{i}.\nQuestion: is {i} a?\nAnswer:", [" no", " yes"]
            if name == "piqa":
                wanted = f"Question: g{i}\nAnswer:", [f" one {i}", f" two {i * i}"]
            *before, last = requests[0].args[0].split("\n\n")
            assert (last, [r.args[1] for r in requests]) == wanted
            asked = [int(re.search(pattern, shot)[1]) for shot in before]
            assert len(set(asked)) == 4 and i not in asked
            shots.add((name, *asked))
    assert len(shots) > 4


def test_rows_by_hand(tmp_path, both, monkeypatch):

    def contrary(model, example, method):
        """Dense says no; pruned, the other choice: no method has dense's score by chance."""
        cache, n = KVCache(3), len(example.prompt)
        method(model, torch.tensor(example.prompt), [n], cache)
        return {"answers": [[1, False], [0 if cache.alive[-1][0] == n else 2, True]]}

    monkeypatch.setattr(eval_harness, "score_choices", contrary)
    task = load_tasks(["boolq"], write_rows(tmp_path))["boolq"]
    lm = HarnessLM(*both[:2], ["sdtp", "most_recent"], {"": (heads_of(SCHEDULE), SCHEDULE, 1)})
    rows = task_rows("boolq", task, lm, limit=7)
    assert [r["method"] for r in rows] == ["dense", "sdtp", "most_recent"]
    n = len(both[1].encode("p0.\nQuestion: is 0 a?\nAnswer:"))
    for row, accuracy in zip(rows, (4 / 7, 3 / 7, 3 / 7)):
        assert (row["documents"], row["metric"], row["prompt_tokens"]) == (7, "acc", n)
        assert row["score"] == row["metrics"]["acc,none"] == accuracy and row["num_fewshot"] == 0
        assert row["diff"] == pytest.approx(accuracy - 4 / 7)
        assert row["low"] <= row["diff"] <= row["high"] and row["prefill_speedup"] > 0
    assert rows[0]["flops_share"] == rows[0]["mean_alive"] == 1 > rows[1]["mean_alive"]


def test_script_goes_on(tmp_path, monkeypatch):
    sizes = dict(num_hidden_layers=5, max_position_embeddings=128)
    checkpoint_with_heads(tmp_path, {"heads/tiny": SCHEDULE}, **sizes)
    monkeypatch.chdir(write_rows(tmp_path))
    flags = "--ckpt tiny --data_dir . --limit 5 --methods sdtp,random --keep 0.9"
    flags += f" --num_fewshot 2 --json {tmp_path}/r.json"
    path = tmp_path / "rows.jsonl"

    def run():
        monkeypatch.setattr(sys, "argv", f"eval_harness.py {flags} --rows {path}".split())
        cli.run(eval_harness.main)
        return [r | {"prefill_speedup": 0} for r in json.loads((tmp_path / "r.json").read_text())]

    expected, whole = run(), path.read_text().splitlines(keepends=True)
    order = [(task, m) for task in ("boolq", "piqa") for m in ("dense", "sdtp", "random")]
    assert [(r["task"], r["method"]) for r in expected] == order
    assert {r["num_fewshot"] for r in expected} == {2} and expected[1]["mean_alive"] < 1
    path.write_text("".join(whole[:12]) + '{"key": "torn')  # as if killed there
    assert run() == expected
    after = path.read_text().splitlines(keepends=True)
    assert after[:12] == whole[:12] and len(cli.Results(path)) == len(after) == 2 * 5 * 3


def test_tasks_of_the_hub(monkeypatch):
    """One that lm-eval does not know, or whose answers are generated, is refused by name."""
    found = {"gsm8k": {"tasks": {"gsm8k": SimpleNamespace(OUTPUT_TYPE="generate_until")}}}
    manager = SimpleNamespace(load=lambda names: found[names[0]])  # KeyError, as the harness's
    monkeypatch.setattr(eval_harness, "TaskManager", lambda: manager)
    for name, message in (("magic", "--tasks magic"), ("gsm8k", "gsm8k: generate_until, only")):
        with pytest.raises(ValueError, match=message):
            load_tasks([name])
