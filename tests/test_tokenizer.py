"""tokenizer.py against transformers and sentencepiece, on tiny tokenizers trained here."""

import json

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "def f(x):\n    return x ** 2", "naïve 漢字 2024"] * 20
TEXTS = [
    "",
    "the dog",
    "  two  spaces ",
    "a\n\n\tb\r\n",
    "12345 naïve 漢字 😀",
    "<s>the fox</s>the dog",
    "the</s> the dog",
    "<|im_start|>the",
    "x<|im_start|>",
    "<s><s>the",
    "</s>",
    "a<unk>b",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "  {% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "<|im_start|>{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if tools is not none %}TOOLS{% endif %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
MESSAGES = [{"role": "user", "content": " the dog "}, {"role": "assistant", "content": "12"}]
LLAMA = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def bpe(tmp_path):
    """make(config, post_processor, truncation, **other files) -> folder with a byte-level tokenizer.json."""

    def make(config=LLAMA, bos=False, truncation=False, **files):
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        library.train_from_iterator(
            CORPUS,
            trainers.BpeTrainer(
                vocab_size=300,
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
            ),
        )
        if bos:
            library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        if truncation:
            library.enable_truncation(4)
        library.save(str(tmp_path / "tokenizer.json"))
        for name, value in {"tokenizer_config": config, **files}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return make


@pytest.fixture(scope="module")
def spm_model(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("spm") / "m"
    (prefix.parent / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(prefix.parent / "corpus.txt"),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,  # as Llama's
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def spm(tmp_path, spm_model):
    """make(config or None) -> folder with a sentencepiece tokenizer.model."""

    def make(config=None):
        (tmp_path / "tokenizer.model").write_bytes(spm_model.read_bytes())
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(bos=True),
        dict(truncation=True),
        dict(config={**LLAMA, "add_bos_token": True}),
        dict(config={**LLAMA, "add_bos_token": False}, bos=True),
        dict(config={**LLAMA, "bos_token": None}),
    ],
    ids=str,
)
def test_bpe_is_transformers(bpe, case):
    folder = bpe(**case)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs) and ours.bos_token_id == theirs.bos_token_id
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        ids = theirs.encode(text)
        if ids[:2] == [1, 1] and case.get("bos"):  # the one intended difference
            ids = ids[1:]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_exactly_one_bos(bpe, spm):
    tokenizer = Tokenizer(bpe({**LLAMA, "chat_template": TEMPLATE}, bos=True))
    assert tokenizer.encode("the dog").count(1) == 1
    assert tokenizer.encode(tokenizer.apply_chat_template(MESSAGES)).count(1) == 1
    (tokenizer.folder / "tokenizer.json").unlink()
    tokenizer = Tokenizer(spm({}))
    assert tokenizer.encode("the dog").count(1) == tokenizer.encode("<s>the dog").count(1) == 1
    assert tokenizer.encode("the dog", add_special_tokens=False).count(1) == 0


def test_written_bos_stays_where_none_is_added(bpe):
    assert Tokenizer(bpe()).encode("<s><s>")[:2] == [1, 1]


@pytest.mark.parametrize("legacy", [None, False, True])
def test_sentencepiece_is_transformers(spm, legacy):
    folder = spm(
        None
        if legacy is None
        else {"legacy": legacy, "added_tokens_decoder": {"340": {"content": "<|im_start|>", "special": True}}}
    )
    ours = Tokenizer(folder)
    lib = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {lib.id_to_piece(i): i for i in range(340)}
    scores = {lib.id_to_piece(i): lib.get_score(i) for i in range(340)}
    theirs = LlamaTokenizer(vocab, generate_merges(vocab, scores), legacy=bool(legacy), add_bos_token=True)
    if legacy is not None:
        theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, [2])
    for text in TEXTS:
        if not any(token in text for token in SPECIAL):
            assert ours.encode(text) == [1] + lib.encode(text)
            assert ours.decode(ours.encode(text)) == text
        if text.startswith(" ") or legacy and "> " in text:
            continue  # transformers 5 puts no "▁" in front of a space; sentencepiece, the model's own, does
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == ([] if ids[:1] == [1] else [1]) + ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


def test_sentencepiece_add_bos_token(spm):
    assert Tokenizer(spm({"add_bos_token": False})).encode("the")[0] != 1
    assert Tokenizer(spm({"add_eos_token": True})).encode("the")[-1] == 2


@pytest.mark.parametrize("form", ["string", "list", "file"])
def test_chat_template_is_transformers(bpe, form):
    other = {"name": "rag", "template": "no"}
    value = {"string": TEMPLATE, "list": [other, {"name": "default", "template": TEMPLATE}], "file": "no"}[form]
    folder = bpe({**LLAMA, "chat_template": value})
    if form == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)
        assert ours.apply_chat_template(MESSAGES, prompt) == expected
        assert expected.startswith("<s>") and expected.endswith("assistant") == prompt


def test_chat_template_errors(bpe):
    with pytest.raises(ValueError, match="no chat_template"):
        Tokenizer(bpe()).apply_chat_template(MESSAGES)
    with pytest.raises(ValueError, match="no tools"):
        Tokenizer(bpe({"chat_template": TEMPLATE})).apply_chat_template([{"role": "tool", "content": ""}])
    messages = list(MESSAGES)
    for attack in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}"):
        try:
            assert Tokenizer(bpe({"chat_template": attack})).apply_chat_template(messages) == ""
        except ValueError:
            pass
        assert messages == MESSAGES


def test_ends_of_text_from_all_configs(bpe):
    folder = bpe(generation_config={"eos_token_id": [7, 5]})
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 9, "bos_token_id": 3}))
    assert Tokenizer(folder).eos_token_ids == [2, 5, 7, 9]
    assert Tokenizer(folder).bos_token_id == 1
    assert Tokenizer(bpe({**LLAMA, "bos_token": None})).bos_token_id is None  # as Qwen2
    assert Tokenizer(bpe({"bos_token": {"content": "</s>", "__type": "AddedToken"}})).bos_token_id == 2
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).bos_token_id == 3


def test_token_texts(bpe, spm):
    tokenizer = Tokenizer(bpe())
    ids = tokenizer.encode("the dog</s>")
    assert "".join(tokenizer.token_texts(ids)) == "the dog</s>" and len(tokenizer.token_texts(ids)) == len(ids)
    (tokenizer.folder / "tokenizer.json").unlink()
    texts = Tokenizer(spm({})).token_texts([1, *Tokenizer(spm({})).encode("the  dog", False)])
    assert texts[:2] == ["<s>", "the"] and "" not in texts


def test_errors_name_the_file(bpe):
    def message(folder, kind):
        with pytest.raises(kind) as error:
            Tokenizer(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    folder = bpe()
    assert "nowhere" in message(folder / "nowhere", FileNotFoundError)
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in message(folder, ValueError)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in message(folder, ValueError)
    (folder / "tokenizer.json").unlink()
    assert "neither" in message(folder, FileNotFoundError)
    (folder / "tokenizer.model").write_bytes(b"junk")
    assert "tokenizer.model" in message(folder, ValueError)
