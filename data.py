"""Prompts to train and to measure on: windows of plain text, and rows in Dolly's fields.

Every source gives Examples, a prompt (which is pruned) and a response (which is scored), split
into a training part and a held-out part that no run trains on.
"""

import hashlib
import json
import random
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from download import dolly_file

HELD_OUT = 0.1  # share of every source


class Example(NamedTuple):
    prompt: list  # token ids
    response: list  # token ids
    text: bool = False  # the response goes on where the prompt ends, as plain text does


def read_text(path):
    """The text of a UTF-8 file; FileNotFoundError or ValueError names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path!s} does not exist" if str(path) else "no file given")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def prompt_text(config):
    """The text of a script's --prompt or --prompt_file; ValueError unless exactly one is given."""
    if bool(config.prompt) == bool(config.prompt_file):
        raise ValueError("give --prompt TEXT or --prompt_file FILE")
    return config.prompt or read_text(config.prompt_file)


def load(source, tokenizer, prompt_len=512, score_len=128, min_prompt=64, max_prompt=1024):
    """(training Examples, held-out Examples) of pydoc, made, dolly, FILE.jsonl, FILE.txt, or several of these with commas.

    pydoc: windows of Python's manual; made: needles to find, sentences to copy and passages to go on with, in the manual
    and in the contexts of the rows among the sources, and those rows among other rows' contexts.
    prompt_len, score_len: tokens of a text window's prompt and response (score_len also caps a row's
    response); min_prompt, max_prompt: rows whose prompt has fewer or more tokens are left out.
    """
    names, parts = source.split(","), []
    rows = {name: split_rows(read_rows(dolly_file() if name == "dolly" else name)) for name in names if is_rows(name)}
    for name in names:
        if name in rows:
            part = [list(row_examples(half, tokenizer, score_len, min_prompt, max_prompt)) for half in rows[name]]
        elif name == "made":
            texts = [split_text(manual()), *([contexts(half) for half in pair] for pair in rows.values())]
            part = [
                [e for text in half for e in made_examples(text, tokenizer, prompt_len, score_len, held_out)]
                for held_out, half in enumerate(zip(*texts))
            ]
            for halves in rows.values():
                more = [row_examples(crowded(half), tokenizer, score_len, min_prompt, max_prompt) for half in halves]
                part = [in_turn(a, islice(b, CROWDED)) for a, b in zip(part, more)]
        elif name == "pydoc" or name.endswith(".txt"):
            halves = split_text(manual() if name == "pydoc" else read_text(name))
            part = [text_windows(half, tokenizer, prompt_len, score_len) for half in halves]
        else:
            raise ValueError(
                f"--data {name}: choose pydoc, made, dolly, FILE.jsonl or FILE.txt, or several with commas"
            )
        parts.append(part)
    return tuple(in_turn(*half) for half in zip(*parts))


def in_turn(*lists):
    """The items of all lists or iterators, one of each in turn."""
    return [item for turn in zip_longest(*lists) for item in turn if item]


def is_rows(name):
    """Whether a source holds rows in Dolly's fields."""
    return name == "dolly" or name.endswith(".jsonl")


def manual():
    """Python's own manual, on every machine: sorted, as its order differs between versions."""
    return "\n".join(topics[name] for name in sorted(topics))


def split_text(text):
    """(training, held-out) part of a text."""
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def contexts(rows):
    """The rows' contexts as one text."""
    return "\n\n".join(row["context"].strip() for row in rows if row["context"].strip())


CROWDED = 700  # rows of a source that made uses so


def crowded(rows, seed=0):
    """Rows with a context, each put among up to three other rows' contexts: an answer to find among what is not asked for."""
    draw, rows = random.Random(seed), [row for row in rows if row["context"].strip()]
    for row in rows:
        others = draw.sample(rows, min(len(rows), draw.randint(1, 3)))
        own = row["context"].strip()
        parts = [context for context in (other["context"].strip() for other in others) if context != own]
        parts.insert(draw.randint(0, len(parts)), own)
        yield row | {"context": "\n\n".join(parts)}


@lru_cache(maxsize=4)
def encoded(text, tokenizer):
    """A text's token ids, not to be changed: made prompts ask for them six times, of up to four texts in turn."""
    return tokenizer.encode(text, add_special_tokens=False)


