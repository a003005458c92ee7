"""Prompts to train and to measure on: windows of text, questions made from it, and rows.

Every source gives Examples, split into a training part and one that no run trains on.
"""

import hashlib
import json
import random
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from download import dolly_file

HELD_OUT = 0.1  # share of every source
WINDOWS, MADE = 50, 25  # of Python's manual; needles, and as many copies, made from a text
FIELDS = ("instruction", "context", "response")  # of a row, as in databricks-dolly-15k


class Example(NamedTuple):
    prompt: list  # token ids, to be pruned
    response: list  # token ids, to be scored


def load(source, tokenizer, prompt_len=256, score_len=None, min_prompt=64, max_prompt=1024):
    """(training Examples, held-out Examples) of `source`; no prompt comes twice in either.

    source: with commas, pydoc (some windows of Python's manual), made (needles to find, sentences
    to copy, in the manual and in the contexts of rows of other sources), dolly, FILE.jsonl (of
    FIELDS), FILE.txt (windows); one Example of each in turn. prompt_len: tokens of a window's
    prompt, and about those of a made one; score_len: tokens of a window's response, and the most
    of others' (default: a quarter of prompt_len, of rows 128); min_prompt, max_prompt: of a row's.
    """
    row_len, score_len = score_len or 128, score_len or prompt_len // 4
    sources = {name: read_source(name) for name in source.split(",")}
    parts = []
    for held_out in (False, True):
        halves = {name: pair[held_out] for name, pair in sources.items()}
        rows = [half for half in halves.values() if isinstance(half, list)]
        lists = []
        for name, half in halves.items():
            if isinstance(half, list):
                lists.append(row_examples(half, tokenizer, row_len, min_prompt, max_prompt))
            elif name == "made":
                made = []
                for text in [half, *map(contexts, rows)]:
                    made.append(needle_examples(text, tokenizer, prompt_len, MADE, held_out))
                    made.append(copy_examples(text, tokenizer, prompt_len, MADE, score_len))
                lists.append(in_turn(*made))
            else:
                windows = text_windows(half, tokenizer, prompt_len, score_len)
                spread = -(-len(windows) // WINDOWS) if name == "pydoc" else 1
                lists.append(windows[::spread])
        each_prompt_once = {tuple(example.prompt): example for example in in_turn(*lists)}
        parts.append([*each_prompt_once.values()])
    return tuple(parts)


def read_source(name):
    """(training, held-out) part of one source: lists of rows, or texts whose end is held out."""
    if name == "dolly" or name.endswith(".jsonl"):
        return split_rows(read_rows(dolly_file() if name == "dolly" else name))
    if name in ("pydoc", "made"):  # sorted, as the order differs between versions of Python
        text = "\n".join(topics[topic] for topic in sorted(topics))
    elif name.endswith(".txt"):
        text = read_text(name)
    else:
        raise ValueError(f"--data {name!r}: choose pydoc, made, dolly, FILE.jsonl or FILE.txt")
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def in_turn(*lists):
    """The items of all lists, one of each in turn."""
    return [item for turn in zip_longest(*lists) for item in turn if item is not None]


def read_text(path):
    """The text of a UTF-8 file; FileNotFoundError or ValueError names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path!s} does not exist" if str(path) else "no file given")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def prompt_text(config):
    """The text of a script's --prompt or --prompt_file; ValueError unless one of them is given."""
    if bool(config.prompt) == bool(config.prompt_file):
        raise ValueError("give --prompt TEXT or --prompt_file FILE")
    return config.prompt or read_text(config.prompt_file)


def chat_prompt(text, tokenizer, answer=""):
    """Token ids of a message in the chat template, if there is one, and of an answer's start."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    else:
        text += "\n\n"
    return tokenizer.encode(text + answer)


def read_rows(path):
    """The rows of a jsonl file: dicts with FIELDS. ValueError names the line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # U+2028 may be in a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(f), str) for f in FIELDS):
            raise ValueError(f"{path}, line {number}: needs the texts {', '.join(FIELDS)}")
        rows.append(row)
    return rows


def split_rows(rows):
    """(training, held-out) rows: by a hash of the context, so that no context is in both parts, or
    of the whole row where there is none. Their order does not depend on the file's."""

    def digest(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    training, held_out = [], []
    for row in sorted(rows, key=digest):
        share = int(digest(row["context"].strip() or row)[:8], 16) / 16**8
        (held_out if share < HELD_OUT else training).append(row)
    return training, held_out


def row_examples(rows, tokenizer, score_len, min_prompt, max_prompt):
    """Rows as Examples, the context before the instruction."""
    examples = []
    for row in rows:
        context = row["context"].strip()
        if not context:
            continue  # nothing in such a prompt can be spared
        prompt = chat_prompt(f"{context}\n\n{row['instruction'].strip()}", tokenizer)
        response = tokenizer.encode(row["response"].strip(), add_special_tokens=False)
        if min_prompt <= len(prompt) <= max_prompt and response:
            examples.append(Example(prompt, response[:score_len]))
    if left_out := len(rows) - len(examples):
        why = f"no context, no response, or no prompt of {min_prompt} to {max_prompt} tokens"
        print(f"{left_out} of {len(rows)} rows left out: {why}", flush=True)
    return examples


def contexts(rows):
    """The rows' contexts as one text, each of them once."""
    return "\n\n".join(dict.fromkeys(row["context"].strip() for row in rows)).strip()


@lru_cache(maxsize=4)
def encoded(text, tokenizer):
    """A text's token ids, not to be changed: several kinds of Examples are cut from one text."""
    return tokenizer.encode(text, add_special_tokens=False)


def text_windows(text, tokenizer, prompt_len, score_len):
    """Windows of prompt_len + score_len tokens, one after the other, as Examples."""
    prefix, ids = [tokenizer.bos_token_id] * tokenizer.adds_bos, encoded(text, tokenizer)
    size = prompt_len - len(prefix) + score_len
    windows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return [Example(prefix + window[:-score_len], window[-score_len:]) for window in windows]


NEEDLES = (  # (statement, question) to train on
    ("{name} keeps the spare key in box {value}.", "In which box does {name} keep the spare key?"),
    ("The label {value} is on the parcel of {name}.", "Which label is on the parcel of {name}?"),
    ("The code {value} opens the locker of {name}.", "Which code opens the locker of {name}?"),
    ("{name} paid {value} crowns for the house.", "How many crowns did {name} pay for the house?"),
    ("{value} is the password that {name} chose.", "Which password did {name} choose?"),
    ("It is {value} steps to the farm of {name}.", "How many steps is it to the farm of {name}?"),
)
NAMES = "Ada Bruno Clara Dmitri Elena Farid Greta Hiro Ines Jonas Katya Luis Mina Nils Olga".split()
HELD_OUT_NEEDLES = (
    ("The magic number of {name} is {value}.", "What is the magic number of {name}?"),
    ("The vault of {name} is unlocked with {value}.", "With what is {name}'s vault unlocked?"),
    ("A scale showed that {name} weighs {value} grams.", "How many grams does {name} weigh?"),
    ("The museum of {name} had {value} visitors.", "How many visitors had the museum of {name}?"),
)
HELD_OUT_NAMES = "amber-falcon coral-lantern dusty-meadow early-willow frozen-anchor".split()


def text_parts(text, tokenizer, prompt_len, count, overlap=False):
    """Up to `count` pieces of a text, as pairs: cut between two sentences, each at another depth.
    They leave room in prompt_len for a question. overlap: `count` also where they must overlap."""
    tokens = prompt_len - len(chat_prompt("", tokenizer)) - 48  # for a statement and a question
    if tokens < 1:
        raise ValueError(f"made prompts of {prompt_len} tokens leave no room for a text")
    ids = encoded(text, tokenizer)
    if not overlap or len(ids) < tokens:
        count = min(count, len(ids) // tokens)
    for i in range(count):
        start = i * (len(ids) - tokens) // count
        part = tokenizer.decode(ids[start : start + tokens])
        depth = int(len(part) * (i * 0.618 % 1))  # golden ratio: spread whatever the count
        cut = part.find(". ", depth) + 1 or part.find(" ", depth) + 1 or depth
        yield part[:cut].strip(), part[cut:].strip()


def needle_examples(text, tokenizer, prompt_len, count, held_out=False, seed=0, overlap=False):
    """Up to `count` Examples: a statement in a text, then a question for it. prompt_len, overlap:
    as in text_parts. held_out: in other words, and the prompt ends with the beginning of the
    answer, as in RULER (arXiv 2404.06654): a small model that knows it may still chat first."""
    needles, names = (HELD_OUT_NEEDLES, HELD_OUT_NAMES) if held_out else (NEEDLES, NAMES)
    draw, examples = random.Random(seed), []
    for before, after in text_parts(text, tokenizer, prompt_len, count, overlap):
        needle, name = draw.choice(needles), draw.choice(names)
        value = str(2 * draw.randint(5000, 49999) + held_out)  # odd ones are held out
        statement, question = (part.format(name=name, value=value) for part in needle)
        begun = statement.split(value)[0] if held_out else ""
        body = f"{before} {statement} {after}\n\n{question}"
        prompt = chat_prompt(body, tokenizer, begun.rstrip())
        response = chat_prompt(body, tokenizer, begun + value)[len(prompt) :]
        examples.append(Example(prompt, response))
    return examples


def copy_examples(text, tokenizer, prompt_len, count, score_len):
    """Up to `count` Examples: a text, then the question for a sentence of it by its beginning."""
    examples = []
    for before, after in text_parts(text, tokenizer, prompt_len, count):
        sentence = after.split(". ")[0]
        beginning = " ".join(sentence.split()[:4])
        question = f'Repeat the sentence of the text that begins with "{beginning}".'
        response = tokenizer.encode(sentence, add_special_tokens=False)[:score_len]
        if response:
            prompt = chat_prompt(f"{before} {after}\n\n{question}", tokenizer)
            examples.append(Example(prompt, response))
    return examples
