"""The files of a Hugging Face folder: config.json and other JSON, the tensors of safetensors."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def read_json(path):
    """The JSON object in a file; FileNotFoundError or ValueError in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:  # TypeError: a list, or the like
        raise ValueError(f"{path} is not a JSON object: {error}") from None


def read_tensors(folder):
    """Yields (path, name, open file) of each tensor of model.safetensors, or of its shards."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or {type(n) for n in weight_map.values()} != {str}:
            raise ValueError(f"{index}: weight_map, of names of tensors and files, is missing")
        names = sorted({Path(name).name for name in weight_map.values()})  # none elsewhere
    for path in (folder / name for name in names):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield path, name, file
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download it again") from None


def load_weights(model, folder, dtype, device, part=None):
    """Give a model, made on the meta device, the tensors of a folder, each by its own name.

    Arguments and errors: see model.Transformer.from_pretrained.
    """
    config, expected, state = model.config, model.state_dict(), {}
    for path, name, file in read_tensors(folder):
        key = name.removeprefix(model.prefix)
        if key.endswith("inv_freq"):
            continue  # some exporters write it
        if key not in expected and key != "lm_head.weight":
            raise ValueError(f"{path}: unexpected tensor {name}")
        tensor = part.read(file, name, config) if part else file.get_tensor(name)
        # a tied head, which is not expected, is like the first tensor, the embedding
        like = expected.get(key, next(iter(expected.values())))
        shape, asked = list(tensor.shape), list(like.shape)
        if shape != asked:
            raise ValueError(f"{path}: {name} has shape {shape}, config.json asks for {asked}")
        if tensor.is_floating_point() != like.is_floating_point():
            raise ValueError(f"{path}: {name} of type {tensor.dtype} is not supported")
        # one tensor at a time; of the right dtype, it stays where the file is mapped
        state[key] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    if config.tie_word_embeddings and (head := state.pop("lm_head.weight", None)) is not None:
        embedding = state.setdefault(next(iter(expected)), head)  # either may stand for both
        if not torch.equal(head, embedding):  # the file counts, as in transformers
            state["lm_head.weight"], config.tie_word_embeddings = head, False
            model.lm_head = nn.Linear(*reversed(embedding.shape), bias=False, device="meta")
            model.lm_head.requires_grad_(False)
    for key in expected:
        if key not in state:
            raise ValueError(f"{folder}: missing tensor {key}")
    model.load_state_dict(state, assign=True)