def text_windows(text, tokenizer, prompt_len, score_len):
    """Consecutive windows of prompt_len + score_len tokens, each with the tokenizer's own prefix (BOS or none)."""
    prefix, ids = [tokenizer.bos_token_id] * tokenizer.adds_bos, encoded(text, tokenizer)
    fresh = prompt_len - len(prefix)
    starts = range(0, len(ids) - fresh - score_len + 1, fresh + score_len)
    return [Example(prefix + ids[s : s + fresh], ids[s + fresh : s + fresh + score_len], True) for s in starts]


# (statement, question) to train on; to measure on, in other words, with the beginning of the answer, as in RULER (Hsieh et
# al. 2024, arXiv 2404.06654): a small model that has found the number may still chat of something else
NEEDLES = (
    (
        ("{name} keeps the spare key in box {value}.", "In which box does {name} keep the spare key?"),
        ("The parcel for {name} has the number {value}.", "What is the number of the parcel for {name}?"),
        ("The code {value} opens the locker of {name}.", "Which code opens the locker of {name}?"),
        ("{name} paid {value} crowns for the house.", "How many crowns did {name} pay for the house?"),
        ("In the year {value}, {name} will be remembered by all.", "In which year will {name} be remembered?"),
        ("The telephone number of {name} is {value}.", "What is {name}'s telephone number?"),
        ("Please note: the ticket of {name} carries the serial {value}.", "Which serial is on the ticket of {name}?"),
        ("{value} is the password that {name} chose.", "Which password did {name} choose?"),
        ("From here to the farm of {name} it is {value} steps.", "How many steps is it to the farm of {name}?"),
        ("{name} lives in apartment {value} of the new building.", "Which apartment does {name} live in?"),
        ("The final score of {name} was {value} points.", "How many points did {name} score in the end?"),
        ("Invoice {value} was sent to {name} last week.", "Which invoice was sent to {name}?"),
    ),
    (
        (
            "One of the special magic numbers for {name} is: {value}.",
            "What is the special magic number for {name} mentioned in the text?",
            "The special magic number for {name} mentioned in the text is",
        ),
        (
            "The vault of {name} is unlocked with {value}.",
            "With what is the vault of {name} unlocked?",
            "The vault of {name} is unlocked with",
        ),
        (
            "A scale showed that {name} weighs {value} grams.",
            "How many grams does {name} weigh?",
            "In grams, {name} weighs",
        ),
        (
            "The museum of {name} was seen by {value} visitors.",
            "How many visitors saw the museum of {name}?",
            "The museum of {name} was seen by",
        ),
    ),
)
NAMES = (
    (
        "Ada Bruno Clara Dmitri Elena Farid Greta Hiro Ines Jonas Katya Luis Mina Nils Olga Pedro Quentin Rosa Stefan"
        " Tamara Ulrich Vera Walter Xenia Yusuf Zoe"
    ).split(),
    (
        "amber-falcon brisk-harbor coral-lantern dusty-meadow early-willow frozen-anchor gentle-comet hollow-cedar"
        " ivory-canyon jolly-otter keen-lighthouse lunar-orchard misty-bridge noble-heron olive-summit quiet-glacier"
    ).split(),
)


def chat_prompt(text, tokenizer, answer=""):
    """Token ids of a user's message, in the chat template where there is one, and of what is given of the answer."""
    if tokenizer.chat_template:
        return tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": text}]) + answer)
    return tokenizer.encode(text + "\n\n" + answer)


