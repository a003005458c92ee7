"""LongBench (Bai et al. 2023, arXiv 2308.14508) as its own scripts run and score it.

python eval_longbench.py --data DIR --methods dense,sdtp     # DIR: the official DATASET.jsonl files
python eval_longbench.py --methods dense,sdtp                # data.zip from the Hugging Face hub

Prompts, lengths of answers and metrics are those of github.com/THUDM/LongBench (MIT License,
Copyright (c) 2023 THU-KEG & Zhipu AI), quirks included. Predictions, dense and pruned, land in
OUT_DIR/pred/METHOD/DATASET.jsonl, one line as soon as it is there; LongBench's eval.py scores them
too. The same command again goes on with a run that was stopped.
"""

import difflib
import json
import logging
import re
import statistics
import string
import sys
import warnings
import zipfile
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from tqdm import tqdm

import cli
import eval_tasks
import parallel
from checkpoint import read_json
from cli import clock
from data import Example
from download import DEFAULT
from saliency import identity
from sdtp import generate
from tokenizer import Tokenizer

try:
    import jieba
    from rouge import Rouge

    with warnings.catch_warnings(action="ignore"):  # that it runs without python-Levenshtein
        from fuzzywuzzy import fuzz
except ImportError as error:
    raise SystemExit(f"eval_longbench.py: {error}: pip install -r requirements-dev.txt") from None

fuzz.SequenceMatcher = difflib.SequenceMatcher  # python-Levenshtein, if there, rounds otherwise
jieba.setLogLevel(logging.WARNING)


@dataclass
class LongBenchConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folders of trained heads, with commas (default: heads/CKPT)
    data: str = ""  # folder of official DATASET.jsonl files, or a data.zip (default: the hub's)
    datasets: str = ""  # with commas (default: all 21)
    methods: str = "dense,sdtp,most_recent,last_attention"  # NAME or NAME+h2o, at equal FLOPs
    keep: float = 0.0  # FLOPs of the paper's stages with that share (0: the heads' own)
    limit: int = 0  # the first rows of each set (0: all)
    max_length: int = 0  # longer prompts lose their middle (0: what the model's positions leave)
    out_dir: str = "out/longbench"  # predictions and scores
    seed: int = 0  # of method random
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the table's rows (default: OUT_DIR/scores.json)


# -------------------------------------------- metrics: (prediction, answer, classes) -> 0 to 1


def f1(prediction, answer):
    """Of two lists of words, as multisets."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction, answer, classes=None):
    return f1(words(prediction), words(answer))


def qa_f1_zh(prediction, answer, classes=None):
    return f1(words_zh(prediction), words_zh(answer))


def words(text):
    """Lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


PUNCTUATION_ZH = string.punctuation + (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def words_zh(text):
    """jieba's words, lower case, without punctuation."""
    cut = ("".join(c for c in word.lower() if c not in PUNCTUATION_ZH) for word in jieba.cut(text))
    return [word for word in ("".join(part.split()) for part in cut) if word]


def rouge_l(prediction, answer, classes=None, callers=2):
    """ROUGE-L F of the package `rouge`; an exception, of a text empty or too long for it, scores 0.

    callers: Python calls between the published script's first line and get_scores(). That recurses
    once a word: the limit is moved to leave it the room that it has there.
    """
    limit, depth, frame = sys.getrecursionlimit(), 0, sys._getframe()
    while frame := frame.f_back:
        depth += 1
    try:
        sys.setrecursionlimit(1000 + depth - callers)
        return Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


def rouge_l_zh(prediction, answer, classes=None):
    return rouge_l(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(answer)), callers=3)


def classification(prediction, answer, classes):
    """1 / number of the classes found in the prediction, if the answer is one of them."""
    found = [name for name in classes if name in prediction]
    for name in found:  # losing items on the way, it skips the one after: published so, kept so
        if name in answer and name != answer:
            found.remove(name)
    return 1 / len(found) if answer in found else 0.0


