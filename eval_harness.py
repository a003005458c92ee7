"""BoolQ, PIQA and other multiple-choice tasks of lm-evaluation-harness, dense and pruned.

python eval_harness.py --tasks boolq,piqa,copa --num_fewshot 5   # rows from the Hugging Face hub
python eval_harness.py --tasks boolq,piqa --data_dir DIR         # the sets' own validation files

Prompts, choices, shots and metrics are the harness's own (EleutherAI, MIT). HarnessLM is the model
that it asks: each method reads a question's prompt once, and every choice is scored exactly after
it. All methods of a task execute the same prefill FLOPs at the median prompt.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

import cli
import eval_tasks
from data import Example, read_text
from download import DEFAULT
from model import KVCache
from tokenizer import Tokenizer

try:
    from datasets import Dataset
    from lm_eval import evaluator
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.tasks import TaskManager, _yaml_loader
except ImportError as error:
    raise SystemExit(f"eval_harness.py: {error}: pip install lm-eval==0.4.13") from None

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults that are overwritten

LOCAL = {  # the harness's definition, and the rows in --data_dir, with PIQA's labels beside them
    "boolq": ("super_glue/boolq/default.yaml", "boolq_val.jsonl"),
    "piqa": ("piqa/piqa.yaml", "piqa_valid.jsonl"),
}


@dataclass
class HarnessConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    heads: str = ""  # folder of trained heads (default: heads/CKPT), or several with commas
    tasks: str = "boolq,piqa"  # names in lm-eval, with commas
    methods: str = "dense,sdtp"  # NAME or NAME+h2o, as in eval_tasks.py; dense always runs
    keep: float = 0.0  # FLOPs of the paper's stages with that share (0: the heads' own)
    data_dir: str = ""  # folder of boolq_val.jsonl, piqa_valid.jsonl, piqa_valid-labels.lst
    num_fewshot: int = -1  # shots, not the paper's but the harness's own (-1: as the task says)
    limit: int = 0  # the first questions of each task (0: all)
    rows: str = ""  # .jsonl file of every prompt's results: what it holds is not computed again
    seed: int = 0  # of method random
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    json: str = ""  # file for the table's rows


# ---------------------------------------------------------------------------- the harness's model


@torch.no_grad()
def score_choices(model, example, method):
    """A result of eval_tasks.evaluate(); the example's response is a list of choices, ids of each.

    answers: of each choice [sum of its tokens' log-probabilities in nats, whether greedy decoding
    gives it]. The prompt is read once: in the cache a choice takes the place of the one before.
    """
    prompt = torch.tensor(example.prompt, device=model.device)
    cache = KVCache(len(model.layers), extra=max(map(len, example.response)))
    first = method(model, prompt, [len(prompt)], cache)  # (1, vocab_size)
    held, answers = cache.seqlens(), []
    for choice in example.response:
        ids, logits = torch.tensor(choice, device=model.device), first
        for layer, seqlens in zip(cache.layers, held):
            layer.seqlens = seqlens
        if len(ids) > 1:  # the last token is only predicted
            positions = cache.next_positions() + torch.arange(len(ids) - 1, device=model.device)
            logits = torch.cat((first, model(ids[:-1], positions, cache=cache)))
        nats = logits.float().log_softmax(-1).gather(-1, ids[:, None]).sum().item()
        answers.append([nats, torch.equal(logits.argmax(-1), ids)])
    return {"answers": answers}


class HarnessLM(TemplateLM):
    """What the harness asks; text is encoded and shortened as by its own model `hf`.

    methods, stages, settings: eval_tasks.evaluate()'s, which runs all methods when requests first
    come. method: the one that answers; found: {method: a result of each of `examples`}.
    """

    eot_token_id = prefix_token_id = None  # the prefix stands for an empty context

    def __init__(self, model, tokenizer, methods=("dense",), stages=None, **settings):
        super().__init__()
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.methods, self.stages = methods, stages or {}
        self.method, self.found, self.examples = "dense", {}, []
        self.eot_token_id = eos = tokenizer.backend.id(tokenizer.eos_token)
        self.prefix_token_id = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.tokenizer.encode(string, add_special_tokens is not False)

    def cut(self, context, choice):
        """(context, choice) as tuples of ids; a context too long loses its beginning."""
        limit = self.model.config.max_position_embeddings
        if len(choice) > limit:
            raise ValueError(f"a choice of {len(choice)} tokens is beyond {limit} positions")
        ids = (context + choice)[-limit - 1 :]  # the last token is not fed
        return tuple(ids[: len(ids) - len(choice)]), tuple(choice)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """[(log-likelihood in nats, is greedy)] of requests (texts, ids of context, of choice)."""
        pairs = [self.cut(context, choice) for _, context, choice in requests]
        contexts, answers = {}, {}
        for context, choice in pairs:
            contexts.setdefault(context, {})[choice] = None
        examples = [Example(list(c), list(map(list, choices))) for c, choices in contexts.items()]
        if examples != self.examples:
            how = self.model, examples, self.methods, self.stages
            found = eval_tasks.evaluate(score_choices, "choices", *how, **self.settings)
            self.found = {method: results for (_, method), results in found.items()}
            self.examples = examples
        for (context, choices), result in zip(contexts.items(), self.found[self.method]):
            for choice, answer in zip(choices, result["answers"]):
                answers[context, choice] = tuple(answer)
        return [answers[pair] for pair in pairs]

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError("only choices are scored")

    loglikelihood_rolling = generate_until


# ---------------------------------------------------------------------------- tasks


def local_rows(folder, name):
    """The rows of boolq or piqa from its own validation file, with the hub's fields.

    FileNotFoundError or ValueError names the file.
    """
    path = Path(folder) / LOCAL[name][1]
    try:
        rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
        if name == "boolq":  # answer in BoolQ's own file, label in SuperGLUE's, "True" in exports
            values = [str(row["answer"] if "answer" in row else row["label"]) for row in rows]
            labels, fields = [["False", "True"].index(v) for v in values], ("question", "passage")
        else:
            text = read_text(path.with_name("piqa_valid-labels.lst"))
            labels, fields = [int(label) for label in text.split()], ("goal", "sol1", "sol2")
        pairs = zip(rows, labels, strict=True)
        return [{**{field: row[field] for field in fields}, "label": n} for row, n in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the rows of {name}: {error}") from None


def local_task(name, data_dir):
    """The harness's own task with local rows; shots are other rows of the same file."""
    if name not in LOCAL:
        raise ValueError(f"--tasks {name}: --data_dir has {' and '.join(LOCAL)}")
    rows = local_rows(data_dir, name)
    config = _yaml_loader.load_yaml(Path(_yaml_loader.__file__).parent / LOCAL[name][0])
    config |= {"training_split": None, "tag": None}
    # the harness leaves a row out of its own shots where they come from the split it calls test
    config |= dict.fromkeys(("validation_split", "fewshot_split", "test_split"), "rows")
    config["custom_dataset"] = lambda **_: {"rows": Dataset.from_list(rows)}
    return ConfigurableTask(config=config)


