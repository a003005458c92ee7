"""BoolQ, PIQA and the other tasks of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness, MIT), dense and pruned
side by side. eval_tasks.py hands over to it:

python eval_tasks.py --tasks boolq,piqa,copa --num_fewshot 5 --methods dense,sdtp   # rows from the Hugging Face hub
python eval_tasks.py --tasks boolq,piqa --data_dir DIR --methods dense,sdtp         # DIR: the sets' own validation files

Prompts, choices, shots and metrics are the harness's own. HarnessLM is the model it asks: a question's prompt is read once,
pruned, and every choice is scored exactly after it.
"""

import hashlib
import json
import logging
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path

import torch

import cli
from cli import clock
from data import Example, read_text
from eval_tasks import compare, costs, evaluate, parse, ranking, timed_generate
from model import KVCache
from sdtp import prefill

try:
    import lm_eval.evaluator
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError as error:
    raise SystemExit(f"eval_harness.py: {error}: pip install lm-eval==0.4.13") from None

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that we overwrite on purpose

LOCAL = {  # the harness's definition, and the file of rows in --data_dir; PIQA's labels are in piqa_valid-labels.lst
    "boolq": ("super_glue/boolq/default.yaml", "boolq_val.jsonl"),
    "piqa": ("piqa/piqa.yaml", "piqa_valid.jsonl"),
}


# ---------------------------------------------------------------------------- running a batch


@torch.no_grad()
def choices_results(model, examples, rankers=None, schedule=None, kv=None):
    """Results of a batch of Examples whose response is a list of continuations; the call of eval_tasks.run_method()'s `run`.

    answers: of each continuation [sum of its tokens' log-probabilities in nats, whether greedy decoding gives it];
    alive: tokens per layer; seconds of the prefill, which is one for all continuations.
    """
    prompts = [torch.tensor(e.prompt, device=model.device) for e in examples]
    lens, limit = [len(p) for p in prompts], model.config.max_position_embeddings
    cache, start = KVCache(len(model.layers), extra=max(len(c) for e in examples for c in e.response)), clock(model)
    first, cache = prefill(model, torch.cat(prompts), rankers, schedule, lens, cache, kv)
    seconds, held, alive = clock(model) - start, cache.seqlens(), cache.alive
    answers = [[] for _ in examples]
    for turn in zip_longest(*(e.response for e in examples), fillvalue=[0]):  # [0]: this prompt has no more
        for layer, counts in zip(cache.layers, held):
            layer.seqlens = list(counts)  # forgets the continuation before
        fed = [c[:-1] or c for c in turn]  # the last token is only predicted; one alone is fed too, its row not used
        rows, sizes = [first[:0]] * len(turn), [len(c) for c in fed]
        if max(map(len, turn)) > 1:
            at = [[token, min(n + i, limit - 1)] for n, c in zip(lens, fed) for i, token in enumerate(c)]
            ids, positions = torch.tensor(at, device=model.device).T
            rows = model(ids, positions, sizes, cache).split(sizes)
        for found, one, more, c in zip(answers, first, rows, turn):
            logits, ids = torch.cat((one[None], more[: len(c) - 1])).float(), torch.tensor(c, device=model.device)
            nats = logits.log_softmax(-1).gather(-1, ids[:, None]).sum().item()
            found.append([nats, torch.equal(logits.argmax(-1), ids)])
    return [
        {"answers": found[: len(e.response)], "alive": list(counts), "seconds": seconds / len(examples)}
        for e, found, counts in zip(examples, answers, zip(*alive))
    ]


def texts_results(tokenizer, stops, new_tokens, model, examples, rankers=None, schedule=None, kv=None):
    """Results of Examples by greedy decoding: text, what comes before the first stop string; the rest as choices_results()."""
    ends = ending_tokens(tokenizer, stops)
    outputs, alive, seconds, _ = timed_generate(
        model, examples, new_tokens, rankers, schedule, kv=kv, eos_token_ids=ends
    )
    return [
        {
            "text": postprocess_generated_text(tokenizer.decode(output), list(stops), None),
            "alive": counts,
            "seconds": seconds / len(examples),
        }
        for output, counts in zip(outputs, alive)
    ]


