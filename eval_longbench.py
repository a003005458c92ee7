"""LongBench (Bai et al. 2023, arXiv 2308.14508) as its own scripts run and score it, dense and pruned side by side.

python eval_longbench.py --data DIR --methods dense,sdtp     # DIR: the official DATASET.jsonl files
python eval_longbench.py --methods dense,sdtp                # data.zip from the Hugging Face hub
torchrun --nproc_per_node 8 eval_longbench.py ...            # the rows split over processes

Prompts, lengths of answers and metrics are those of github.com/THUDM/LongBench (MIT License, Copyright (c) 2023
THU-KEG & Zhipu AI), quirks included. Predictions land in OUT_DIR/pred/METHOD/DATASET.jsonl (pred_e for --e), one line
as soon as it is there; LongBench's eval.py scores them too. The same command again goes on with a run that was stopped.
"""

import difflib
import hashlib
import json
import logging
import os
import re
import statistics
import string
import sys
import warnings
import zipfile
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import hf_hub_download
from tqdm import tqdm

import cli
from cli import clock
from data import Example
from download import DEFAULT
from eval_tasks import (
    adapted, check_late, flops_share, given_scores, needs_heads, parse, policy, ranking, run_method, timed_generate,
)  # fmt: skip
from model import read_json
from sdtp import fingerprint, generate, heads_sha256, write_atomic
from tokenizer import Tokenizer

try:
    import jieba
    from rouge import Rouge

    with warnings.catch_warnings(action="ignore"):  # that it runs without python-Levenshtein, as it should
        from fuzzywuzzy import fuzz
except ImportError as error:
    raise SystemExit(f"eval_longbench.py: {error}: pip install -r requirements-dev.txt") from None

fuzz.SequenceMatcher = difflib.SequenceMatcher  # where python-Levenshtein is installed, it rounds differently
jieba.setLogLevel(logging.WARNING)


@dataclass
class LongBenchConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT)
    data: str = ""  # folder of official DATASET.jsonl files, or a data.zip (default: the hub's)
    datasets: str = ""  # separated by commas (default: all 21, or all 13 of LongBench-E)
    e: bool = False  # LongBench-E: DATASET_e.jsonl, scores by length
    methods: str = "dense,sdtp,most_recent,last_attention"  # as in eval_tasks.py, at equal FLOPs, in one run with dense
    keep: float = 0.0  # FLOPs of the paper's stages with that share (0: the heads' own, or 0.9)
    limit: int = 0  # the first rows of each set (0: all)
    max_length: int = 0  # longer prompts lose their middle (0: what the model's positions leave, printed and kept)
    out_dir: str = "out/longbench"  # config.json, predictions, scores.json
    batch_size: int = 1  # prompts of different lengths in one forward
    seed: int = 0  # of method random
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda


THE_RUN = ("ckpt", "heads", "data", "e", "keep", "limit", "max_length", "seed", "dtype")  # what predictions depend on


