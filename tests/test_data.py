"""data.py: windows of text, rows in Dolly's fields, and what is held out."""

import json
import re

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


def test_chat_prompt(tokenizer, tmp_path):
    """Without a template the text and a blank line after BOS; with one, the template's, with one BOS too."""
    assert tokenizer.decode(data.chat_prompt("who?", tokenizer)) == "who?\n\n"
    template = "{{ bos_token }}<|{{ messages[0].role }}|>{{ messages[0].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    chat = Tokenizer(tiny.checkpoint(tmp_path / "tiny", chat_template=template))
    assert chat.decode(data.chat_prompt("who?", chat)) == "<|user|>who?<|assistant|>"
    for t in (tokenizer, chat):
        ids = data.chat_prompt("who?", t)
        assert ids[0] == t.bos_token_id and ids.count(t.bos_token_id) == 1


# ---------------------------------------------------------------------------- made prompts


class Words:
    """A tokenizer whose tokens are words, spaces and single signs, without BOS and chat template."""

    chat_template = bos_token_id = None
    adds_bos = False

    def __init__(self):
        self.ids, self.words = {}, []

    def encode(self, text, add_special_tokens=True):
        for word in re.findall(r"\w+|\W", text):
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
        return [self.ids[word] for word in re.findall(r"\w+|\W", text)]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


SENTENCES = "".join(f"Number {i} takes {i * 7 + 1}\nof them all. " for i in range(2000))  # 15 words and signs each


def taken_apart(example, words, held_out):
    """(the text around the statement, share of the text before it, name, template) of a needle Example, checked on the way."""
    prompt, value = words.decode(example.prompt), words.decode(example.response)
    assert value.startswith(" ") == held_out
    prompt, begun, value = *prompt.rpartition("\n\n")[::2], value.strip()
    assert re.fullmatch(r"\d{5}", value) and prompt.count(value) == 1
    text, question = prompt.rsplit("\n\n", 1)
    found = [
        (name, template)
        for name in data.NAMES[held_out]
        for template in data.NEEDLES[held_out]
        if template[1].format(name=name) == question
    ]
    ((name, template),) = found
    assert begun == "".join(template[2:]).format(name=name)
    before, after = text.split(template[0].format(name=name, value=value))
    assert before[-1:] in ("", " ") and after[:1] in ("", " ")
    return before + after.lstrip(), len(before) / len(before + after), name, template


@pytest.mark.parametrize("held_out", [False, True])
def test_needles(held_out):
    """The answer stands once, in its statement, between two sentences of a piece of the text; the question for it is the end."""
    words, names, templates, depths = Words(), set(), set(), []
    examples = data.needle_examples(SENTENCES, words, 400, 40, held_out)
    assert len(examples) == 40
    for example in examples:
        text, depth, name, template = taken_apart(example, words, held_out)
        assert " ".join(text.split()) in " ".join(SENTENCES.split())
        assert abs(len(example.prompt) - 400) <= 64
        names.add(name), templates.add(template), depths.append(depth)
    assert names <= set(data.NAMES[held_out]) and len(names) > 4 and templates == set(data.NEEDLES[held_out])
    for fifth in range(5):
        assert sum(fifth / 5 <= depth <= (fifth + 1) / 5 for depth in depths) >= 4


class Begun(Words):
    """As sentencepiece: a text's first token is another one than within a text."""

    def encode(self, text, add_special_tokens=True):
        return super().encode("_" + text)


def test_needles_answers():
    """To train on, the answer is a text of its own, as a row's response is; else the tokens that go on with its beginning."""
    for held_out, answer in ((False, r"_\d{5}"), (True, r" \d{5}")):
        for example in data.needle_examples(SENTENCES, words := Begun(), 400, 8, held_out):
            assert re.fullmatch(answer, words.decode(example.response))


def test_needles_between_sentences():
    """The statement follows the end of a sentence, and the starts of the pieces are spread over the whole text."""
    words = Words()
    texts = [words.decode(e.prompt) for e in data.needle_examples(SENTENCES, words, 400, 15)]
    statement = re.compile("|".join(s.format(name=r"\w+", value=r"\d{5}") for s, _ in data.NEEDLES[0]))
    cuts = [(t[: m.start()], t[m.end() :]) for t in texts for m in [statement.search(t)]]
    assert all(before.endswith("all. ") and after.startswith(" Number ") or ". " not in after for before, after in cuts)
    assert (
        sum(before.endswith("all. ") for before, _ in cuts) >= 12
    )  # the others' depth is in the piece's last sentence
    firsts = [int(re.search(r"Number (\d+)", t)[1]) for t in texts]
    assert firsts == sorted(firsts) and firsts[0] < 10 and firsts[-1] > 1800
    assert max(b - a for a, b in zip(firsts, firsts[1:])) < 200


