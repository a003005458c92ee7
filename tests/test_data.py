"""data.py: windows of text, rows in Dolly's fields, made questions, and what is held out."""

import json
import re
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import tiny

import data
from tokenizer import Tokenizer

TEXT = "".join(f"line {i}: some words, more words.\n" for i in range(500))
SENTENCES = "".join(f"Number {i} takes {i * 7 + 1}\nof them all. " for i in range(2000))
TEMPLATE = "{{ bos_token }}<|{{ messages[0].role }}|>{{ messages[0].content }}<|assistant|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tiny.checkpoint(tmp_path_factory.mktemp("plain") / "tiny"))


def row(i, context="the context of row {} is here", response="answer {}"):
    return dict(instruction=f"what is {i}?", context=context.format(i), response=response.format(i))


def write(path, rows):
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return str(path)


class Words:
    """A tokenizer whose tokens are words, spaces and single signs, without BOS and template."""

    chat_template = bos_token_id = None
    adds_bos = False

    def __init__(self):
        self.ids, self.texts = {}, []

    def encode(self, text, add_special_tokens=True):
        self.texts.append(text)
        return [self.ids.setdefault(w, len(self.ids)) for w in re.findall(r"\w+|\W", text)]

    def decode(self, ids):
        words = list(self.ids)
        return "".join(words[i] for i in ids)


def test_windows(tokenizer):
    """Exactly prompt_len + score_len tokens, BOS first; together the text, no gap, no overlap."""
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    for n in (69 * 3, 69 * 3 - 1):
        windows = data.text_windows(tokenizer.decode(ids[:n]), tokenizer, 50, 20)
        assert {(len(w.prompt), len(w.response), w.prompt[0]) for w in windows} == {(50, 20, 1)}
        read = [t for w in windows for t in w.prompt[1:] + w.response]
        assert read == ids[: n // 69 * 69]


def test_the_end_of_a_text_is_held_out(tokenizer, tmp_path):
    """The last tenth, and no training window reaches into it."""
    (tmp_path / "a.txt").write_text(TEXT)
    parts = data.load(str(tmp_path / "a.txt"), tokenizer, 50, 20)
    read = [tokenizer.decode([t for w in p for t in w.prompt[1:] + w.response]) for p in parts]
    cut = int(len(TEXT) * 0.9)
    assert TEXT[:cut].startswith(read[0]) and TEXT[cut:].startswith(read[1])
    assert len(parts[1]) >= 0.08 * len(parts[0]) > 0


def test_prompt_text(tmp_path):
    """Of a file, which is named where it is not UTF-8."""
    (path := tmp_path / "a.txt").write_bytes("né".encode())
    assert data.prompt_text(SimpleNamespace(prompt="", prompt_file=str(path))) == "né"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        data.read_text(path)


def test_split_is_by_context():
    """Each row once, no context in both parts, a tenth held out, whatever the file's order."""
    rows = [row(i, f"passage {i % 900}." + "\n" * (i % 2)) for i in range(3000)]
    rows += [row(i, " ") for i in range(1000)] + [row(1)] * 2  # without one: by the whole row
    parts = data.split_rows(rows)
    assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, rows))
    seen, unseen = ({r["context"].strip() for r in part} - {""} for part in parts)
    assert not seen & unseen and 60 < len(unseen) < 120
    assert 70 < sum(not r["context"].strip() for r in parts[1]) < 130
    some = data.split_rows(rows[1500:500:-1])  # nor does it depend on the other rows
    assert all(r in part for half, part in zip(some, parts) for r in half)


def test_rows_become_prompts(tokenizer, tmp_path):
    """Context before instruction, one BOS, response capped; what is empty or too long left out."""
    rows = [row(i) for i in range(300)] + [row("a long question without a context", " ")]
    rows += [row(1001, "a" * 200), row(1002, "a"), row(1003, response=" ")]
    parts = data.load(write(tmp_path / "r.jsonl", rows), tokenizer, 50, 8, 30, 100)
    texts = {tokenizer.decode(e.prompt): tokenizer.decode(e.response) for p in parts for e in p}
    text = "the context of row {0} is here\n\nwhat is {0}?\n\n"
    assert texts == {text.format(i): f"answer {i}"[:8] for i in range(300)}
    assert all(e.prompt[0] == 1 and (e.prompt + e.response).count(1) == 1 for e in parts[0])


