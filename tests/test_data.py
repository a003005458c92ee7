"""data.py: windows of text, rows in Dolly's fields, and what is held out."""

import json

import pytest
import tiny

import data
from tokenizer import Tokenizer

TEXT = "".join(f"line {i}: some words, more words.\n" for i in range(400))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tiny.checkpoint(tmp_path_factory.mktemp("plain") / "tiny"))


def row(i, context="the context of row {} is here", response="answer {}"):
    return {
        "instruction": f"what is {i}?",
        "context": context.format(i),
        "response": response.format(i),
        "category": "qa",
    }


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_windows(tokenizer):
    """Windows have exactly prompt_len + score_len tokens, BOS first, and together are the text without a gap or overlap."""
    windows = data.text_windows(TEXT, tokenizer, 50, 20)
    assert all(len(w.prompt) == 50 and len(w.response) == 20 and w.prompt[0] == tokenizer.bos_token_id for w in windows)
    read = [t for w in windows for t in w.prompt[1:] + w.response]
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert read == ids[: len(read)] and 0 <= len(ids) - len(read) < 69
    exact = tokenizer.decode(ids[: 69 * 3])
    assert (
        len(data.text_windows(exact, tokenizer, 50, 20)) == 3
        and len(data.text_windows(exact[:-1], tokenizer, 50, 20)) == 2
    )


def test_text_is_held_out(tokenizer, tmp_path):
    """The last tenth of a text is held out, and no training window reaches into it."""
    (tmp_path / "a.txt").write_text(TEXT)
    train, held_out = data.load(str(tmp_path / "a.txt"), tokenizer, 50, 20)
    cut = int(len(TEXT) * 0.9)
    assert tokenizer.decode([t for w in train for t in w.prompt[1:] + w.response]) in TEXT[:cut]
    assert tokenizer.decode([t for w in held_out for t in w.prompt[1:] + w.response]) in TEXT[cut:]
    assert len(held_out) >= 0.08 * len(train) > 0


def test_pydoc(tokenizer):
    """Python's own manual is a source on every machine, the same in every run."""
    train, held_out = data.load("pydoc", tokenizer, 512, 128)
    assert len(train) > 500 and 0.08 < len(held_out) / len(train) < 0.14
    assert train[0] == data.load("pydoc", tokenizer, 512, 128)[0][0]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"instruction": "a", ', "not JSON"),
        ('{"instruction": "a", "response": "b"}', "context"),
        ("[1, 2]", "context"),
        ('{"instruction": 1, "context": "", "response": ""}', "instruction"),
    ],
)
def test_bad_rows_are_named(tokenizer, tmp_path, line, message):
    """A malformed line or a missing field names the file, the line and the fields, in one line."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(1)) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        data.load(str(path), tokenizer)
    assert f"{path}, line 3:" in str(error.value) and "\n" not in str(error.value)


def test_line_separators_inside_a_string(tmp_path):
    """U+2028 and its like, which JSON allows in a string, end no line."""
    odd = row(1, context="first\u2028second\x85third")
    assert data.read_rows(write(tmp_path / "rows.jsonl", [odd, row(2)])) == [odd, row(2)]


def test_split_is_by_row(tmp_path):
    """About a tenth is held out, disjoint, by the row alone: order, company and other fields do not matter."""
    rows = [row(i) for i in range(2000)]
    train, held_out = data.split_rows(rows)
    assert 150 < len(held_out) < 250 and len(train) + len(held_out) == 2000
    questions = {r["instruction"] for r in held_out}
    assert not questions & {r["instruction"] for r in train}
    assert data.split_rows(rows[::-1]) == (train, held_out)
    some, some_held = data.split_rows([r | {"category": "x"} for r in rows[500:1500]])
    assert {r["instruction"] for r in some_held} == {r["instruction"] for r in rows[500:1500]} & questions


def test_rows_become_prompts(tokenizer, tmp_path):
    """Context before instruction, BOS once, response capped; rows without a context, too short or too long left out."""
    rows = [row(i) for i in range(300)] + [
        row(1000, context=" ") | {"instruction": "a long question without a context?"},
        row(1001, context="a" * 200),
        row(1002, context="a"),
        row(1003, response=" "),
    ]
    train, held_out = data.load(
        write(tmp_path / "r.jsonl", rows), tokenizer, score_len=8, min_prompt=30, max_prompt=100
    )
    texts = {tokenizer.decode(e.prompt): tokenizer.decode(e.response) for e in train + held_out}
    assert texts == {f"the context of row {i} is here\n\nwhat is {i}?\n\n": f"answer {i}"[:8] for i in range(300)}
    assert all(e.prompt[0] == 1 and e.prompt.count(1) == 1 and e.response[0] != 1 for e in train)


def test_chat_template(tmp_path):
    """Where the checkpoint has a chat template the prompt is in it, with a generation prompt and one BOS."""
    template = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = Tokenizer(tiny.checkpoint(tmp_path / "tiny", chat_template=template))
    train, held_out = data.load(write(tmp_path / "r.jsonl", [row(7)]), tokenizer, min_prompt=1)
    (example,) = train + held_out
    assert tokenizer.decode(example.prompt) == "<|user|>the context of row 7 is here\n\nwhat is 7?<|assistant|>"
    assert example.prompt[0] == 1 and example.prompt.count(1) == 1


@pytest.mark.parametrize(
    "source, message",
    [
        ("nope", "choose pydoc, made, dolly"),
        ("missing.txt", "missing.txt does not exist"),
        ("missing.jsonl", "missing.jsonl does not exist"),
    ],
)
def test_bad_sources(tokenizer, source, message):
    """A source that is none, or a missing file, is named."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load(source, tokenizer)


def test_text_that_is_not_utf8(tmp_path):
    """A file in another encoding is an error that names it."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        data.read_text(tmp_path / "a.txt")