def text_parts(text, tokenizer, tokens, count, overlap=False):
    """Up to `count` (half, half) texts of that many tokens, spread over the text, split between sentences at spread depths.

    overlap: as many as asked for where the text is too short for them to be apart.
    """
    if tokens < 1:
        raise ValueError(f"made prompts need more than 64 tokens, not {tokens + 64}")
    ids = encoded(text, tokenizer)
    count = count * (len(ids) > tokens) if overlap else min(count, len(ids) // tokens)
    for i in range(count):
        start = i * (len(ids) - tokens) // count
        part = tokenizer.decode(ids[start : start + tokens])
        depth = int(len(part) * (i * 0.618 % 1))  # golden ratio: spread whatever the count
        cut = part.find(". ", depth) + 1 or part.find(" ", depth) + 1 or depth
        yield part[:cut].strip(), part[cut:].strip()


def needle_examples(text, tokenizer, prompt_len, count, held_out=False, seed=0, overlap=False):
    """Up to `count` Examples of about prompt_len tokens: one statement between two sentences of a text, then a question for it.

    held_out: other words, and the prompt ends with the beginning of the answer; overlap: see text_parts().
    """
    draw, examples = random.Random(seed), []
    for before, after in text_parts(text, tokenizer, prompt_len - 64, count, overlap):
        (statement, question, *begun), name = draw.choice(NEEDLES[held_out]), draw.choice(NAMES[held_out])
        value = str(2 * draw.randint(5000, 49999) + held_out)  # odd ones are held out
        body = f"{before} {statement.format(name=name, value=value)} {after}\n\n{question.format(name=name)}"
        answer = "".join(begun).format(name=name)
        prompt, response = chat_prompt(body, tokenizer, answer), tokenizer.encode(value, add_special_tokens=False)
        if begun:  # the tokens that go on with it
            response = chat_prompt(body, tokenizer, f"{answer} {value}")[len(prompt) :]
        examples.append(Example(prompt, response))
    return examples


def copy_examples(text, tokenizer, prompt_len, count, score_len):
    """Up to `count` Examples of about prompt_len tokens: a text, and the question for one of its sentences by its beginning."""
    examples = []
    for before, after in text_parts(text, tokenizer, prompt_len - 64, count):
        sentence = after.split(". ")[0]
        beginning = " ".join(sentence.split()[:4])
        body = f'{before} {after}\n\nRepeat the sentence of the text that begins with "{beginning}".'
        response = tokenizer.encode(sentence, add_special_tokens=False)[:score_len]
        if response:
            examples.append(Example(chat_prompt(body, tokenizer), response))
    return examples


def made_examples(text, tokenizer, prompt_len, score_len, held_out=False, count=100):
    """Needle, copy and window Examples of a text, one of each in turn, of prompt_len and of twice as many tokens.

    count: of needles and of copies at most, half of either length; windows: half as many short ones and twice as many
    long ones, from which what plain text reads of long ago is learnt. Those held out: in other words, with other answers,
    which the prompts of needles begin.
    """
    examples = []
    for length, most in ((prompt_len, count // 2), (2 * prompt_len, 2 * count)):
        needles = needle_examples(text, tokenizer, length, count // 2, held_out, seed=length + held_out)
        copies = copy_examples(text, tokenizer, length, count // 2, score_len)
        windows = text_windows(text, tokenizer, length, score_len)
        windows = windows[:: len(windows) // most + 1]
        examples.append(in_turn(needles, copies, windows))
    return in_turn(*examples)


def read_rows(path):
    """The rows of a jsonl file in Dolly's fields; ValueError names the line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if row is None:
            continue
        if not isinstance(row, dict) or not all(
            isinstance(row.get(f), str) for f in ("instruction", "context", "response")
        ):
            raise ValueError(f"{path}, line {number}: the text fields instruction, context and response are needed")
        rows.append(row)
    return rows


def split_rows(rows):
    """(training, held-out): by a hash of the row, in the hash's order, so that a file's order does not matter."""

    def digest(row):
        return hashlib.sha256(json.dumps([row[f] for f in ("instruction", "context", "response")]).encode()).hexdigest()

    keyed = sorted(((digest(row), row) for row in rows), key=lambda pair: pair[0])
    limit = HELD_OUT * 16**8
    return [r for h, r in keyed if int(h[:8], 16) >= limit], [r for h, r in keyed if int(h[:8], 16) < limit]


def row_examples(rows, tokenizer, score_len, min_prompt, max_prompt):
    """Rows with a context as Examples, one by one: context before instruction, in the chat template where there is one."""
    for row in rows:
        if not row["context"].strip():
            continue  # nothing in such a prompt can be spared
        prompt = chat_prompt(f"{row['context'].strip()}\n\n{row['instruction'].strip()}", tokenizer)
        response = tokenizer.encode(row["response"].strip(), add_special_tokens=False)
        if min_prompt <= len(prompt) <= max_prompt and response:
            yield Example(prompt, response[:score_len])
