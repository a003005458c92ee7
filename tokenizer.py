"""Text <-> token ids for a checkpoint folder: tokenizer.json (library `tokenizers`), else tokenizer.model (sentencepiece).

    tokenizer = Tokenizer("checkpoints/smollm2-135m-q4")
    ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]))
"""
import json
import re
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
            raise FileNotFoundError(f"{folder}: no such folder; give a checkpoint folder, or fetch one with download.py")
        config = read_json(folder / "tokenizer_config.json")
        generation, model = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
        path = next((folder / f for f in ("tokenizer.json", "tokenizer.model") if (folder / f).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder}: neither tokenizer.json nor tokenizer.model; copy it from the checkpoint")
        try:
            self.backend = TokenizerJson(path) if path.suffix == ".json" else Sentencepiece(path, config)
        except Exception as error:  # both libraries raise bare Exception or RuntimeError for a damaged file
            raise ValueError(f"{path}: not a tokenizer this library can read ({error}); fetch it again") from error

        def special(key):
            """The text of the token that `key` (bos_token, eos_token) stands for, or None."""
            if key in config:  # null counts: so Qwen2 says that it has no BOS, whatever its config.json says
                return config[key]["content"] if isinstance(config[key], dict) else config[key]
            for value in (getattr(self.backend, key + "_id"), generation.get(key + "_id"), model.get(key + "_id")):
                if value is not None:
                    return self.backend.token(value[0] if isinstance(value, list) else value)

        self.bos_token, self.eos_token = special("bos_token"), special("eos_token")
        self.bos_token_id, eos = self.backend.id(self.bos_token), self.backend.id(self.eos_token)
        eos_ids = {eos}
        for value in (generation.get("eos_token_id"), model.get("eos_token_id")):
            eos_ids.update(value if isinstance(value, list) else [value])
        self.eos_token_ids = sorted(eos_ids - {None})
        self.vocab_size = self.backend.size

        adds_bos, adds_eos = self.backend.adds(self.bos_token_id, eos)
        self.prefix = [self.bos_token_id] if config.get("add_bos_token", adds_bos) and self.bos_token_id is not None else []
        self.suffix = [eos] if config.get("add_eos_token", adds_eos) and eos is not None else []

        self.chat_template = config.get("chat_template")
        if isinstance(self.chat_template, list):  # several, named
            self.chat_template = {t["name"]: t["template"] for t in self.chat_template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            self.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")

    def encode(self, text, add_special_tokens=True):
        """str -> list of int. Special tokens written in the text become their single ids."""
        ids = self.backend.encode(text)
        if not add_special_tokens:
            return ids
        return ([] if ids[:1] == self.prefix else self.prefix) + ids + self.suffix

    def decode(self, ids, skip_special_tokens=True):
        """Sequence of int -> str."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens)

    def token_texts(self, ids):
        """The text of each token by itself, for figures; a token that is part of a character gives U+FFFD."""
        return [self.decode([i], skip_special_tokens=False) for i in ids]

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """messages: list of {"role": str, "content": str} -> the prompt as str.
        Raises ValueError where there is no chat template, or where it refuses the messages."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template is code that came with a download

        if self.chat_template is None:
            raise ValueError(f"{self.folder}: no chat template (tokenizer_config.json, chat_template.jinja); "
                             "give the prompt as plain text")

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = raise_exception
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                **{name: token for name, token in tokens.items() if token is not None})
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.folder}: the chat template does not take these messages: {error}") from error


def read_json(path):
    """The object in a JSON file; empty if there is no such file. Raises ValueError."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); fetch it again") from error


class TokenizerJson:
    bos_token_id = eos_token_id = None  # the file does not say which tokens these are

    def __init__(self, path):
        import tokenizers
        self.lib = tokenizers.Tokenizer.from_file(str(path))
        self.lib.no_truncation()  # some files ask for it, and would cut long prompts without a word
        self.lib.no_padding()
        self.token, self.size = self.lib.id_to_token, self.lib.get_vocab_size()

    def id(self, token):
        return None if token is None else self.lib.token_to_id(token)

    def adds(self, bos, eos):
        ids = self.lib.encode("").ids  # what is there without a text is what the post-processor adds
        return bos in ids, eos in ids

    def encode(self, text):
        return self.lib.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens):
        return self.lib.decode(ids, skip_special_tokens=skip_special_tokens)


class Sentencepiece:
    """Sentencepiece knows no special tokens in a text, so the text is cut at them here."""

    def __init__(self, path, config):
        from sentencepiece import SentencePieceProcessor
        model = path.read_bytes()
        self.first = SentencePieceProcessor(model_proto=model)
        # The part after a special token gets no space in front, except in the `legacy` way. To tell sentencepiece so,
        # append `normalizer_spec {add_dummy_prefix: false}` in protobuf's wire format: a later value wins.
        self.later = self.first if config.get("legacy") else SentencePieceProcessor(model_proto=model + b"\x1a\2\x18\0")
        pieces = {i: self.first.id_to_piece(i) for i in range(self.first.vocab_size())}
        self.special = {i: p for i, p in pieces.items() if self.first.is_control(i) or self.first.is_unknown(i)}
        self.special |= {int(i): t["content"] for i, t in config.get("added_tokens_decoder", {}).items()}
        self.pieces = pieces | self.special
        self.ids = {piece: i for i, piece in self.pieces.items()}
        longest_first = sorted(self.special.values(), key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.id, self.token, self.size = self.ids.get, self.pieces.get, max(self.pieces) + 1
        self.bos_token_id, self.eos_token_id = (
            i if i >= 0 else None for i in (self.first.bos_id(), self.first.eos_id()))

    def adds(self, bos, eos):
        return True, False  # Llama's way, where no tokenizer_config.json says otherwise

    def encode(self, text):
        ids = []
        for n, part in enumerate(self.cut.split(text)):  # odd parts are the special tokens
            ids += [self.ids[part]] if n % 2 else (self.later if ids else self.first).encode(part)
        return ids

    def decode(self, ids, skip_special_tokens):
        text = ""
        for special, run in groupby(ids, lambda i: i in self.special):
            if not special:
                text += (self.later if text else self.first).decode(list(run))
            elif not skip_special_tokens:
                text += "".join(self.special[i] for i in run)
        return text