# ---------------------------------------------------------------------------- metrics: (prediction, answer, classes) -> 0 to 1


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
    """ROUGE-L F of the package `rouge`; an exception scores 0: an empty text, or a sentence too long for its recursion.

    callers: Python calls between the published script's first line and get_scores(). It recurses once a word, so that
    what is too long depends on the calls under way: the limit is moved to leave it the room it has there.
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
    for name in found:  # a list that loses items while it is gone through skips the one after: published so, kept so
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
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return fuzz.ratio(code, answer) / 100


# ---------------------------------------------------------------------------- the sets

Set = namedtuple("Set", "category max_new_tokens metric")  # category: of the paper's 14 sets (SDTP, table 1)
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
SETS_E = [
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
]  # fmt: skip
NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # without the chat template
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # scored by the first line of the prediction
BINS = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, float("inf"))}  # LongBench-E, by the rows' length
FIELDS = ("input", "context", "answers", "length", "all_classes")
PROMPTS = read_json(Path(__file__).with_name("longbench_prompts.json"))
RETOKENIZED = 16  # positions spared for tokens that a prompt gains by being cut as text (8 at most in 683)


def score(dataset, prediction, answers, classes):
    """0 to 1: the best over the answers."""
    if dataset in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    scores = [SETS[dataset].metric(prediction, answer, classes) for answer in answers]
    return max(scores, default=0.0)


def read_rows(data, name, limit=0):
    """The rows of NAME.jsonl in a folder or a data.zip, a Path, as a list of dicts. FileNotFoundError or ValueError in one line."""
    path = data / f"{name}.jsonl"
    try:
        if data.suffix == ".zip":
            with zipfile.ZipFile(data) as file:
                content = file.read(f"data/{name}.jsonl")
        else:
            content = path.read_bytes()
        rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    except (FileNotFoundError, KeyError):
        raise FileNotFoundError(f"{path} does not exist: see --data, or choose others with --datasets") from None
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not readable: {error}") from None
    for number, row in enumerate(rows, 1):
        missing = [field for field in FIELDS if not isinstance(row, dict) or field not in row]
        if not missing and SETS[name.removesuffix("_e")].metric is classification and not row["all_classes"]:
            missing = ["all_classes"]
        if missing:
            raise ValueError(f"{path}: row {number} has no {missing[0]!r}")
    if not rows:
        raise ValueError(f"{path} holds no row")
    return rows[: limit or None]


# ---------------------------------------------------------------------------- prompts


def chat(tokenizer, prompt):
    """The prompt in the checkpoint's chat template, if it has one."""
    if tokenizer.chat_template is None:
        return prompt
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}])


def prompt_ids(tokenizer, dataset, row, max_length):
    """Token ids of a row's prompt: above max_length tokens the middle is cut out, before the chat template comes on."""
    prompt = PROMPTS[dataset].format(**row)
    ids = tokenizer.encode(prompt)
    if len(ids) > max_length:
        half = max_length // 2
        prompt = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
    return tokenizer.encode(prompt if dataset in NO_CHAT else chat(tokenizer, prompt))


def check_max_length(config, model, tokenizer, datasets):
    """Resolve --max_length 0: the model's positions less the longest answer of all sets and the chat template."""
    room = model.config.max_position_embeddings - len(tokenizer.encode(chat(tokenizer, ""))) - RETOKENIZED
    config.max_length = config.max_length or room - max(s.max_new_tokens for s in SETS.values())
    most = room - max(SETS[d].max_new_tokens for d in datasets)
    if not 2 <= config.max_length <= most:
        raise ValueError(f"--max_length {config.max_length}: the model's positions leave 2 to {most} for these sets")


def read_prompts(config, model, tokenizer, rows, rank):
    """{dataset: [(N,) int32 token ids of each row]}. ValueError for one that leaves no positions for its answer."""
    prompts, limit = {d: [] for d in rows}, model.config.max_position_embeddings
    bar = tqdm(total=sum(map(len, rows.values())), desc="prompts", disable=None if rank == 0 else True)
    for dataset, found in rows.items():
        for number, row in enumerate(found, 1):
            ids = prompt_ids(tokenizer, dataset, row, config.max_length)
            if len(ids) + SETS[dataset].max_new_tokens > limit:
                raise ValueError(
                    f"{dataset}, row {number}: {len(ids)} tokens after the cut are too many: lower --max_length {config.max_length}"
                )
            prompts[dataset].append(torch.tensor(ids, dtype=torch.int32))
            bar.update()
    bar.close()
    return prompts


# ---------------------------------------------------------------------------- predictions


def answer(tokenizer, dataset, model, examples, rankers=None, schedule=None, kv=None):
    """Pruned prefill, then greedy decoding; the call of eval_tasks.run_method()'s `run`.

    Returns one dict an example: pred, new_tokens, tokens alive per layer, seconds until the first token and in all,
    which a batch shares evenly.
    """
    size, stops = SETS[dataset].max_new_tokens, list(tokenizer.eos_token_ids)
    if dataset == "samsum":  # the model would go on with the next dialogue
        stops.append(tokenizer.encode("\n", add_special_tokens=False)[-1])
    outputs, alive, first, total = timed_generate(
        model, examples, size, rankers, schedule, kv=kv, eos_token_ids=stops, min_new_tokens=int(dataset == "samsum")
    )
    return [
        {
            "pred": tokenizer.decode(output),
            "new_tokens": len(output),
            "alive": counts,
            "prefill_seconds": first / len(examples),
            "seconds": total / len(examples),
        }
        for output, counts in zip(outputs, alive)
    ]


