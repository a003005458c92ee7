"""Text <-> token ids for a checkpoint folder.

From its tokenizer.json (library `tokenizers`) or tokenizer.model (sentencepiece):

    tokenizer = Tokenizer("checkpoints/smollm2-135m-q4")
    ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]))
"""

import json
from datetime import datetime
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, pre_tokenizers

import checkpoint


class Tokenizer:
    """The ids are those of Hugging Face's tokenizer for the folder, but for one thing: a text that
    already begins with BOS (a rendered chat template, say) does not get a second one.

    chat_template: str, None, or a dict of several without a default. bos_token, eos_token: str or
    None. bos_token_id: int or None. adds_bos: whether encode() begins with it. eos_token_ids: list
    of int, any of which ends a generation.
    Raises FileNotFoundError (no folder, no tokenizer in it) or ValueError (an unreadable file)."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # older versions of transformers wrote two files
            config |= read_json(folder / "special_tokens_map.json")
            added = read_json(folder / "added_tokens.json")
            config["added_tokens_decoder"] = {i: {"content": token} for token, i in added.items()}
        sources = [read_json(folder / f"{name}.json") for name in ("generation_config", "config")]
        kinds = {"tokenizer.json": TokenizerJson, "tokenizer.model": Sentencepiece}
        path = next((folder / name for name in kinds if (folder / name).is_file()), None)
        if path is None:
            missing = "neither tokenizer.json nor tokenizer.model; others are not supported"
            raise FileNotFoundError(f"{folder}: has {missing}")
        try:
            self.backend = kinds[path.name](path, config, sources[1].get("model_type"))
        except Exception as error:  # both libraries raise bare ones for a damaged file
            raise ValueError(f"{path}: not readable as a tokenizer ({error})") from error
        self.vocab_size = self.backend.size

        def special(kind):
            if kind in self.backend.names or kind in config:  # null too: so Qwen2 has no BOS
                return self.backend.names.get(kind)
            ids = [source.get(f"{kind}_id") for source in sources]
            return next((self.backend.token(i) for i in ids if isinstance(i, int) and i >= 0), None)

        self.bos_token, self.eos_token = special("bos_token"), special("eos_token")
        self.bos_token_id = self.backend.id(self.bos_token)
        self.adds_bos = self.backend.encode("", True)[:1] == [self.bos_token_id]
        eos_ids = {self.backend.id(self.eos_token)}
        for ids in (source.get("eos_token_id") for source in sources):
            eos_ids.update(ids if isinstance(ids, list) else [ids])
        self.eos_token_ids = sorted(eos_ids - {None})
        self.chat_template = chat_template(folder, config.get("chat_template"))

    def encode(self, text, add_special_tokens=True):
        """str -> list of int. Special tokens written in the text become their single ids."""
        ids = self.backend.encode(text, add_special_tokens)
        twice = add_special_tokens and self.adds_bos and ids[1:2] == [self.bos_token_id]
        return ids[1:] if twice else ids

    def decode(self, ids, skip_special_tokens=True):
        """Sequence of int -> str."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens)

    def token_texts(self, ids):
        """The text of each token by itself: list of str. Part of a character gives U+FFFD."""
        return [self.decode([i], False) or " " for i in ids]  # sentencepiece's lone "▁" gives ""

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """list of {"role": str, "content": str} -> the prompt, BOS included if the template has it.
        Raises ValueError where there is no chat template, or where it refuses the messages."""
        if self.chat_template is None:
            raise ValueError(f"{self.folder}: no chat_template; give the prompt as plain text")
        if isinstance(self.chat_template, dict):
            names = ", ".join(self.chat_template)
            what = f"chat templates ({names}) without default"
            raise ValueError(f"{self.folder}: {what}: not supported")
        variables = dict(messages=messages, add_generation_prompt=add_generation_prompt)
        variables |= dict(self.backend.names, tools=None, documents=None)
        try:
            return compiled(self.chat_template).render(variables)
        except Exception as error:  # a template is code
            reason = " ".join(str(error).split())
            says = "its chat template refuses, or is not supported"
            raise ValueError(f"{self.folder}: {says}: {reason}") from error


