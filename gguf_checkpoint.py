"""The Llama in a GGUF file as a Hugging Face folder: for the default checkpoint (download.py)."""

import json

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, TokenType, dequantize, get_tensor_name_map
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from memory import empty_model


def unpermute(weight, head_dim):
    """Undo llama.cpp's row order of q_proj and k_proj; weight: (heads * head_dim, hidden).

    It rotates rows (0, 1), (2, 3), ..., Hugging Face rows (i, i + head_dim / 2): its converter
    interleaves the two halves of every head (permute() in convert_hf_to_gguf.py).
    """
    halves = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def convert_gguf(gguf_file, folder):
    """Write the Llama in a GGUF file as a Hugging Face folder, in float32, as Q4_1 needs it."""
    reader = GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    folder.mkdir()
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = write_config(meta, folder, tied)
    table, names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"]), {}
    for name in empty_model(config).state_dict():
        name = name if name == "lm_head.weight" else f"model.{name}"
        names[table.get_name(name, (".weight",))] = name
    tensors = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", disable=None):
        weight = dequantize(tensor.data, tensor.tensor_type)
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            weight = unpermute(weight, meta["llama.rope.dimension_count"])
        tensors[names[tensor.name]] = np.ascontiguousarray(weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves 0600
    write_tokenizer(meta, folder)


def write_config(meta, folder, tied):
    """Write config.json, from the GGUF's fields, and return it."""
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
    return config


def write_tokenizer(meta, folder):
    """tokenizer.json and tokenizer_config.json: the GGUF's vocabulary, merges and chat template."""
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
