"""tokenizer.py against transformers and sentencepiece, on tiny tokenizers trained here."""

import io
import json
from functools import lru_cache

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, decoders, models, normalizers, processors, trainers
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers as pre
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
    "{% set x = 1 %}{% generation -%}\n {% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    "{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}{{ {'b': '<é>', 'a': 1} | tojson }}"
    "{{ sep_token }}{{ pad_token is defined }}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
MESSAGES = [{"role": "user", "content": " the dog "}, {"role": "assistant", "content": "12"}]
LLAMA = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def bpe(folder, config=LLAMA, bos=False, truncation=False):
    """The folder, with a byte-level tokenizer.json."""
    library, alphabet = Library(models.BPE()), pre.ByteLevel.alphabet()
    library.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
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
    added = [{"content": token, "special": True} for token in ("<|im_start|>", "<|im_start|>x")]
    added += [{"content": "dog", "lstrip": True, "single_word": True, "normalized": True}]
    config = {"tokenizer_class": "LlamaTokenizer"}
    if legacy is not None:
        config |= {"legacy": legacy, "added_tokens_decoder": dict(enumerate(added, 340))}
    ours = Tokenizer(spm(tmp_path, config))
    lib = SentencePieceProcessor(model_proto=spm_model())
    vocab = {lib.id_to_piece(i): i for i in range(340)}
    merges = generate_merges(vocab, {lib.id_to_piece(i): lib.get_score(i) for i in range(340)})
    theirs = LlamaTokenizer(vocab, merges, legacy=bool(legacy), add_bos_token=True)
    if legacy is not None:
        theirs.add_tokens([AddedToken(**token) for token in added])
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_ids, ours.adds_bos) == (1, [2], True)
    for text in TEXTS:
        if not any(token in text for token in [*SPECIAL, "dog"]):
            assert ours.encode(text) == (ids := [1] + lib.encode(text)) and ours.decode(ids) == text
        if text.startswith(" ") or legacy and "> " in text:
            continue  # transformers puts no "▁" before a space; sentencepiece does
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.encode(text) == ([] if ids[:1] == [1] else [1]) + ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


END = {"content": "<|end|>", "special": True}
DECODER = {300: END, 301: {"content": "<x>"}, 302: {"content": "dog", "lstrip": True}}
ADDED = [  # (tokenizer_config.json, special_tokens_map.json, added_tokens.json)
    ({"added_tokens_decoder": DECODER, "eos_token": "<|end|>"}, {"eos_token": "<x>"}, {}),
    ({}, {"eos_token": END | {"rstrip": True}}, {"<x>": 301, "<|end|>": 300}),
    ({"mask_token": "<x>", "image_token": "dog", "pad_token": "<|end|>"}, {}, {}),
    ({"additional_special_tokens": ["<x>", "dog"]}, {}, {}),
    ({"extra_special_tokens": {"boi_token": "<x>"}, "eos_token": "<|end|>"}, {}, {}),
]


@pytest.mark.parametrize("config, special, added", ADDED)
def test_added_tokens_are_transformers(tmp_path, config, special, added):
    bpe(tmp_path, LLAMA | config)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs) and ours.eos_token_ids == [theirs.eos_token_id]
    for text in [*TEXTS, "the <|end|> dog<x>", "<|end|>\nx"]:
        assert ours.encode(text) == (ids := theirs.encode(text))
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_added_tokens_beside_a_sentencepiece_model(tmp_path):
    """In the older files alone; one that is not special is not skipped in decoding."""
    spm(tmp_path, {"legacy": False, "add_bos_token": False, "add_eos_token": True})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 341, "<|end|>": 340}')
    tokenizer, lib = Tokenizer(tmp_path), SentencePieceProcessor(model_proto=spm_model())
    assert tokenizer.encode("dog<|end|><x>") == (ids := [*lib.encode("dog"), 340, 341, 340])
    assert tokenizer.decode([*ids, 999]) == "dog<x>" and not tokenizer.adds_bos
    assert tokenizer.eos_token_ids == [2, 340]
    with pytest.raises(ValueError, match="a gap before its id 999 is not supported"):
        Tokenizer(spm(tmp_path, {"added_tokens_decoder": {999: END}}))


def test_llama_class_goes_before_tokenizer_json(tmp_path):
    """transformers 5 builds LlamaTokenizer anew: no space after a special token, unless legacy."""
    config = {"tokenizer_class": "LlamaTokenizer"}
    library = Library(models.BPE({t: i for i, t in enumerate([*SPECIAL, "▁", "a"])}, []))
    library.normalizer = normalizers.Prepend("▁")
    library.add_special_tokens(SPECIAL)
    library.save(str(tmp_path / "tokenizer.json"))
    code = {"tokenizer_class": "CodeLlamaTokenizer"}
    for more in {"legacy": False}, {"legacy": True}, {"add_prefix_space": False}, code, None:
        family = "mistral" if more is None else "llama"
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **(more or {})}))
        ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for text in ("a</s>a", " a </s> a"):
            ids = ours.encode(text, add_special_tokens=False)
            assert ids == theirs.encode(text, add_special_tokens=False)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("form", ["string", "list", "dict", "chat_template", "default"])
def test_chat_template_is_transformers(tmp_path, form):
    """With one BOS in what is encoded, whether or not the tokenizer adds its own."""
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    value = {"string": TEMPLATE, "list": several, "dict": {"default": TEMPLATE}}.get(form, "no")
    config = {**LLAMA, "chat_template": value, "sep_token": "<x>"}
    folder = bpe(tmp_path, config, bos=form == "list")
    if value == "no":
        place = folder / ("additional_chat_templates" if form == "default" else "")
        place.mkdir(exist_ok=True)
        (place / f"{form}.jinja").write_text(TEMPLATE)
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
    for template, says in ({"rag": ""}, "rag. without default"), ("{% x %}", ": Encountered"):
        with pytest.raises(ValueError, match=f"not supported{says}|{says}: not supported"):
            Tokenizer(bpe(tmp_path, {"chat_template": template})).apply_chat_template(MESSAGES)
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
    broken |= {"generation_config.json": "1", "tokenizer_config.json": "{"}
    for name, text in broken.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(
            ValueError, match=f"^{tmp_path / name}:? (not readable|is not)"
        ) as error:
            Tokenizer(tmp_path)
        assert "\n" not in str(error.value)