def chat_template(folder, found):
    """The template that transformers takes from a folder: of its files or, without any, of what
    tokenizer_config.json has. {name: template} where there are several and no default, or None."""
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    paths = {"default": folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    files = {name: p.read_text(encoding="utf-8") for name, p in paths.items() if p.is_file()}
    found = files or found
    return found.get("default", found) if isinstance(found, dict) else found


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant says, and writes it."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def raise_exception(message):
    raise jinja2.TemplateError(message)


# A sandbox, as templates are code that came with a download. They know these names.
TEMPLATES = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
TEMPLATES.add_extension("jinja2.ext.loopcontrols")
TEMPLATES.add_extension(GenerationBlock)
TEMPLATES.globals["raise_exception"] = raise_exception
TEMPLATES.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
TEMPLATES.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own is for HTML
compiled = lru_cache(TEMPLATES.from_string)  # takes longer than encoding a prompt


def read_json(path):
    """The object in a JSON file; empty if there is no such file. Raises ValueError."""
    return checkpoint.read_json(path) if path.is_file() else {}


def add_tokens(library, config):
    """Add what tokenizer_config.json adds to a tokenizers.Tokenizer, in transformers' order: tokens
    with an id, then special ones that the vocabulary lacks. Returns {"bos_token": text, ...}."""

    def token(value, **flags):  # a string, or a dict of content and flags
        value = value if isinstance(value, dict) else {"content": value}
        return AddedToken(**{k: v for k, v in {**value, **flags}.items() if k != "__type"})

    order = [f"{kind}_token" for kind in "bos eos unk sep pad cls mask".split()]
    order += [name for name in config if name.endswith("_token")]
    named = {k: config[k] for k in order if isinstance(config.get(k), (str, dict))}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = named | extra, []
    special = [token(value, special=True) for value in [*named.values(), *extra]]
    texts, added = [t.content for t in special], {}
    for i, value in config["added_tokens_decoder"].items():
        is_special = value.get("special", False) or value["content"] in texts
        added[int(i)] = token(value, special=is_special)
    known = library.get_vocab()
    library.add_tokens([added[i] for i in sorted(added)])
    for i, t in added.items():
        if t.content not in known and library.token_to_id(t.content) != i:
            raise ValueError(f"added token {t.content!r}: a gap before its id {i} is not supported")
    held = {t.content for t in library.get_added_tokens_decoder().values()}
    library.add_tokens([t for t in special if t.content not in held])
    return dict(zip(named, texts))


class TokenizerJson:
    def __init__(self, path, config, model_type):
        self.library = tokenizers.Tokenizer.from_file(str(path))
        self.library.no_truncation()  # some files ask for it, and would cut long prompts silently
        self.library.no_padding()
        self.names = add_tokens(self.library, config)
        ids = self.library.get_vocab()
        self.id, self.token, self.size = ids.get, self.library.id_to_token, len(ids)
        named = (config.get("tokenizer_class") or "").removesuffix("Fast").removeprefix("Code")
        named = named == "LlamaTokenizer" and model_type in (None, "llama")
        if named and '"ByteLevel"' not in path.read_text("utf-8"):
            # transformers 5 goes by the class: a space in front of the text's start alone
            space = config.get("add_prefix_space") is not False
            scheme = ("always" if config.get("legacy") else "first") if space else "never"
            parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            parts += [decoders.Strip(" ", left=1)] * space
            self.library.normalizer, self.library.decoder = None, decoders.Sequence(parts)
            self.library.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)

    def encode(self, text, add_special_tokens):
        return self.library.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens):
        return self.library.decode(ids, skip_special_tokens=skip_special_tokens)


class Sentencepiece:
    """Sentencepiece sees no added tokens in a text, so the text is cut at them here."""

    def __init__(self, path, config, model_type):
        proto = path.read_bytes()
        self.first = first = SentencePieceProcessor(model_proto=proto)
        # Only a text's start gets a space in front (with `legacy`, every part). To stop it, append
        # normalizer_spec {add_dummy_prefix: false} in protobuf's wire format: the last value wins.
        self.later = SentencePieceProcessor(model_proto=proto + b"\x1a\2\x18\0")
        self.legacy = config.get("legacy", "Llama" not in (config.get("tokenizer_class") or ""))
        pieces = {first.id_to_piece(i): i for i in range(first.vocab_size())}
        self.library = tokenizers.Tokenizer(models.BPE(pieces, []))
        control = [t for t, i in pieces.items() if first.is_control(i) or first.is_unknown(i)]
        self.library.add_special_tokens(control)
        found = dict(bos_token=first.bos_id(), eos_token=first.eos_id(), unk_token=first.unk_id())
        found = {name: first.id_to_piece(i) for name, i in found.items() if i >= 0}
        self.names = add_tokens(self.library, found | config)
        self.added = self.library.get_added_tokens_decoder()
        ids = self.library.get_vocab()
        self.library.model = models.BPE()  # so that it finds the added tokens alone
        self.id, self.token, self.size = ids.get, {i: t for t, i in ids.items()}.get, len(ids)
        bos, eos = ids.get(self.names.get("bos_token")), ids.get(self.names.get("eos_token"))
        self.before = [bos] if bos is not None and config.get("add_bos_token", True) else []
        self.after = [eos] if eos is not None and config.get("add_eos_token", False) else []

    def encode(self, text, add_special_tokens):
        ids, start, found = [], 0, self.library.encode(text)
        ends = [(len(text), len(text))]
        for i, (left, right) in zip([*found.ids, None], found.offsets + ends):
            processor = self.later if ids and not self.legacy else self.first
            ids += processor.encode(text[start:left])
            ids += [] if i is None else [i]
            start = right
        return self.before + ids + self.after if add_special_tokens else ids

    def decode(self, ids, skip_special_tokens):
        text = ""
        known = [i for i in ids if self.token(i)]  # a model may have more rows than that
        for added, run in groupby(known, self.added.get):
            if added is None:
                text += (self.later if text else self.first).decode(list(run))
            elif not (skip_special_tokens and added.special):
                text += "".join(added.content for _ in run)
        return text