def test_needles_by_seed():
    """A seed gives the same examples again, another seed other needles in the same text; a short text gives fewer."""
    words = Words()
    first, again, other = (
        data.needle_examples(SENTENCES, words, 160, 10, seed=seed) for seed in (0, 0, 1)
    )  # fmt: skip
    assert first == again and all(a.response != b.response for a, b in zip(first, other, strict=True))
    assert taken_apart(first[3], words, False)[0] == taken_apart(other[3], words, False)[0]
    count = len(words.encode(SENTENCES)) // (160 - 64)
    assert len(data.needle_examples(SENTENCES, words, 160, 10**6)) == count
    overlapping = data.needle_examples(SENTENCES, words, 160, 2 * count, overlap=True)
    assert len(overlapping) == 2 * count and len({tuple(e.prompt) for e in overlapping}) == 2 * count
    assert data.needle_examples("Too short a text.", words, 160, 5, overlap=True) == []


def test_held_out_needles_are_in_other_words():
    """No name, statement or question to train on is also one to measure on."""
    assert not set(data.NAMES[0]) & set(data.NAMES[1])
    for part in range(2):
        assert not {t[part] for t in data.NEEDLES[0]} & {t[part] for t in data.NEEDLES[1]}
    assert {len(t) for t in data.NEEDLES[0]} == {2} and {len(t) for t in data.NEEDLES[1]} == {3}


def test_copies():
    """The response stands in the prompt word for word, a sentence that begins with the words asked for, cut at score_len."""
    words = Words()
    for score_len in (100, 9):
        examples = data.copy_examples(SENTENCES, words, 400, 40, score_len)
        assert 30 < len(examples) <= 40 and all(abs(len(e.prompt) - 400) <= 64 for e in examples)
        whole, depths = 0, []
        for example in examples:
            prompt, response = words.decode(example.prompt), words.decode(example.response)
            text, question = prompt.rsplit("\n\n", 2)[:2]
            assert " ".join(text.split()) in " ".join(SENTENCES.split()) and text.count(response) == 1
            beginning = re.fullmatch('Repeat the sentence of the text that begins with "(.*)".', question)[1]
            assert beginning.split() == response.split()[:4] and len(example.response) <= score_len
            whole += bool(re.fullmatch(r"Number \d+ takes \d+\nof them all", response))
            depths.append(text.index(response) / len(text))
        assert whole >= (35 if score_len == 100 else 0)  # of the others the piece has only a part
        for fifth in range(5):
            assert sum(fifth / 5 <= depth <= (fifth + 1) / 5 for depth in depths) >= 4


def kind(prompt):
    """What a made prompt asks for."""
    if 'Repeat the sentence of the text that begins with "' in prompt:
        return "copy"
    questions = [question for part in data.NEEDLES for _, question, *_ in part]
    last = prompt.rpartition("\n\n")[0].rsplit("\n\n", 1)[-1]
    asked = any(re.fullmatch(re.escape(q).replace(r"\{name\}", r"[\w-]+"), last) for q in questions)
    return "needle" if asked else "window"


