"""eval_harness.py against the harness's own transformers model, on one checkpoint folder."""

import json
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import cli
import eval_harness
import eval_tasks
from data import Example
from eval_harness import HarnessLM, choices_results, load_tasks, local_rows, samples, task_rows
from eval_tasks import Results, policy, score
from kv import Compression
from model import Transformer
from sdtp import PruneHead, Schedule, generate, save_heads
from tokenizer import Tokenizer

SCHEDULE = Schedule(3, {1: 0.7, 2: 0.45})
QUESTIONS = [  # context, continuation
    ("is it so? answer:", " yes"),
    ("is it so? answer:", " no"),
    ("is it so? answer:", "!"),
    ("a space at the end ", "x"),
    ("", "without a context"),
    ("", " y"),
    ("<s>begins with bos", " z"),
    ("too long for the model: " + "0123456789" * 5, " abc"),
    ("too long for the model: " + "0123456789" * 5, " de"),
    ("too long for the model: " + "0123456789" * 5, "f"),
    ("is it not? answer:", " no"),
]


def heads():
    torch.manual_seed(0)
    return {layer: PruneHead(32) for layer in SCHEDULE}


def ask(kind, arguments):
    return [Instance(kind, {}, arguments=a, idx=i, metadata=("task", i, 1)) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(our model, our tokenizer, the harness's hf model) of one folder."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("ckpt") / "tiny")
    reference = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return Transformer.from_pretrained(folder, torch.float32), Tokenizer(folder), reference


@pytest.mark.parametrize("batch_size", [1, 3])
def test_dense_is_the_harness_hf_model(both, batch_size):
    """Log-likelihoods and greedy flags of every kind of request, some greedy, and of whole texts, longer than the model too."""
    model, tokenizer, reference = both
    lm = HarnessLM(model, tokenizer, batch_size=batch_size)
    (greedy,) = lm.generate_until(ask("generate_until", [("is it so? answer:", {"until": [], "max_gen_toks": 3})]))
    requests = ask("loglikelihood", [*QUESTIONS, ("is it so? answer:", greedy)])
    expected, found = reference.loglikelihood(requests), lm.loglikelihood(requests)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [flag for _, flag in found] == [flag for _, flag in expected] and found[-1][1]
    assert len({len(e.prompt) for e in lm.examples}) > 4 and max(len(e.prompt) for e in lm.examples) == 64
    texts = ask("loglikelihood_rolling", [("some text",), ("a longer text than it can hold. " * 5,)])
    assert lm.loglikelihood_rolling(texts) == pytest.approx(reference.loglikelihood_rolling(texts), abs=1e-3)


def test_dense_generates_as_the_harness_hf_model(both):
    """Greedy texts up to stop strings of one token and of several; contexts that leave too little room lose their beginning."""
    model, tokenizer, reference = both
    contexts = ["question: why? answer:", "is it so?", "0123456789" * 7]
    lm = HarnessLM(model, tokenizer, batch_size=2)
    free = lm.generate_until(ask("generate_until", [(c, {"until": [], "max_gen_toks": 20}) for c in contexts]))
    assert len(free[2]) > 9
    for until in ([free[2][6]], [free[2][5:8], free[2][7:10]], free[2][6], [], None):
        how = {"max_gen_toks": 20, "do_sample": False} | ({} if until is None else {"until": until})
        requests = ask("generate_until", [(c, how) for c in contexts])
        assert lm.generate_until(requests) == reference.generate_until(requests)
    with pytest.raises(ValueError, match="greedy"):
        lm.generate_until(ask("generate_until", [("a", {"do_sample": True, "temperature": 1.0})]))


def test_a_token_with_a_stop_string_ends_a_generation(both):
    """Nothing is decoded beyond a stop string that one token holds."""
    model, tokenizer, _ = both
    context, calls, forward = "0123456789" * 7, [], model.forward
    (ids,) = generate(model, torch.tensor(tokenizer.encode(context)[-44:]), 20)
    stop = tokenizer.decode(ids)[6]
    model.forward = lambda *a, **more: calls.append(1) or forward(*a, **more)
    try:
        requests = ask("generate_until", [(context, {"until": [stop], "max_gen_toks": 20})])
        assert HarnessLM(model, tokenizer).generate_until(requests) == [tokenizer.decode(ids).split(stop)[0]]
    finally:
        del model.forward
    wanted = next(i for i, t in enumerate(ids) if tokenizer.decode([t]) == stop)
    assert len(calls) == 2 * wanted < 38  # the first token is the prefill's; a warm-up runs before


def test_pruned_choices_are_scored_exactly():
    """Each continuation's sum is that of eval_tasks.score() of it alone, though the prompt is read once; ragged batches too."""
    model, ranker = tiny.build(), heads()
    prompts = [tiny.ids(n).tolist() for n in (30, 41, 24)]
    lengths = [(1, 5, 2), (1,), (3, 1)]
    examples = [
        Example(p, [tiny.ids(m, seed=n).tolist() for n, m in enumerate(part)]) for p, part in zip(prompts, lengths)
    ]
    for rankers, stages, kv in (
        (None, None, None),
        (ranker, SCHEDULE, None),
        (ranker, SCHEDULE, Compression("h2o", 0.3)),
    ):
        single = [result for e in examples for result in choices_results(model, [e], rankers, stages, kv)]
        batch = choices_results(model, examples, rankers, stages, kv)
        for example, one, result in zip(examples, single, batch, strict=True):
            expected = [score(model, [Example(example.prompt, c)], rankers, stages, kv) for c in example.response]
            nats = [-n.sum().item() for (n,), _, _ in expected]
            for found in (one, result):
                assert [a for a, _ in found["answers"]] == pytest.approx(nats, abs=1e-5)
                assert found["alive"] == expected[0][1][0] and found["seconds"] > 0


def test_one_prefill_for_all_choices(monkeypatch):
    """Five choices of a question cost one prefill, and single tokens no further forward."""
    model, calls, prefill = tiny.build(), [], eval_harness.prefill
    monkeypatch.setattr(eval_harness, "prefill", lambda *a: calls.append("prefill") or prefill(*a))
    monkeypatch.setattr(model, "forward", lambda *a: calls.append("forward"))
    choices_results(model, [Example(tiny.ids(20).tolist(), [[t] for t in range(5)])])
    assert calls == ["prefill"]


def test_shares_of_one_are_dense(both):
    """Pruning that keeps everything gives the dense answers, through the pruning path."""
    model, tokenizer, _ = both
    lm = HarnessLM(model, tokenizer, ["sdtp", "most_recent"], Schedule(3, {1: 1.0, 2: 1.0}), heads())
    requests, found = ask("loglikelihood", QUESTIONS), {}
    for lm.which in [(0.0, method) for method in ("dense", "sdtp", "most_recent")]:
        found[lm.which[1]] = lm.loglikelihood(requests)
    assert found["sdtp"] == found["most_recent"] == found["dense"]


# ---------------------------------------------------------------------------- tasks


def write_rows(folder, n=12):
    """The local files of both sets, with n rows."""
    boolq = [{"question": f"is {i} a", "passage": f"p{i}.", "answer": i % 3 == 0, "title": "t"} for i in range(n)]
    piqa = [{"goal": f"g{i}", "sol1": f"one {i}", "sol2": f"two {i * i}"} for i in range(n)]
    for name, rows in (("boolq_val", boolq), ("piqa_valid", piqa)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa_valid-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(n)))
    return folder


@pytest.mark.parametrize(
    "form", [{"answer": (False, True)}, {"label": (False, True)}, {"label": ("False", "True")}], ids=str
)
def test_labels_of_boolq(tmp_path, form):
    """Every form in which BoolQ's file goes around; anything else is refused, as the string "false" must not be true."""
    ((field, values),) = form.items()

    def write(values):
        rows = [json.dumps({"question": "q\u2028", "passage": "p", field: v}, ensure_ascii=False) for v in values]
        (tmp_path / "boolq_val.jsonl").write_text("\n".join(rows))

    write(values)
    assert [row["label"] for row in local_rows(tmp_path, "boolq")] == [0, 1]
    write([*values, "maybe"])
    with pytest.raises(ValueError, match="boolq_val.jsonl does not hold the rows of boolq"):
        local_rows(tmp_path, "boolq")


def test_local_tasks_are_the_harness_own(tmp_path, both):
    """Prompts and choices as the harness's yaml has them, by hand; shots are other rows of the file, and differ between rows."""
    model, tokenizer, _ = both
    tasks, lm = load_tasks(["boolq", "piqa"], write_rows(tmp_path, 6), 4), HarnessLM(model, tokenizer)
    for name, choices in (("boolq", [" no", " yes"]), ("piqa", None)):
        samples(name, tasks[name], lm, None)
        shots = []
        for i in range(6):
            requests = [r for r in tasks[name].instances if r.doc_id == i]
            (context,) = {r.args[0] for r in requests}
            own = {"boolq": f"p{i}.\nQuestion: is {i} a?\nAnswer:", "piqa": f"Question: g{i}\nAnswer:"}[name]
            assert [r.args[1] for r in requests] == (choices or [f" one {i}", f" two {i * i}"])
            *before, last = context.split("\n\n")
            asked = [int(re.search({"boolq": r"is (\d)", "piqa": r"g(\d)"}[name], shot)[1]) for shot in before]
            assert last == own and len(set(asked)) == 4 and i not in asked
            answers = {
                n: {"boolq": "no" if n % 3 else "yes", "piqa": [f"one {n}", f"two {n * n}"][n % 2]}[name] for n in asked
            }
            assert [shot.rsplit("Answer: ")[1] for shot in before] == list(answers.values())
            shots.append(asked)
        assert len({tuple(s) for s in shots}) > 1


def test_rows_by_hand(tmp_path, both, monkeypatch):
    """Every figure follows from the answers of each choice; methods cost what eval_tasks.policy() gives them at the median prompt."""
    model, tokenizer, _ = both

    def contrary(model, examples, rankers=None, schedule=None, kv=None):
        """Pruned, the other choice: no method has dense's score by chance."""
        results = choices_results(model, examples, rankers, schedule)
        sign = -1 if schedule else 1
        return [r | {"answers": [[sign * nats, greedy] for nats, greedy in r["answers"]]} for r in results]

    monkeypatch.setattr(eval_harness, "choices_results", contrary)
    task = load_tasks(["boolq"], write_rows(tmp_path), -1)["boolq"]
    assert task.get_config("num_fewshot") == 0  # the task does not say
    lm = HarnessLM(model, tokenizer, ["sdtp", "most_recent"], SCHEDULE, heads(), batch_size=2)
    rows, n = task_rows("boolq", task, lm, limit=7), len(tokenizer.encode("p0.\nQuestion: is 0 a?\nAnswer:"))
    right = {}
    for row in rows:
        stages = policy(row["method"], model.config, SCHEDULE, heads(), n)
        lm.which = 0.0, row["method"]
        answers = lm.loglikelihood(task.instances)
        right[row["method"]] = [(answers[2 * i][0] < answers[2 * i + 1][0]) == (i % 3 == 0) for i in range(7)]
        accuracy = sum(right[row["method"]]) / 7
        alive = sum(stages.alive(n)) / 3 / n if stages else 1
        assert (row["documents"], row["metric"], row["prompt_tokens"]) == (7, "acc", n)
        assert row["score"] == row["whole"]["acc"] == accuracy
        assert row["diff"] == pytest.approx(accuracy - sum(right["dense"]) / 7)
        assert row["low"] <= row["diff"] <= row["high"] and row["prefill_speedup"] > 0
        assert row["mean_alive"] == pytest.approx(alive) and row["compression"] == pytest.approx(1 / alive)
    assert rows[0]["score"] != rows[1]["score"]
    assert [r["method"] for r in rows] == ["dense", "sdtp", "most_recent"]
    assert rows[0]["flops_share"] == 1 > rows[1]["flops_share"] == pytest.approx(rows[2]["flops_share"], abs=0.03)


def test_script_goes_on(tmp_path, monkeypatch, capsys):
    """A run killed in the middle goes on: every row once, the same scores; the table names the shots."""
    folder = tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=5, max_position_embeddings=128)
    model = Transformer.from_pretrained(folder, torch.float32)
    save_heads(tmp_path / "heads", heads(), model, Schedule(5, SCHEDULE))
    write_rows(tmp_path)
    flags = f"--ckpt {folder} --heads {tmp_path}/heads --tasks boolq,piqa --data_dir {tmp_path} --num_fewshot 2 --limit 5 --methods dense,sdtp,sdtp_adaptive --keep 0.9,0.8 --dtype float32 --json {tmp_path}/r.json"

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["eval_tasks.py", *flags.split(), *more])
        cli.run(eval_tasks.main)
        rows = json.loads((tmp_path / "r.json").read_text())
        assert all(row.pop("prefill_speedup") > 0 and row.pop("command") for row in rows)
        return rows

    expected, out = run(), capsys.readouterr().out
    order = [(t, k, m) for t in ("boolq", "piqa") for k in (0.9, 0.8) for m in ("dense", "sdtp", "sdtp_adaptive")]
    assert [(r["task"], r["keep"], r["method"]) for r in expected] == order
    assert "boolq, 2 shots" in out and out.count("not the paper's shots") == 2 and out.count("mean of 2") == 6
    add, path, added = Results.add, tmp_path / "rows.jsonl", []

    def killed(self, result):
        if len(added) == 12:
            raise KeyboardInterrupt
        added.append(1)
        add(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", killed)
        with pytest.raises(SystemExit):
            run("--rows", str(path))
    before = path.read_text()
    with open(path, "a") as file:
        file.write('{"key": "torn')
    assert len(before.splitlines()) == 12 and run("--rows", str(path)) == expected
    after, keys = path.read_text(), [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert after.startswith(before) and len(set(keys)) == len(keys) == 2 * 5 * 5  # dense is one of both budgets


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tasks magic", "--tasks magic: choose ppl, needle or tasks of lm-eval"),
        ("--tasks copa --data_dir .", "--tasks copa: --data_dir has boolq and piqa"),
        ("--tasks boolq --data_dir nowhere", "nowhere/boolq_val.jsonl does not exist"),
        ("--tasks piqa --data_dir .", "piqa_valid.jsonl does not hold the rows of piqa"),
        ("--tasks boolq --data_dir . --methods teacher", "ranks by the loss of one response"),
        ("--tasks boolq --data_dir . --methods teacher_late", "ranks by the loss of one response"),
        ("--tasks boolq --data_dir . --text t.txt", "not from --text or --data"),
    ],
)
def test_script_mistakes(tmp_path, monkeypatch, flags, message):
    """A user's mistake ends in one line that names it."""
    write_rows(tmp_path, 3)
    (tmp_path / "piqa_valid-labels.lst").write_text("1\n0\n")
    monkeypatch.chdir(tmp_path)
    more = "" if "--methods" in flags else " --methods dense"
    monkeypatch.setattr(sys, "argv", ["eval_tasks.py", *(flags + more).split()])
    with pytest.raises(SystemExit, match=message):
        cli.run(eval_tasks.main)


def test_without_lm_eval(monkeypatch):
    """One line that names the package, in the version that requirements-dev.txt has."""
    monkeypatch.delitem(sys.modules, "eval_harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["eval_tasks.py", "--tasks", "boolq", "--methods", "dense"])
    pinned = re.search(
        r"^lm-eval==\S+", (Path(cli.__file__).parent / "requirements-dev.txt").read_text(), re.MULTILINE
    )[0]
    with pytest.raises(SystemExit, match=f"pip install {pinned}$"):
        cli.run(eval_tasks.main)