def count(prediction, answer, classes=None):
    """Share of the prediction's numbers that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction, answer, classes=None):
    return count(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_zh(prediction, answer, classes=None):
    return count(prediction, re.findall(r"段落(\d+)", answer)[0])


def code_similarity(prediction, answer, classes=None):
    """Edit similarity of the first line that looks like neither a comment nor a fence."""
    lines = prediction.lstrip("\n").split("\n")
    code = [line for line in lines if not re.search("`|#|//", line)]
    return fuzz.ratio(code[0] if code else "", answer) / 100


# ---------------------------------------------------------------------------- the sets

Set = namedtuple("Set", "category max_new_tokens metric")  # category: of the paper's 14 sets
SETS = {
    "narrativeqa": Set("Single", 128, qa_f1),
    "qasper": Set("Single", 128, qa_f1),
    "multifieldqa_en": Set("Single", 64, qa_f1),
    "multifieldqa_zh": Set(None, 64, qa_f1_zh),
    "hotpotqa": Set("Multi", 32, qa_f1),
    "2wikimqa": Set("Multi", 32, qa_f1),
    "musique": Set("Multi", 32, qa_f1),
    "dureader": Set(None, 128, rouge_l_zh),
    "gov_report": Set("Summ", 512, rouge_l),
    "qmsum": Set("Summ", 512, rouge_l),
    "multi_news": Set("Summ", 512, rouge_l),
    "vcsum": Set(None, 512, rouge_l_zh),
    "trec": Set("FewShot", 64, classification),
    "triviaqa": Set("FewShot", 32, qa_f1),
    "samsum": Set("FewShot", 128, rouge_l),
    "lsht": Set(None, 64, classification),
    "passage_count": Set(None, 32, count),
    "passage_retrieval_en": Set(None, 32, retrieval),
    "passage_retrieval_zh": Set(None, 32, retrieval_zh),
    "lcc": Set("Code", 64, code_similarity),
    "repobench-p": Set("Code", 64, code_similarity),
}
NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # without the chat template
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # scored by the first line of the prediction
OFFICIAL = ("answers", "all_classes", "length")  # fields of a row that a prediction repeats
PROMPTS = read_json(Path(__file__).with_name("longbench_prompts.json"))
RETOKENIZED = 16  # positions spared for what a prompt gains by being cut as text (8 at most in 683)


def score(dataset, prediction, answers, classes):
    """0 to 1: the best over the answers."""
    if dataset in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    scores = [SETS[dataset].metric(prediction, answer, classes) for answer in answers]
    return max(scores, default=0.0)


def read_rows(data, dataset, limit=0):
    """The first rows of DATASET.jsonl in `data`, a Path to a folder or a data.zip, as dicts.

    FileNotFoundError or ValueError names the file.
    """
    path = data / f"{dataset}.jsonl"
    try:
        if data.suffix == ".zip":
            with zipfile.ZipFile(data) as file:
                content = file.read(f"data/{dataset}.jsonl")
        else:
            content = path.read_bytes()
        rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    except (FileNotFoundError, KeyError):
        raise FileNotFoundError(f"{path} does not exist: see --data and --datasets") from None
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not readable: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no row")
    for number, row in enumerate(rows, 1):
        fields = ("input", "context", *OFFICIAL)
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if not missing and SETS[dataset].metric is classification and not row["all_classes"]:
            missing = ["all_classes"]
        if missing:
            raise ValueError(f"{path}: row {number} has no {missing[0]!r}")
    return rows[: limit or None]


# ---------------------------------------------------------------------------- prompts


def chat(tokenizer, prompt):
    """The prompt in the checkpoint's chat template, if it has one."""
    if tokenizer.chat_template is None:
        return prompt
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}])


def prompt_ids(tokenizer, dataset, row, max_length):
    """Token ids of a row's prompt, cut in the middle before the chat template comes on."""
    prompt = PROMPTS[dataset].format(**row)
    ids = tokenizer.encode(prompt)
    if len(ids) > max_length:
        half = max_length // 2
        prompt = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
    return tokenizer.encode(prompt if dataset in NO_CHAT else chat(tokenizer, prompt))


def check_max_length(config, model, tokenizer, datasets):
    """Resolve --max_length 0: positions less the longest answer of all sets and the template."""
    template = len(tokenizer.encode(chat(tokenizer, "")))
    room = model.config.max_position_embeddings - template - RETOKENIZED
    config.max_length = config.max_length or room - max(s.max_new_tokens for s in SETS.values())
    most = room - max(SETS[d].max_new_tokens for d in datasets)
    if not 2 <= config.max_length <= most:
        where = "the model's positions leave 2 to"
        raise ValueError(f"--max_length {config.max_length}: {where} {most} for these sets")