def test_made():
    """Needles, copies and windows in turn, each of two lengths; each part from its own tenths of the manual, the held-out
    needles in the held-out words with answers of their own."""
    words = Words()
    parts = data.load("made", words, 128, 24)
    manual = "\n".join(data.topics[name] for name in sorted(data.topics))
    cut, answers = int(len(manual) * 0.9), []
    for held_out, (part, source) in enumerate(zip(parts, (manual[:cut], manual[cut:]))):
        source, values, counts = "".join(source.split()), set(), {}
        for i, example in enumerate(part):
            prompt = words.decode(example.prompt)
            what, length = kind(prompt), min((128, 256), key=lambda n: abs(n - len(example.prompt)))
            counts[what, length] = counts.get((what, length), 0) + 1
            if i < 60:
                assert (what, length) == (("needle", "copy", "window")[i // 2 % 3], (128, 256)[i % 2])
            if what == "needle":
                text = taken_apart(example, words, held_out)[0]
                values.add(words.decode(example.response))
            elif what == "copy":
                text = prompt.rsplit("\n\n", 2)[0]
                assert words.decode(example.response) in text
            else:
                text = words.decode(example.prompt + example.response)
                assert len(example.prompt) == length and len(example.response) == 24
            assert "".join(text.split()) in source
        long_windows = counts.pop(("window", 256))
        assert len(counts) == 5 and all(10 < count < 55 for count in counts.values()) and 55 < long_windows < 210
        answers.append(values)
    assert not answers[0] & answers[1]
    assert parts == data.load("made", words, 128, 24)


def test_made_of_contexts(tmp_path):
    """Beside rows, made prompts are of the rows' contexts too, of those of their own part alone."""
    words, context = Words(), "Item {0} is in room {0} of the house.\nBut item {0} was never seen there. "
    rows = [row(i, context=context * 3) for i in range(400)]
    parts = data.load(write(tmp_path / "r.jsonl", rows) + ",made", words, 128, 24, 10, 200)
    for part, half in zip(parts, data.split_rows(rows)):
        texts = [text for text in (words.decode(e.prompt) for e in part) if "Item " in text and "what is " not in text]
        assert {kind(text) for text in texts} == {"needle", "copy", "window"}
        numbers, own = {n for t in texts for n in re.findall(r"Item (\d+) ", t)}, {r["instruction"] for r in half}
        assert len(numbers) > len(half) / 4 and {f"what is {n}?" for n in numbers} <= own
        assert sum("Item " not in words.decode(e.prompt) for e in part) > 40  # the manual's


def test_texts_are_tokenised_once():
    """Both parts of the manual, once each, however many kinds and lengths are made of them."""
    words, seen = Words(), []
    encode = words.encode
    words.encode = lambda text, **more: seen.append(len(text)) or encode(text, **more)
    data.load("made,pydoc", words, 128, 24)
    assert len([n for n in seen if n > 10_000]) == 2


def test_no_more_crowded_rows_than_used(tmp_path, monkeypatch):
    """Crowded rows are encoded until CROWDED of them fit; these are the first that fit, in their order."""
    words, rows, seen = Words(), [row(i, context="Item {0} is here. " * (1 + i % 3)) for i in range(300)], []
    every = [list(data.row_examples(data.crowded(half), words, 24, 10, 60)) for half in data.split_rows(rows)]
    assert all(7 < len(examples) < len(half) for examples, half in zip(every, data.split_rows(rows)))
    monkeypatch.setattr(data, "CROWDED", 7)
    monkeypatch.setattr(data, "crowded", lambda rows, of=data.crowded: (seen.append(r) or r for r in of(rows)))
    got = data.load("made," + write(tmp_path / "r.jsonl", rows), words, 128, 24, 10, 60)
    plain = data.load(str(tmp_path / "r.jsonl"), words, 128, 24, 10, 60)
    assert len(seen) < 60
    for part, examples, alone in zip(got, every, plain):
        assert (
            [e for e in part if e in examples and e not in alone] == [e for e in examples[:7] if e not in alone] != []
        )


@pytest.mark.parametrize("prompt_len", [20, 64])
def test_made_prompts_too_short(prompt_len):
    """A prompt_len without room for a text around the needle is refused."""
    with pytest.raises(ValueError, match=f"{prompt_len}"):
        data.load("made", Words(), prompt_len)


def test_sources_in_turn(tokenizer, tmp_path):
    """Sources with commas give one example of each in turn, until none is left, in the training and in the held-out part."""
    (tmp_path / "a.txt").write_text(TEXT)
    sources = [
        str(tmp_path / "a.txt"),
        write(tmp_path / "r.jsonl", [row(i) for i in range(300)]),
        str(tmp_path / "a.txt"),
    ]
    how = (tokenizer, 50, 20, 30, 100)
    single = [data.load(source, *how) for source in sources]
    got = data.load(",".join(sources), *how)
    assert len(got) == 2
    for part, lists in zip(got, zip(*single)):
        lists, expected = [list(examples) for examples in lists], []
        while any(lists):
            expected += [examples.pop(0) for examples in lists if examples]
        assert list(part) == expected and len(expected) > 20
    with pytest.raises(ValueError, match="--data nope"):
        data.load(f"{sources[0]},nope", *how)


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


def test_crowded():
    """Each row's context stands whole among up to three other rows' contexts, at every place; question and answer stay."""
    rows = [row(i, context=f"[Context {i}.]") for i in range(40)] + [row(99, context="  ")]
    crowded, places = list(data.crowded(rows)), set()
    assert [r["response"] for r in crowded] == [r["response"] for r in rows[:40]]
    for i, r in enumerate(crowded):
        parts = r["context"].split("\n\n")
        assert 1 <= len(parts) <= 4 and parts.count(f"[Context {i}.]") == 1 and len(set(parts)) == len(parts)
        assert set(parts) <= {f"[Context {k}.]" for k in range(40)} and r["instruction"] == rows[i]["instruction"]
        places.add((parts.index(f"[Context {i}.]"), len(parts)))
    assert {(0, 4), (1, 4), (2, 4), (3, 4), (0, 2), (1, 2)} <= places
    assert crowded == list(data.crowded(rows))