def load_tasks(names, data_dir="", num_fewshot=-1):
    """{name: the harness's task}, with local rows if given. ValueError for what cannot be run."""
    if data_dir:
        tasks = {name: local_task(name, data_dir) for name in names}
    else:
        try:
            tasks = TaskManager().load(names)["tasks"]
        except KeyError as error:
            raise ValueError(f"--tasks {','.join(names)}: {error}") from None
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise ValueError(f"--tasks {name}: {task.OUTPUT_TYPE}, only choices can be scored")
        own = task.get_config("num_fewshot")
        if own is None or num_fewshot >= 0 and own != 0:  # 0: its shots are in the prompt
            task.set_config("num_fewshot", max(num_fewshot, 0))
    return tasks


def samples(name, task, lm, limit):
    """(metric, [its value for each document], all means) by the method that answers.

    The metric is acc where the task has it. ValueError for one that is no mean over documents.
    """
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # each method gets the same shots
    # not simple_evaluate, which asks pip and the machine for their details at every call
    got = evaluator.evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    found = got["samples"][name]
    metric = next(m for m in ("acc", "exact_match", *found[0]["metrics"]) if m in found[0])
    if not isinstance(found[0][metric], (int, float)):
        raise ValueError(f"--tasks {name}: {metric} is no mean over documents, nothing to compare")
    values = [s[metric] for s in found if s["filter"] == found[0]["filter"]]
    return metric, values, {k: v for k, v in got["results"][name].items() if type(v) is float}


def task_rows(name, task, lm, limit=None):
    """One row per method, dense first; all methods answer the same documents.

    score: mean over documents of `metric`; diff = score - dense's, with its interval low, high;
    prompt_tokens: mean over the prompts; metrics: all of the harness's; eval_tasks.costs().
    """
    answered = {"dense": samples(name, task, lm, limit)}  # runs all methods
    for method in list(lm.found)[1:]:
        lm.method = method  # whose answers it gives
        answered[method] = samples(name, task, lm, limit)
    lens, rows = [len(e.prompt) for e in lm.examples], []
    for method, (metric, values, metrics) in answered.items():
        row = {"task": name, "method": method, "num_fewshot": task.get_config("num_fewshot")}
        row |= {"documents": len(values), "metric": metric, "score": sum(values) / len(values)}
        row |= zip(("diff", "low", "high"), cli.paired_interval(values, answered["dense"][1]))
        row |= {"prompt_tokens": sum(lens) / len(lens), "metrics": metrics}
        rows.append(row | eval_tasks.costs(lm.found[method], lm.found["dense"], lens))
    return rows


COLUMNS = {
    "task": "{task}",
    "method": "{method}",
    "shots": "{num_fewshot}",
    "n": "{documents}",
    "metric": "{metric}",
    "score": "{score:.2%}",
    "diff": "{diff:+.2%}",
    "95 %": "[{low:+.2%}, {high:+.2%}]",
    "tokens": "{prompt_tokens:.0f}",
    **{name: eval_tasks.OTHERS[name] for name in ("mean alive", "1/tau", "FLOPs", "prefill")},
}


# ---------------------------------------------------------------------------- the command


def check_flags(config, methods):
    """ValueError for flags out of range or without effect, before anything is loaded."""
    cli.at_least(0, config, "limit")
    cli.at_least(-1, config, "num_fewshot")
    names = {eval_tasks.parse(method)[0] for method in methods}
    if "teacher" in names:
        raise ValueError("method teacher ranks by the loss of one response: questions have several")
    eval_tasks.check_one_budget(config, names)


def main():
    config, rows = cli.parse(HarnessConfig, __doc__), []
    methods = config.methods.split(",")
    check_flags(config, methods)
    tasks = load_tasks(config.tasks.split(","), config.data_dir, config.num_fewshot)
    model, folder = cli.load_model(config)
    tokenizer, stages = Tokenizer(folder), cli.given_stages(config, model, methods)
    settings = {"keeps": [config.keep], "seed": config.seed, "rows": config.rows}
    for name, task in tasks.items():
        lm = HarnessLM(model, tokenizer, methods, stages, **settings)
        rows += task_rows(name, task, lm, config.limit or None)
        cli.write_rows(config.json, rows, source=config.data_dir or "hub", seed=config.seed)
    cli.print_table(rows, COLUMNS)


if __name__ == "__main__":
    cli.run(main)