def test_chat_prompt(tokenizer, tmp_path):
    """Without a template a blank line comes after the text, with one its own; BOS once in both."""
    chatty = Tokenizer(tiny.checkpoint(tmp_path / "tiny", TEMPLATE))
    for t, text in ((tokenizer, "who?\n\nit"), (chatty, "<|user|>who?<|assistant|>it")):
        ids = data.chat_prompt("who?", t, "it")
        assert t.decode(ids) == text and ids[0] == t.bos_token_id and ids.count(ids[0]) == 1


def test_equal_prompts_come_once(tokenizer, tmp_path, monkeypatch):
    """In each part, also over several sources, and not depending on the file's order."""
    rows = [row(i, response=str(k)) for i in range(100) for k in range(3)]
    names = [write(tmp_path / f"{k}.jsonl", rows[::k]) for k in (1, -1)]
    parts = data.load(names[0], tokenizer, min_prompt=1)
    assert len({tuple(e.prompt) for part in parts for e in part}) == sum(map(len, parts)) == 100
    monkeypatch.setattr(data, "dolly_file", lambda: names[1])
    assert data.load("dolly", tokenizer, min_prompt=1) == parts
    both = data.load(",".join(names), tokenizer, min_prompt=1)
    assert list(map(len, both)) == list(map(len, parts))


BAD_ROWS = {
    '{"instruction": "a", ': "not JSON",
    '{"instruction": "a", "response": "b"}': "context",
    "[1, 2]": "context",
    '{"instruction": 1, "context": "", "response": ""}': "instruction",
}