@lru_cache
def ending_tokens(tokenizer, stops):
    """Ids that end a generation: end of sequence, and every token that holds a stop string.

    One that comes as several tokens ends nothing; it is cut off with what follows it.
    """
    texts = tokenizer.token_texts(range(tokenizer.vocab_size))
    return frozenset(tokenizer.eos_token_ids) | {i for i, t in enumerate(texts) if any(s and s in t for s in stops)}


# ---------------------------------------------------------------------------- the harness's model


class HarnessLM(TemplateLM):
    """What the harness asks: text is cut into context and continuation, encoded and shortened as by its own model `hf`.

    methods, schedule, heads, settings: evaluate()'s, which runs all methods when a set of requests is first asked for.
    which: (keep, method), the one that answers; found: evaluate()'s results, of `examples`, the prompts last asked for.
    """

    def __init__(self, model, tokenizer, methods=("dense",), schedule=None, heads=None, **settings):
        super().__init__()
        self.model, self.tokenizer, self.run_all = model, tokenizer, partial(evaluate, **settings)
        self.methods, self.schedule, self.heads = methods, schedule, heads
        self.which, self.asked, self.found, self.examples = (settings.get("keeps", [0.0])[0], "dense"), None, {}, []

    @property
    def eot_token_id(self):
        return self.tokenizer.backend.id(self.tokenizer.eos_token)

    @property
    def prefix_token_id(self):
        """What an empty context is replaced by."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self):
        return self.model.config.max_position_embeddings

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.tokenizer.encode(string, add_special_tokens is not False)  # None: the tokenizer's own way

    def results(self, run, name, examples):
        """A result per example, by the method that answers."""
        asked = hashlib.sha256(json.dumps([name, examples]).encode()).hexdigest()
        if asked != self.asked:
            self.found = self.run_all(run, name, self.model, examples, self.methods, self.schedule, self.heads)
            self.asked, self.examples = asked, examples
        return self.found[self.which]

    def cut(self, context, continuation):
        """(context, continuation) as tuples of ids, of which a context too long for the model loses its beginning."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a choice of {len(continuation)} tokens is beyond the model's {self.max_length} positions"
            )
        ids = (context + continuation)[-self.max_length - 1 :]  # the last token is not fed
        return tuple(ids[: len(ids) - len(continuation)]), tuple(continuation)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """[(log-likelihood in nats, is greedy)] of requests ((context, continuation), ids, ids); one prefill for a context's all."""
        pairs, contexts = [self.cut(context, continuation) for _, context, continuation in requests], {}
        for context, continuation in pairs:
            contexts.setdefault(context, {})[continuation] = None
        examples = [Example(list(context), list(map(list, found))) for context, found in contexts.items()]
        for example, result in zip(examples, self.results(choices_results, "loglikelihood", examples)):
            contexts[tuple(example.prompt)] = {tuple(c): tuple(a) for c, a in zip(example.response, result["answers"])}
        return [contexts[context][continuation] for context, continuation in pairs]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[log-likelihood in nats] of whole texts; dense, whichever method answers: there is no prompt to prune."""
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            pairs = map(utils.make_disjoint_window, windows)
            found = [choices_results(self.model, [Example(context, [ids])]) for context, ids in pairs]
            totals.append(sum(result["answers"][0][0] for (result,) in found))
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """[text before the first stop string] of requests (context, generation arguments). ValueError where they ask for sampling."""
        kinds, texts = {}, [""] * len(requests)
        for i, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for kind, members in kinds.items():
            how = normalize_gen_kwargs(json.loads(kind))
            if how.get("do_sample"):
                raise ValueError(f"generation is greedy; the task asks for {kind}")
            stops, size = handle_stop_sequences(how.get("until"), None), how["max_gen_toks"]
            ids = [self.tok_encode(requests[i].args[0])[-max(1, self.max_length - size) :] for i in members]
            run = partial(texts_results, self.tokenizer, tuple(stops), size)
            found = self.results(run, f"generate_until {stops} {size}", [Example(context, []) for context in ids])
            for i, result in zip(members, found):
                texts[i] = result["text"]
        return texts


# ---------------------------------------------------------------------------- tasks


def local_rows(folder, name):
    """The rows of boolq or piqa from its own validation file, with the hub's fields. FileNotFoundError or ValueError names the file."""
    path = Path(folder) / LOCAL[name][1]
    try:
        rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
        if name == "boolq":  # BoolQ's own file has answer: true, SuperGLUE's label: true, exports of the hub "True"
            labels = ({"False": 0, "True": 1}[str(row["answer"] if "answer" in row else row["label"])] for row in rows)
            fields = ("question", "passage")
        else:
            labels = map(int, read_text(path.with_name("piqa_valid-labels.lst")).split())
            fields = ("goal", "sol1", "sol2")
        return [{**{k: row[k] for k in fields}, "label": label} for row, label in zip(rows, labels, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the rows of {name}: {error}") from None


def load_tasks(names, data_dir="", num_fewshot=0):
    """{name: the harness's task}; data_dir: a folder of local files in place of the hub. ValueError for what cannot be run."""
    if data_dir:
        if unknown := [name for name in names if name not in LOCAL]:
            raise ValueError(f"--tasks {unknown[0]}: --data_dir has {' and '.join(LOCAL)}")
        tasks = {name: local_task(name, data_dir) for name in names}
    else:
        manager = TaskManager()
        if unknown := [name for name in names if name not in manager.all_tasks]:
            raise ValueError(f"--tasks {unknown[0]}: choose ppl, needle or tasks of lm-eval")
        tasks = manager.load(names)["tasks"]
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise ValueError(f"--tasks {name}: whole texts are scored, there is no prompt to prune")
        own = task.get_config("num_fewshot")
        if own is None or num_fewshot >= 0 and own != 0:  # a task that says 0 has its shots in the prompt
            task.set_config("num_fewshot", max(num_fewshot, 0))  # as the harness does where a task does not say
    return tasks


def local_task(name, data_dir):
    """The harness's own task with local rows; shots are other rows of the same file."""
    rows, config = local_rows(data_dir, name), load_yaml(Path(lm_eval.tasks.__file__).parent / LOCAL[name][0])
    # the harness leaves a row out of its own shots where these come from the split that it calls test
    splits = {"training_split": None, **dict.fromkeys(("validation_split", "fewshot_split", "test_split"), "rows")}
    config |= {**splits, "tag": None, "custom_dataset": lambda **_: {"rows": Dataset.from_list(rows)}}
    return ConfigurableTask(config=config)


def samples(name, task, lm, limit):
    """(metric, its value for each document as results for compare(), {metric: value over all}) by the method that answers."""
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as the harness's own command: each method gets the same shots
    # not its simple_evaluate, which asks pip and the machine for their details at every call
    got = lm_eval.evaluator.evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    found = got["samples"][name]
    metric = next(m for m in ("acc", "exact_match", *found[0]["metrics"]) if m in found[0])
    if not isinstance(found[0][metric], (int, float)):
        raise ValueError(f"--tasks {name}: its {metric} is no mean over documents, which is all that is compared here")
    values = [{"value": s[metric], "count": 1} for s in found if s["filter"] == found[0]["filter"]]
    whole = {m.removesuffix(",none"): v for m, v in got["results"][name].items() if "," in m and isinstance(v, float)}
    return metric, values, whole


def task_rows(name, task, lm, limit=None):
    """One flat row per method and budget, dense first; all methods answer the same documents.

    score: mean over documents of `metric`, acc where the task has it; diff = score - dense's, with its interval low, high;
    eval_tasks.costs(), over the prompts; whole: all of the harness's metrics.
    """
    answered, todo = {}, [lm.which]
    while todo:
        lm.which = todo.pop()
        answered[lm.which] = samples(name, task, lm, limit)  # the first call runs all methods
        todo = [which for which in lm.found if which not in answered]
    lens, rows = [len(e.prompt) for e in lm.examples], []
    for (keep, method), found in lm.found.items():
        metric, values, whole = answered[keep, method]
        diff, low, high = compare(values, answered[keep, "dense"][1], lambda difference: difference)
        row = {
            "task": name,
            "method": method,
            "keep": keep,
            "num_fewshot": task.get_config("num_fewshot"),
            "documents": len(values),
            "metric": metric,
            "score": sum(v["value"] for v in values) / len(values),
            "diff": diff,
            "low": low,
            "high": high,
            "prompt_tokens": sum(lens) / len(lens),
            **costs(method, lm.model, lens, found, lm.found[keep, "dense"], lm.heads),
            "whole": whole,
        }
        rows.append(row)
    return rows


def print_table(rows):
    """The rows of one task, aligned."""
    print(
        f"{'task':<14} {'method':<22} {'keep':>5} {'n':>5} {'metric':>11} {'score':>7} {'diff':>7} {'95 % interval':>18}"
        f" {'tokens':>7} {'mean alive':>11} {'1/tau':>6} {'FLOPs':>6} {'prefill':>8} {'KV MiB':>8}"
    )
    for r in rows:
        keep, span = f"{r['keep']:g}" if r["keep"] else "own", f"[{r['low']:+.2%}, {r['high']:+.2%}]"
        print(
            f"{r['task']:<14} {r['method']:<22} {keep:>5} {r['documents']:>5} {r['metric']:>11} {r['score']:>7.2%}"
            f" {r['diff']:>+7.2%} {span:>18} {r['prompt_tokens']:>7.0f} {r['mean_alive']:>11.3f} {r['compression']:>5.2f}x"
            f" {r['flops_share']:>6.3f} {r['prefill_speedup']:>7.2f}x {r['kv_bytes'] / 2**20:>8.2f}",
            flush=True,
        )


def print_means(rows):
    """Each method's mean score over the tasks, as the paper's table 3 has it."""
    scores = {}
    for r in rows:
        scores.setdefault((r["keep"], r["method"]), []).append(r["score"])
    for (keep, method), each in scores.items():
        mean = sum(each) / len(each)
        print(
            f"{f'mean of {len(each)}':<14} {method:<22} {f'{keep:g}' if keep else 'own':>5} {mean:>25.2%}", flush=True
        )


def check(config, methods):
    """The tasks of the flags, as load_tasks(). ValueError for flags and methods that do not go with them."""
    if config.text or config.data:
        raise ValueError(
            f"--tasks {config.tasks}: rows come from the hub or from --data_dir, not from --text or --data"
        )
    if "teacher" in [ranking(parse(method)[0]) for method in methods]:
        raise ValueError(
            "method teacher ranks by the loss of one response: these tasks have several, choose other --methods"
        )
    return load_tasks(config.tasks.split(","), config.data_dir, config.num_fewshot)


def run(config, tasks, make_lm):
    """Tables of all methods, task by task; make_lm: the HarnessLM of a task."""
    source = f"rows of the validation file in {config.data_dir}" if config.data_dir else "drawn by the harness"
    note = f" ({source}, never the one asked; not the paper's shots)" * (config.num_fewshot > 0)
    rows = []
    for name, task in tasks.items():
        new = task_rows(name, task, make_lm(), config.limit or None)
        print(f"{name}, {task.get_config('num_fewshot')} shots{note}")
        print_table(new)
        rows += new
        cli.write_rows(config.json, rows, source=config.data_dir or "hub", seed=config.seed)  # so far
    print_means(rows)