def read_prompts(config, model, tokenizer, dataset, rows):
    """An Example without a response for each row. ValueError where the answer has no room."""
    examples, limit = [], model.config.max_position_embeddings
    for number, row in enumerate(rows, 1):
        ids = prompt_ids(tokenizer, dataset, row, config.max_length)
        if len(ids) + SETS[dataset].max_new_tokens > limit:
            where = f"{dataset}, row {number}: {len(ids)} tokens after the cut"
            raise ValueError(f"{where} are too many, lower --max_length {config.max_length}")
        examples.append(Example(ids, []))
    return examples


# ---------------------------------------------------------------------------- predictions


def answer(tokenizer, dataset, model, prompt, method):
    """The greedy answer to a prompt (ids) as a method reads it: pred, new_tokens, total_seconds."""
    size, stops, least = SETS[dataset].max_new_tokens, list(tokenizer.eos_token_ids), 0
    if dataset == "samsum":  # the model would go on with the next dialogue
        stops.append(tokenizer.encode("\n", add_special_tokens=False)[-1])
        least = 1
    ids, start = torch.tensor(prompt, device=model.device), clock(model)
    (output,) = generate(model, ids, size, method, eos_token_ids=stops, min_new_tokens=least)
    costs = {"new_tokens": len(output), "total_seconds": clock(model) - start}
    return {"pred": tokenizer.decode(output), **costs}


def open_results(config, dataset, method, keys):
    """The Results of a method's rows of a set; ValueError where the file holds others."""
    folder = Path(config.out_dir) / "pred" / method.replace(":", "-")
    results = cli.Results(folder / f"{dataset}.jsonl")
    if results.keys() - set(keys):
        what = "predictions of other rows, heads, weights or flags"
        raise ValueError(f"{results.path} holds {what}: choose another --out_dir")
    return results


def predict(config, model, tokenizer, dataset, rows, examples, plans):
    """{method: [its record of each row]} of a set; what its file does not hold yet is run.

    rows, examples: read_rows() and read_prompts(); plans: {method: eval_tasks.Plan}. A record has
    LongBench's fields, those of answer() and eval_tasks.measured(), and its score, 0 to 100.
    """
    base = [dataset, *identity(model), model.device.type]
    keys, results, records = {}, {}, {method: [] for method in plans}
    for method, plan in plans.items():
        own = config.seed if plan.name == "random" else plan.heads and eval_tasks.digest(plan.heads)
        numbered = enumerate(examples)
        keys[method] = [eval_tasks.result_key([*base, i], plan, own, e) for i, e in numbered]
        results[method] = open_results(config, dataset, method, keys[method])
    for i, example in tqdm(parallel.mine([*enumerate(examples)]), desc=dataset, disable=None):
        official = {field: rows[i][field] for field in OFFICIAL}
        for method, plan in plans.items():
            key, notes = keys[method][i], {}
            if key not in results[method]:
                run = eval_tasks.measured(plan.method(key=key), plan.heads, notes)
                found = answer(tokenizer, dataset, model, example.prompt, run)
                more = {"key": key, "row": i, "prompt_tokens": len(example.prompt), **notes}
                results[method].add({**found, **official, **more})
            record = results[method][key]
            value = score(dataset, record["pred"], record["answers"], record["all_classes"])
            records[method].append({**record, "score": 100 * value})
    return {method: parallel.joined(part, len(rows)) for method, part in records.items()}


# ---------------------------------------------------------------------------- the table


def groups(datasets):
    """{name: sets}: each set, the paper's categories and its AVG where complete, and all."""
    found = {d: [d] for d in datasets}
    for name in ("Single", "Multi", "Summ", "FewShot", "Code", "AVG"):
        sets = [d for d, s in SETS.items() if s.category == name or (name == "AVG" and s.category)]
        if set(sets) <= set(datasets):
            found[name] = sets
    return found | {"all": datasets}


