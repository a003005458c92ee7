"""Text <-> token ids for a checkpoint folder.

From its tokenizer.json (library `tokenizers`) or tokenizer.model (sentencepiece):

    tokenizer = Tokenizer("checkpoints/smollm2-135m-q4")
    ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]))
"""

import json
import re
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """The ids are those of Hugging Face's tokenizer for the folder, but for one thing: a text that
    already begins with BOS (a rendered chat template, say) does not get a second one.

    chat_template, bos_token, eos_token: str or None. bos_token_id: int or None. adds_bos: whether
    encode() begins with it. eos_token_ids: list of int, any of which ends a generation.
    Raises FileNotFoundError (no folder, no tokenizer in it) or ValueError (an unreadable file)."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        models = [read_json(folder / f"{name}.json") for name in ("generation_config", "config")]
        kinds = {"tokenizer.json": TokenizerJson, "tokenizer.model": Sentencepiece}
        path = next((folder / name for name in kinds if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder}: has neither tokenizer.json nor tokenizer.model")
        try:
            self.backend = kinds[path.name](path, config)
        except Exception as error:  # both libraries raise bare ones for a damaged file
            raise ValueError(f"{path}: not readable as a tokenizer ({error})") from error
        self.vocab_size = self.backend.size

        def special(kind):
            if kind in config:  # also null: so Qwen2 has no BOS, whatever its config.json says
                token = config[kind]
                return token["content"] if isinstance(token, dict) else token
            ids = [source.get(f"{kind}_id") for source in (self.backend.special_ids, *models)]
            return next((self.backend.token(i) for i in ids if isinstance(i, int) and i >= 0), None)

        self.bos_token, self.eos_token = special("bos_token"), special("eos_token")
        self.bos_token_id = self.backend.id(self.bos_token)
        self.adds_bos = self.backend.encode("", True)[:1] == [self.bos_token_id]
        eos_ids = {self.backend.id(self.eos_token)}
        for ids in (model.get("eos_token_id") for model in models):
            eos_ids.update(ids if isinstance(ids, list) else [ids])
        self.eos_token_ids = sorted(eos_ids - {None})

        self.chat_template = config.get("chat_template")
        if isinstance(self.chat_template, list):  # several, each with a name
            templates = {entry["name"]: entry["template"] for entry in self.chat_template}
            self.chat_template = templates.get("default")
        if (folder / "chat_template.jinja").is_file():
            self.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")

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
        variables = dict(messages=messages, add_generation_prompt=add_generation_prompt)
        variables |= dict(bos_token=self.bos_token or "", eos_token=self.eos_token or "")
        try:
            return compiled(self.chat_template).render(variables, tools=None, documents=None)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.folder}: its chat template refuses: {error}") from error


def raise_exception(message):  # chat templates call it by this name
    raise jinja2.TemplateError(message)


# A sandbox, as templates are code that came with a download.
TEMPLATES = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
TEMPLATES.add_extension("jinja2.ext.loopcontrols")
TEMPLATES.globals["raise_exception"] = raise_exception
compiled = lru_cache(TEMPLATES.from_string)  # takes longer than encoding a prompt


def read_json(path):
    """The object in a JSON file; empty if there is no such file. Raises ValueError."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not readable as a JSON object ({error})") from error


class TokenizerJson:
    def __init__(self, path, config):
        self.special_ids = {}  # the file does not say which are BOS and EOS
        self.library = tokenizers.Tokenizer.from_file(str(path))
        self.library.no_truncation()  # some files ask for it, and would cut long prompts silently
        self.library.no_padding()
        ids = self.library.get_vocab()
        self.id, self.token, self.size = ids.get, self.library.id_to_token, len(ids)

    def encode(self, text, add_special_tokens):
        return self.library.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens):
        return self.library.decode(ids, skip_special_tokens=skip_special_tokens)


class Sentencepiece:
    """Sentencepiece sees no special tokens in a text, so the text is cut at them here."""

    def __init__(self, path, config):
        model = path.read_bytes()
        self.first = first = SentencePieceProcessor(model_proto=model)
        # Only a text's start gets a space in front (with `legacy`, every part). To stop it, append
        # normalizer_spec {add_dummy_prefix: false} in protobuf's wire format: the last value wins.
        self.later = SentencePieceProcessor(model_proto=model + b"\x1a\2\x18\0")
        self.legacy = config.get("legacy", False)
        pieces = {i: first.id_to_piece(i) for i in range(first.vocab_size())}
        control = [i for i in pieces if first.is_control(i) or first.is_unknown(i)]
        added = {int(i): t["content"] for i, t in config.get("added_tokens_decoder", {}).items()}
        self.special = {i: pieces[i] for i in control} | added
        pieces |= added
        self.ids = {piece: i for i, piece in pieces.items()}
        self.id, self.token, self.size = self.ids.get, pieces.get, max(pieces) + 1
        longest_first = sorted(map(re.escape, self.special.values()), key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(longest_first)})")
        bos, eos = first.bos_id(), first.eos_id()  # -1: the model has none
        self.special_ids = {"bos_token_id": bos, "eos_token_id": eos}
        self.before = [bos] if bos >= 0 and config.get("add_bos_token", True) else []
        self.after = [eos] if eos >= 0 and config.get("add_eos_token", False) else []

    def encode(self, text, add_special_tokens):
        ids = []
        for n, part in enumerate(self.cut.split(text)):  # odd parts are the special tokens
            model = self.later if ids and not self.legacy else self.first
            ids += [self.ids[part]] if n % 2 else model.encode(part)
        return self.before + ids + self.after if add_special_tokens else ids

    def decode(self, ids, skip_special_tokens):
        text = ""
        for special, run in groupby(ids, lambda i: i in self.special):
            if not special:
                text += (self.later if text else self.first).decode(list(run))
            elif not skip_special_tokens:
                text += "".join(self.special[i] for i in run)
        return text
