"""Text <-> token ids for a checkpoint folder, from tokenizer.json (library `tokenizers`) or sentencepiece's
tokenizer.model.

    tokenizer = Tokenizer("checkpoints/smollm2-135m-q4")
    ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]))
"""

import json
import re
from functools import lru_cache
from itertools import groupby
from pathlib import Path


class Tokenizer:
    """One interface over both kinds of file. The ids are those of Hugging Face's tokenizer for the folder, but for one
    thing: a text that already begins with BOS (a rendered chat template, say) does not get a second one.

    chat_template, bos_token, eos_token: str or None. bos_token_id: int or None. eos_token_ids: list of int, any of
    which ends a generation. vocab_size: int, added tokens included.
    Raises FileNotFoundError (no folder, no tokenizer in it) or ValueError (a file in it cannot be read)."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give a checkpoint folder, or fetch one: download.py")
        config = read_json(folder / "tokenizer_config.json")
        models = [read_json(folder / "generation_config.json"), read_json(folder / "config.json")]
        path = next((folder / f for f in ("tokenizer.json", "tokenizer.model") if (folder / f).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder}: neither tokenizer.json nor tokenizer.model; add the checkpoint's own")
        try:
            self.backend = TokenizerJson(path) if path.suffix == ".json" else Sentencepiece(path, config)
        except Exception as error:  # both libraries raise a bare Exception or RuntimeError for a damaged file
            raise ValueError(f"{path}: not readable as a tokenizer ({error}); fetch it again") from error

        def special(kind):
            """The token named bos_token or eos_token, as str or None."""
            if kind in config:  # null counts: so Qwen2 says that it has no BOS, whatever its config.json says
                return config[kind]["content"] if isinstance(config[kind], dict) else config[kind]
            ids = [getattr(self.backend, f"{kind}_id"), *(model.get(f"{kind}_id") for model in models)]
            return next((self.backend.token(i) for i in ids if isinstance(i, int)), None)

        self.bos_token, self.eos_token = special("bos_token"), special("eos_token")
        bos, eos = self.backend.id(self.bos_token), self.backend.id(self.eos_token)
        eos_ids = {eos}
        for value in (model.get("eos_token_id") for model in models):
            eos_ids.update(value if isinstance(value, list) else [value])
        self.bos_token_id, self.eos_token_ids = bos, sorted(eos_ids - {None})
        self.vocab_size = self.backend.size

        self.adds_bos = bos is not None and self.backend.encode("", True)[:1] == [bos]

        self.chat_template = config.get("chat_template")
        if isinstance(self.chat_template, list):  # several, each with a name
            self.chat_template = {t["name"]: t["template"] for t in self.chat_template}.get("default")
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
        """The text of each token by itself, for figures: list of str. Part of a character gives U+FFFD."""
        return [self.decode([i], skip_special_tokens=False) or " " for i in ids]  # sentencepiece's lone "▁" gives ""

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """messages: list of {"role": str, "content": str} -> the prompt as str, BOS included if the template has it.
        Raises ValueError where there is no chat template, or where it refuses the messages."""
        import jinja2

        if self.chat_template is None:
            raise ValueError(f"{self.folder}: no chat_template in tokenizer_config.json; give the prompt as plain text")
        try:
            return compiled(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.folder}: the chat template does not take these messages: {error}") from error


@lru_cache  # compiling takes longer than encoding a prompt
def compiled(chat_template):
    """The jinja2.Template of its source."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template is code that came with a download

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(chat_template)


def read_json(path):
    """The object in a JSON file; empty if there is no such file. Raises ValueError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; fetch it again")
    return value


class TokenizerJson:
    bos_token_id = eos_token_id = None  # the file does not say which tokens these are

    def __init__(self, path):
        from tokenizers import Tokenizer as Library

        self.library = Library.from_file(str(path))
        self.library.no_truncation()  # some files ask for it, and would cut long prompts without a word
        self.library.no_padding()
        self.token, self.size = self.library.id_to_token, self.library.get_vocab_size()

    def id(self, token):
        return None if token is None else self.library.token_to_id(token)

    def encode(self, text, add_special_tokens):
        return self.library.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens):
        return self.library.decode(ids, skip_special_tokens=skip_special_tokens)


class Sentencepiece:
    """Sentencepiece sees no special tokens in a text, so the text is cut at them here."""

    def __init__(self, path, config):
        from sentencepiece import SentencePieceProcessor

        model = path.read_bytes()
        self.first = SentencePieceProcessor(model_proto=model)
        # Only the start of a text gets a space in front, unless the config says `legacy`: then every part does. To stop
        # it, append `normalizer_spec {add_dummy_prefix: false}` in protobuf's wire format, where the last value wins.
        self.later = SentencePieceProcessor(model_proto=model + b"\x1a\2\x18\0")
        self.legacy = config.get("legacy", False)
        pieces = {i: self.first.id_to_piece(i) for i in range(self.first.vocab_size())}
        self.special = {i: p for i, p in pieces.items() if self.first.is_control(i) or self.first.is_unknown(i)}
        self.special |= {int(i): t["content"] for i, t in config.get("added_tokens_decoder", {}).items()}
        pieces |= self.special
        self.ids = {piece: i for i, piece in pieces.items()}
        self.id, self.token, self.size = self.ids.get, pieces.get, max(pieces) + 1
        longest_first = sorted(self.special.values(), key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        bos, eos = self.first.bos_id(), self.first.eos_id()  # -1: the model has none
        self.bos_token_id, self.eos_token_id = bos if bos >= 0 else None, eos if eos >= 0 else None
        # Llama's way, unless the config says otherwise; with tokenizer.json, transformers ignores the config here.
        self.before = [bos] if config.get("add_bos_token", True) and bos >= 0 else []
        self.after = [eos] if config.get("add_eos_token", False) and eos >= 0 else []

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