def predict(run, method, stages, model, examples, keys, heads):
    """Results of a batch by one method; a pass before the prefill counts in the seconds."""
    name, given, start = ranking(parse(method)[0]), None, clock(model)
    if name in ("gemfilter", "self_information"):
        given = given_scores(name, model, examples, None, None, None)
    before = (clock(model) - start) / len(examples)
    results = run_method(run, method, model, examples, stages, keys, heads, given)
    for result in results:
        result["prefill_seconds"] += before
        result["seconds"] += before
    return results


def predictions_path(config, method, dataset):
    return Path(config.out_dir) / ("pred_e" if config.e else "pred") / method / f"{dataset}.jsonl"


def parts(path):
    """A set's file of predictions and those that processes have not merged yet."""
    return [p for p in (path, *sorted(path.parent.glob(f"{path.name}.rank*"))) if p.is_file()]


def read_predictions(path):
    """{row: record} of a set's predictions; a last line that a killed run left unfinished is none."""
    records = {}
    for part in parts(path):
        for number, line in enumerate(part.read_bytes().split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                records[record["row"]] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{part}: line {number} is damaged; delete it, and run the command again") from None
    return records


def append(path, records):
    """Append records, each a line, after the last whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines(records))


def lines(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def merge(path):
    """Make one file of a set's parts, in the order of the rows."""
    records = read_predictions(path)
    write_atomic(path, lines(records[row] for row in sorted(records)))
    for part in parts(path)[1:]:
        part.unlink()
    return records


def predict_set(config, model, tokenizer, dataset, rows, prompts, plan, heads, rank, world):
    """Predict this process's rows of a set by every method of plan {method: Schedule}, but for those already there."""
    paths = {m: predictions_path(config, m, dataset) for m in plan}
    done = {m: read_predictions(path) for m, path in paths.items()}
    mine, run = range(rank, len(rows), world), partial(answer, tokenizer, dataset)
    missing = sum(row not in done[m] for m in plan for row in mine)
    bar = tqdm(total=missing, desc=dataset, disable=None if rank == 0 else True)
    for start in range(0, len(mine), config.batch_size):
        for method, stages in plan.items():
            todo = [row for row in mine[start : start + config.batch_size] if row not in done[method]]
            if not todo:
                continue
            examples = [Example(prompts[row].tolist(), []) for row in todo]
            keys = [hashlib.sha256(f"{config.seed} {dataset} {row}".encode()).hexdigest() for row in todo]
            records = []
            for row, e, result in zip(todo, examples, predict(run, method, stages, model, examples, keys, heads)):
                official = {
                    "pred": result.pop("pred"),
                    **{k: rows[row][k] for k in ("answers", "all_classes", "length")},
                }
                records.append({**official, "row": row, "prompt_tokens": len(e.prompt), **result})
            append(paths[method] if world == 1 else Path(f"{paths[method]}.rank{rank}"), records)
            bar.update(len(todo))
    bar.close()


# ---------------------------------------------------------------------------- scores


def official_result(records, scores, e):
    """What LongBench's eval.py writes for a set: 100 * mean, to two places; by length for LongBench-E."""
    if not e:
        return round(100 * sum(scores.values()) / len(scores), 2)
    bins = {name: [scores[row] for row in records if in_bin(records[row], name)] for name in BINS}
    return {name: round(100 * np.mean(values), 2) if values else float("nan") for name, values in bins.items()}


def in_bin(record, name):
    low, high = BINS[name]
    return low <= record["length"] < high


def groups(records, e):
    """[(name, {dataset: its rows})], what the table has a line for; records: {dataset: {row: record}} of one method.

    Sets, then the paper's categories and AVG (if all of their sets are there), then all; LongBench-E: sets and all, by length.
    """
    if e:
        cut = {b: {d: [i for i in rows if in_bin(rows[i], b)] for d, rows in records.items()} for b in BINS}
        cut = {b: {d: rows for d, rows in sets.items() if rows} for b, sets in cut.items()}
        each = [(f"{d} {b}", {d: cut[b][d]}) for d in records for b in BINS if d in cut[b]]
        return each + [(f"all {b}", sets) for b, sets in cut.items() if sets]
    every = {d: list(rows) for d, rows in records.items()}
    found = [(d, {d: rows}) for d, rows in every.items()]
    for name in ("Single", "Multi", "Summ", "FewShot", "Code", "AVG"):
        sets = [d for d, s in SETS.items() if s.category == name or (name == "AVG" and s.category)]
        if all(d in every for d in sets):
            found.append((name, {d: every[d] for d in sets}))
    return [*found, ("all", every)]


def interval(samples):
    """95 % bootstrap interval (low, high) of the mean over sets of the means over rows; samples: an array a set."""
    generator = np.random.default_rng(0)
    means = np.mean([generator.choice(s, (2000, len(s))).mean(1) for s in samples], 0)
    return [float(x) for x in np.percentile(means, (2.5, 97.5))]


def summary(method, name, sets, records, scores, flops):
    """The table's row of a method and a group. score, diff (to dense, on the same rows): 0 to 100, mean over sets.

    mean_alive: share of the prompts alive, mean over layers; flops: function of prompts' lengths and tokens alive.
    """
    values = {
        m: [100 * np.array([scores[m][d][i] for i in rows]) for d, rows in sets.items()] for m in (method, "dense")
    }
    diff = [a - b for a, b in zip(values[method], values["dense"])]
    found = [records[d][i] for d, rows in sets.items() for i in rows]
    lens, alive = [r["prompt_tokens"] for r in found], [r["alive"] for r in found]
    low, high = interval(values[method])
    diff_low, diff_high = interval(diff)
    return {
        "set": name,
        "method": method,
        "sets": len(sets),
        "n": len(found),
        "score": float(np.mean([v.mean() for v in values[method]])),
        "low": low,
        "high": high,
        "diff": float(np.mean([v.mean() for v in diff])),
        "diff_low": diff_low,
        "diff_high": diff_high,
        "prompt_tokens": sum(lens) / len(found),
        "mean_alive": sum(sum(counts) / len(counts) for counts in alive) / sum(lens),
        "flops_share": flops(lens, alive),
        "prefill_seconds": sum(r["prefill_seconds"] for r in found) / len(found),
        "seconds": sum(r["seconds"] for r in found) / len(found),
    }


def report(config, model_config, heads, methods, datasets):
    """Merge and score the predictions, write every result.json, print and return the table's rows."""
    records = {m: {d: merge(predictions_path(config, m, d)) for d in datasets} for m in methods}
    scores = {m: {} for m in methods}
    for m in methods:
        for d, found in records[m].items():
            scores[m][d] = {i: score(d, r["pred"], r["answers"], r["all_classes"]) for i, r in found.items()}
        result = {d: official_result(found, scores[m][d], config.e) for d, found in records[m].items()}
        path = predictions_path(config, m, "").with_name("result.json")
        write_atomic(path, (json.dumps(result, indent=4) + "\n").encode())
    rows = []
    for name, sets in groups(records["dense"], config.e):
        for m in methods:
            flops = partial(flops_share, m, model_config, heads=heads)
            rows.append(summary(m, name, sets, records[m], scores, flops))
    print_table(rows)
    return rows


def print_table(rows):
    width = max(map(len, ["method", *(r["method"] for r in rows)]))
    print(
        f"{'set':<26} {'method':<{width}} {'sets':>4} {'n':>5} {'score':>6} {'95 % interval':>15} {'to dense':>8} {'95 % interval':>17}"
        f" {'tokens':>7} {'alive':>6} {'FLOPs':>6} {'prefill s':>9} {'total s':>8}"
    )
    for r in rows:
        span, diff_span = f"[{r['low']:.1f}, {r['high']:.1f}]", f"[{r['diff_low']:+.1f}, {r['diff_high']:+.1f}]"
        print(
            f"{r['set']:<26} {r['method']:<{width}} {r['sets']:>4} {r['n']:>5} {r['score']:>6.2f} {span:>15} {r['diff']:>+8.2f} {diff_span:>17}"
            f" {r['prompt_tokens']:>7.0f} {r['mean_alive']:>6.1%} {r['flops_share']:>6.3f} {r['prefill_seconds']:>9.3f} {r['seconds']:>8.3f}"
        )


# ---------------------------------------------------------------------------- the run


def begin(config, model, heads, schedule):
    """Write OUT_DIR/config.json; ValueError if a run with other predictions is there."""
    path = Path(config.out_dir) / "config.json"
    saved = {
        **asdict(config),
        "dtype": str(model.norm.weight.dtype).removeprefix("torch."),
        "schedule": {str(layer): share for layer, share in schedule.items()},
        "span": schedule.span,
        "model": fingerprint(model),
        "pruning": heads_sha256(heads),
    }
    old = read_json(path) if path.is_file() else {}
    for name in (*THE_RUN, "schedule", "span", "model", "pruning"):
        if old and old.get(name) != saved[name]:
            raise ValueError(
                f"{path.parent} holds a run with {name} {old.get(name)!r}, not {saved[name]!r}: choose another --out_dir"
            )
    write_atomic(path, (json.dumps({**cli.ORIGIN, **saved}, indent=1) + "\n").encode())


def chosen(config):
    """(methods, dense first; datasets) of the flags. ValueError names an unknown one."""
    methods = list(dict.fromkeys(["dense", *config.methods.split(",")]))
    if "teacher" in [ranking(parse(m)[0]) for m in methods]:
        raise ValueError("method teacher ranks by the loss of a given response: LongBench has none")
    known = SETS_E if config.e else list(SETS)
    datasets = list(dict.fromkeys(config.datasets.split(","))) if config.datasets else known
    unknown = [d for d in datasets if d not in known]
    if unknown:
        raise ValueError(f"unknown dataset {unknown[0]!r} (known{' in LongBench-E' * config.e}: {', '.join(known)})")
    return methods, datasets


def plans(config, model_config, prompts, methods, schedule, heads):
    """{dataset: {method: Schedule}}: every method at equal executed FLOPs at the set's median prompt. ValueError names one that cannot.

    Adaptive ones are without thresholds yet.
    """
    check_late(methods, schedule)
    lens = {dataset: int(statistics.median(map(len, ids))) for dataset, ids in prompts.items()}
    return {
        dataset: {m: policy(m, model_config, schedule, heads, n, config.keep) for m in methods}
        for dataset, n in lens.items()
    }


def main():
    config = cli.parse(LongBenchConfig, __doc__)
    cli.at_least(1, config, "batch_size")
    cli.at_least(0, config, "limit", "max_length", "keep")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    methods, datasets = chosen(config)
    needed = needs_heads(methods)
    source = Path(config.data or hf_hub_download("THUDM/LongBench", "data.zip", repo_type="dataset"))
    rows = {d: read_rows(source, d + "_e" * config.e, config.limit) for d in datasets}
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # the first to finish waits for the last
        if config.device == "auto" and torch.cuda.is_available():
            config.device = f"cuda:{os.environ['LOCAL_RANK']}"
    model, folder = cli.load_model(config)
    tokenizer = Tokenizer(folder)
    heads, schedule = cli.heads_and_schedule(config, model, needed=needed)
    check_max_length(config, model, tokenizer, datasets)
    prompts = read_prompts(config, model, tokenizer, rows, rank)
    plan = plans(config, model.config, prompts, methods, schedule, heads)
    if rank == 0:
        print(f"max_length {config.max_length}, {sum(map(len, rows.values()))} rows of {len(rows)} sets", flush=True)
        begin(config, model, heads, schedule)
    if world > 1:
        dist.barrier()
    generate(model, torch.zeros(256, dtype=torch.long, device=model.device), 2)  # a warm-up
    for d in datasets:
        every = [ids.tolist() for ids in prompts[d]]  # all of the set's prompts, on each process
        stages = {m: adapted(m, model, s, heads, every) for m, s in plan[d].items()}
        predict_set(config, model, tokenizer, d, rows[d], prompts[d], stages, heads, rank, world)
    if world > 1:
        dist.barrier()
    if rank == 0:
        table = report(config, model.config, heads, methods, datasets)
        cli.write_rows(Path(config.out_dir) / "scores.json", table, max_length=config.max_length)


if __name__ == "__main__":
    cli.run(main)