@pytest.mark.parametrize("line, message", BAD_ROWS.items())
def test_bad_rows_are_named(tokenizer, tmp_path, line, message):
    """File, line and fields, in one line. U+2028 and its like, inside a string, end no line."""
    odd = json.dumps(row(1, context="first\u2028second\x85third"), ensure_ascii=False)
    (path := tmp_path / "rows.jsonl").write_text(f"{odd}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        data.load(str(path), tokenizer)
    assert f"{path}, line 3:" in str(error.value) and "\n" not in str(error.value)


def spread(depths):
    return all(sum(n <= 5 * depth <= n + 1 for depth in depths) >= 4 for n in range(5))


@pytest.mark.parametrize("held_out", [False, True])
def test_needles(held_out):
    """One statement between sentences of the text, at any depth; its question; the answer."""
    words, depths, firsts = Words(), [], []
    needles = data.HELD_OUT_NEEDLES if held_out else data.NEEDLES
    names = data.HELD_OUT_NAMES if held_out else data.NAMES
    for example in data.needle_examples(SENTENCES, words, 400, 40, held_out):
        prompt, value = words.decode(example.prompt), words.decode(example.response).strip()
        assert re.fullmatch(r"\d{5}", value) and int(value) % 2 == held_out
        text, question, begun = prompt.rsplit("\n\n", 2)
        asked = {q.format(name=n): s.format(name=n, value=value) for n in names for s, q in needles}
        before, after = text.split(statement := asked[question])
        assert " ".join((before + after[1:]).split()) in " ".join(SENTENCES.split())
        assert before.endswith(("all. ")) or before == "" or ". " not in after[2:]
        assert 340 < len(example.prompt) < 410 and prompt.count(value) == 1
        assert statement.startswith(f"{begun} {value}") if held_out else begun == ""
        depths.append(len(before) / len(text))
        firsts.append(int(re.search(r"\d+", prompt)[0]))
    assert spread(depths) and len(set(firsts)) == 40 and firsts[0] < 10 and firsts[-1] > 1800


def test_as_many_needles_as_fit():
    """A seed gives the same again, another others; a short text gives fewer but with overlap."""
    words = Words()
    a, b, c = (data.needle_examples(SENTENCES, words, 160, 9, seed=seed) for seed in (0, 0, 1))
    assert a == b and all(one.response != other.response for one, other in zip(a, c, strict=True))
    fit = len(data.needle_examples(SENTENCES, words, 160, 10**6))
    assert fit == len(words.encode(SENTENCES)) // (160 - 2 - 48)
    overlapping = data.needle_examples(SENTENCES, words, 160, 2 * fit, overlap=True)
    assert len({tuple(e.prompt) for e in overlapping}) == 2 * fit
    assert data.needle_examples("Too short a text.", words, 160, 5, overlap=True) == []
    with pytest.raises(ValueError, match="made prompts of 50 tokens leave no room"):
        data.load("made", words, 50)


def test_copies():
    """The response stands in the text and begins with the words asked for, cut at score_len."""
    words, depths = Words(), []
    for example in data.copy_examples(SENTENCES, words, 400, 40, 9):
        text, question, end = words.decode(example.prompt).rsplit("\n\n", 2)
        response, beginning = words.decode(example.response), question.split('"')[1]
        assert " ".join(text.split()) in " ".join(SENTENCES.split()) and end == ""
        assert beginning.split() == response.split()[:4] and 340 < len(example.prompt) < 410
        assert response in text and (len(example.response) == 9 or text.endswith(response))
        depths.append(text.rindex(response) / len(text))
    assert 30 < len(depths) <= 40 and spread(depths)


def test_made(tmp_path):
    """Needles and copies in turn, of the manual and of the rows' contexts, each of its own part."""
    words, context = Words(), "Item {0} is in room {0} of it.\nBut item {0} was never seen there. "
    rows = [row(i, context=context * 3) for i in range(400) for _ in range(2)]
    parts = data.load(write(tmp_path / "r.jsonl", rows) + ",made", words, 128, 24, 10, 200)
    manual = "\n".join(topics[name] for name in sorted(topics))
    cut = int(len(manual) * 0.9)
    assert max(text.count("Item 7 is in") for text in words.texts) == 3  # that context once
    for part, half, text in zip(parts, data.split_rows(rows), (manual[:cut], manual[cut:])):
        prompts = [p for p in (words.decode(e.prompt) for e in part) if "what is " not in p]
        kinds = [("Repeat the sentence" in p, "Item " in p) for p in prompts[:8]]
        assert kinds == 2 * [(False, False), (True, False), (False, True), (True, True)]
        found = {number for p in prompts for number in re.findall(r"Item (\d+) is in", p)}
        assert found <= {r["instruction"][8:-1] for r in half} and len(found) > 10
        for copy in (p for p in prompts if "Repeat" in p and "Item " not in p):
            assert "".join(copy.rsplit("\n\n", 2)[0].split()) in "".join(text.split())


def test_sources_in_turn(tokenizer, tmp_path):
    """One example of each source in turn, until none is left; each text is tokenised once."""
    (tmp_path / "a.txt").write_text(TEXT)
    sources = [str(tmp_path / "a.txt"), write(tmp_path / "r.jsonl", [row(i) for i in range(300)])]
    windows, rows = (data.load(source, tokenizer, 50, 20, 30, 100)[0] for source in sources)
    training, n = data.load(",".join(sources), tokenizer, 50, 20, 30, 100)[0], len(windows)
    assert training[: 2 * n] == [e for pair in zip(windows, rows) for e in pair] and n > 20
    assert training[2 * n :] == rows[n:]
    words = Words()
    training, _ = data.load("made,pydoc", words, 128, 24)
    assert 80 < len(training) <= 100 and sum(len(text) > 10_000 for text in words.texts) == 2


@pytest.mark.parametrize("source", ["pydoc,nope", "missing.txt", "missing.jsonl"])
def test_bad_sources(tokenizer, source):
    message = f"^({source} does not exist|--data 'nope': choose pydoc, made,)"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load(source, tokenizer)