def summary(name, method, sets, records):
    """A row of the table: a method in a group of sets; records: {dataset: {method: its records}}.

    score: 0 to 100, mean over the sets; diff, low, high: less dense's, by cli.paired_interval(), in
    which a row has the weight that it has in the score; and eval_tasks.costs().
    """
    found, base = ([r for d in sets for r in records[d][m]] for m in (method, "dense"))
    weights = [1 / len(records[d][method]) for d in sets for _ in records[d][method]]
    values = [[r["score"] * w for r, w in zip(side, weights)] for side in (found, base)]
    means = [np.mean([r["score"] for r in records[d][method]]) for d in sets]
    lens = [r["prompt_tokens"] for r in found]
    return {
        "set": name,
        "method": method,
        "n": len(found),
        "score": float(np.mean(means)),
        **dict(zip(("diff", "low", "high"), cli.paired_interval(*values, weights))),
        "prompt_tokens": sum(lens) / len(lens),
        **eval_tasks.costs(found, base, lens),
        "total_seconds": sum(r["total_seconds"] for r in found) / len(found),
    }


def table(records, datasets):
    """Rows for every group and method; records: {dataset: {method: its records}}."""
    rows = []
    for name, sets in groups(datasets).items():
        for method in records[sets[0]]:
            if all(method in records[d] for d in sets):  # one may be left out of a set
                rows.append(summary(name, method, sets, records))
    return rows


COLUMNS = {
    "set": "{set}",
    "method": "{method}",
    "n": "{n}",
    "score": "{score:.2f}",
    "diff": "{diff:+.2f}",
    "95 %": "[{low:+.1f}, {high:+.1f}]",
    "tokens": "{prompt_tokens:.0f}",
    **{name: eval_tasks.OTHERS[name] for name in ("mean alive", "1/tau", "FLOPs", "prefill")},
    "total s": "{total_seconds:.3f}",
}


# ---------------------------------------------------------------------------- the command


def chosen(config):
    """(methods, datasets) of the flags. ValueError names an unknown one, or flags out of range."""
    cli.at_least(0, config, "limit", "max_length")
    methods = config.methods.split(",")
    names = {eval_tasks.parse(method)[0] for method in methods}
    if "teacher" in names:
        raise ValueError("method teacher ranks by the loss of a given response: LongBench has none")
    eval_tasks.check_one_budget(config, names)
    datasets = list(dict.fromkeys(config.datasets.split(","))) if config.datasets else list(SETS)
    for dataset in datasets:
        if dataset not in SETS:
            raise ValueError(f"unknown dataset {dataset!r} (known: {', '.join(SETS)})")
    return methods, datasets


def mention_penalty(folder):
    """Say so where generation_config.json asks for a repetition penalty: none is applied."""
    path = folder / "generation_config.json"
    penalty = path.is_file() and read_json(path).get("repetition_penalty")
    if penalty and penalty != 1:
        print(f"{path}: repetition_penalty {penalty} is not applied, decoding is greedy")


def main():
    config = cli.parse(LongBenchConfig, __doc__)
    methods, datasets = chosen(config)
    data = Path(config.data or hf_hub_download("THUDM/LongBench", "data.zip", repo_type="dataset"))
    rows, records = {d: read_rows(data, d, config.limit) for d in datasets}, {}
    model, folder = cli.load_model(config)
    tokenizer = Tokenizer(folder)
    mention_penalty(folder)
    stages = cli.given_stages(config, model, methods)
    check_max_length(config, model, tokenizer, datasets)
    print(f"max_length {config.max_length}", flush=True)
    for d in datasets:
        examples = read_prompts(config, model, tokenizer, d, rows[d])
        n = int(statistics.median(len(e.prompt) for e in examples))
        plans = eval_tasks.plans(model.config, methods, stages, [config.keep], n)
        plans = {method: plan for (_, method), plan in plans.items()}
        if not records:
            first = torch.tensor(examples[0].prompt[:64], device=model.device)
            generate(model, first, 2)  # a warm-up
        records[d] = predict(config, model, tokenizer, d, rows[d], examples, plans)
    found = table(records, datasets)
    cli.print_table(found, COLUMNS)
    path = config.json or Path(config.out_dir) / "scores.json"
    cli.write_rows(path, found, max_length=config.max_length)


if __name__ == "__main__":
    cli.run(main)
