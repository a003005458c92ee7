"""tokenizer.py against transformers and sentencepiece, on tiny tokenizers trained here."""

import io
import json
from functools import lru_cache

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from tokenizer import Tokenizer

CORPUS = 20 * ["the quick brown fox jumps over the lazy dog", "def f(x):", "naïve 漢字"]
TEXTS = ["", "the dog", "  two  spaces ", "a\n\n\tb\r\n", "12345 naïve 漢字 😀"]
TEXTS += ["<s>the fox</s>the dog", "the</s> the dog", "<|im_start|>the", "x<|im_start|>xx"]
TEXTS += ["<s><s>the", "</s>", "a<unk>b"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "  {% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "<|im_start|>{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% for x in 'ab' %}{{ x }}{% break %}{% endfor %}{% if tools is not none %}TOOLS{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
MESSAGES = [{"role": "user", "content": " the dog "}, {"role": "assistant", "content": "12"}]
LLAMA = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def bpe(folder, config=LLAMA, bos=False, truncation=False):
    """The folder, with a byte-level tokenizer.json."""
    library, alphabet = Library(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    how = dict(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=special, **how))
    if bos:
        library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    if truncation:
        library.enable_truncation(4)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@lru_cache
def spm_model():
    """A tokenizer.model as Llama's, of 340 pieces, as bytes."""
    how = dict(model_type="bpe", vocab_size=340, byte_fallback=True, minloglevel=2)
    how |= dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    out = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=out, **how)
    return out.getvalue()


def spm(folder, config):
    """The folder, with a sentencepiece tokenizer.model."""
    (folder / "tokenizer.model").write_bytes(spm_model())
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CASES = [dict(), dict(bos=True), dict(truncation=True), dict(config=LLAMA | {"bos_token": None})]
CASES += [dict(config=LLAMA | {"add_bos_token": bos}, bos=not bos) for bos in (True, False)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bpe_is_transformers(tmp_path, case):
    folder = bpe(tmp_path, **case)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs) and ours.bos_token_id == theirs.bos_token_id
    assert ours.adds_bos == (theirs.encode("the")[0] == 1)
    for text in TEXTS:
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
        ids = theirs.encode(text)
        twice = ids[:2] == [1, 1] and ours.adds_bos  # the one intended difference
        assert ours.encode(text) == ids[twice:]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("legacy", [None, False, True])
def test_sentencepiece_is_transformers(tmp_path, legacy):
    added = ["<|im_start|>", "<|im_start|>x"]
    config = {"added_tokens_decoder": {str(340 + i): {"content": added[i]} for i in (0, 1)}}
    ours = Tokenizer(spm(tmp_path, {} if legacy is None else config | {"legacy": legacy}))
    lib = SentencePieceProcessor(model_proto=spm_model())
    vocab = {lib.id_to_piece(i): i for i in range(340)}
    merges = generate_merges(vocab, {lib.id_to_piece(i): lib.get_score(i) for i in range(340)})
    theirs = LlamaTokenizer(vocab, merges, legacy=bool(legacy), add_bos_token=True)
    if legacy is not None:
        theirs.add_special_tokens({"additional_special_tokens": added})
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_ids, ours.adds_bos) == (1, [2], True)
    for text in TEXTS:
        if not any(token in text for token in SPECIAL):
            assert ours.encode(text) == (ids := [1] + lib.encode(text)) and ours.decode(ids) == text
        if text.startswith(" ") or legacy and "> " in text:
            continue  # transformers puts no "▁" before a space; sentencepiece does
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.encode(text) == ([] if ids[:1] == [1] else [1]) + ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


def test_sentencepiece_adds_what_the_config_says(tmp_path):
    tokenizer = Tokenizer(spm(tmp_path, {"add_bos_token": False}))
    assert tokenizer.encode("the")[0] != 1 and not tokenizer.adds_bos
    assert Tokenizer(spm(tmp_path, {"add_eos_token": True})).encode("the")[-1] == 2


@pytest.mark.parametrize("form", ["string", "list", "file"])
def test_chat_template_is_transformers(tmp_path, form):
    """With one BOS in what is encoded, whether or not the tokenizer adds its own."""
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    value = {"string": TEMPLATE, "list": several, "file": "no"}[form]
    folder = bpe(tmp_path, {**LLAMA, "chat_template": value}, bos=form == "list")
    if form == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        text = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)
        assert ours.apply_chat_template(MESSAGES, prompt) == text
        assert text.startswith("<s>") and text.endswith("assistant") == prompt
        assert ours.encode(text).count(1) == 1


def test_chat_template_errors(tmp_path):
    with pytest.raises(ValueError, match="no chat_template"):
        Tokenizer(bpe(tmp_path)).apply_chat_template(MESSAGES)
    with pytest.raises(ValueError, match="no tools"):
        tokenizer = Tokenizer(bpe(tmp_path, {"chat_template": TEMPLATE}))
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])
    messages = list(MESSAGES)
    for attack in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1] }}"):
        with pytest.raises(ValueError, match="unsafe|undefined"):
            Tokenizer(bpe(tmp_path, {"chat_template": attack})).apply_chat_template(messages)
        assert messages == MESSAGES


def test_ends_of_text_from_all_configs(tmp_path):
    folder = bpe(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 9, "bos_token_id": 3}))
    assert Tokenizer(folder).eos_token_ids == [2, 5, 7, 9]
    assert Tokenizer(folder).bos_token_id == 1
    assert Tokenizer(bpe(tmp_path, {**LLAMA, "bos_token": None})).bos_token_id is None  # as Qwen2
    assert Tokenizer(bpe(tmp_path, {"bos_token": {"content": "</s>"}})).bos_token_id == 2
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).bos_token_id == 3


def test_token_texts(tmp_path):
    tokenizer = Tokenizer(spm(tmp_path, {}))
    texts = tokenizer.token_texts(tokenizer.encode("the  dog"))
    assert texts[:2] == ["<s>", "the"] and "" not in texts
    tokenizer = Tokenizer(bpe(tmp_path))
    texts = tokenizer.token_texts(ids := tokenizer.encode("the dog</s>"))
    assert "".join(texts) == "the dog</s>" and len(texts) == len(ids)


def test_errors_name_the_file(tmp_path):
    """In one line; each file here is read before those that are broken already."""
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: has neither"):
        Tokenizer(tmp_path)
    broken = {"tokenizer.model": "junk", "tokenizer.json": "{}", "config.json": "[]"}
    for name, text in {
        **broken,
        "generation_config.json": "1",
        "tokenizer_config.json": "{",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: not readable") as error:
            Tokenizer(tmp_path)
        assert "\n" not in str(error.value)
