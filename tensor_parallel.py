"""A model divided over the processes of torchrun (Megatron-LM, Shoeybi et al. 2019).

    torchrun --nproc_per_node 2 tensor_parallel.py sample.py --ckpt FOLDER

A process reads and holds some heads, a part of each MLP or some experts. The tokens' states and the
pruning heads are the same everywhere, so all processes drop the same tokens.
"""

import os
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed as dist

import parallel
from checkpoint import read_tensors
from model_bloom import alibi_slopes
from parallel import RANK, WORLD, total
from sdtp import fingerprint

ROWS = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "query_key_value", "dense_h_to_4h"
COLUMNS = "o_proj", "down_proj", "dense", "dense_4h_to_h"  # their outputs are summed


def local_config(config):
    """The Config of this process's part; ValueError names what the processes do not fit."""
    Hq, Hkv = config.num_attention_heads, config.num_key_value_heads
    moe = hasattr(config, "num_local_experts")
    width = "num_local_experts" if moe else "intermediate_size"
    for name in ("num_attention_heads", width):
        if getattr(config, name) % WORLD:
            raise ValueError(f"{WORLD} processes: {name} is {getattr(config, name)}, no multiple")
    if Hkv % WORLD and WORLD % Hkv:
        raise ValueError(f"{WORLD} processes: they do not fit num_key_value_heads {Hkv}")
    local = {"experts_here" if moe else width: getattr(config, width) // WORLD}
    local |= {"num_attention_heads": Hq // WORLD, "num_key_value_heads": -(-Hkv // WORLD)}
    return replace(config, **local)


def read(file, name, config):
    """This process's part of a tensor in an open safetensors file."""
    *_, module, kind = ("", *name.split("."))
    if module in COLUMNS and kind == "bias":  # to be added once
        return file.get_tensor(name) * (RANK == 0)
    experts = ".experts." in name
    if not experts and module not in (*ROWS, *COLUMNS) and kind != "sinks":
        return file.get_tensor(name)
    tensor, dim = file.get_slice(name), int(module in COLUMNS and not experts)
    parts = min(WORLD, config.num_key_value_heads) if module in ("k_proj", "v_proj") else WORLD
    size, part = tensor.get_shape()[dim] // parts, RANK * parts // WORLD
    cut = slice(part * size, part * size + size)
    return tensor[:, cut] if dim else tensor[cut]


def join(model, folder):
    """Let the parts of a model meet, and know the identity of the whole (sdtp.fingerprint)."""
    names, whole = {name for name, _ in model.named_parameters()}, {}
    for _, name, file in read_tensors(folder) if not RANK else ():
        if name.removeprefix(model.prefix) in names:  # mapped: samples are read
            whole[name.removeprefix(model.prefix)] = file.get_tensor(name)
    found = [None if RANK else fingerprint(SimpleNamespace(named_parameters=whole.items))]
    dist.broadcast_object_list(found)
    model.known_fingerprint = found[0]
    for block in model.layers:
        block.register_forward_pre_hook(check_positions)
        summed = [m for name, m in block.named_modules() if name.split(".")[-1] in COLUMNS]
        if hasattr(block.self_attn, "slopes"):
            slopes = alibi_slopes(model.config.num_attention_heads)
            block.self_attn.slopes = slopes.chunk(WORLD)[RANK]
        if hasattr(block.mlp, "experts"):
            block.mlp.first, summed = RANK * block.mlp.experts.count, [*summed, block.mlp]
        for module in summed:
            module.register_forward_hook(lambda module, inputs, output: total(output))


def check_positions(block, inputs):
    """A guard: in a prefill all processes have kept the same tokens, or this one stops."""
    positions = inputs[1]
    if len(positions) > 1:
        wanted = positions.clone()
        dist.broadcast(wanted, 0)
        if not torch.equal(wanted, positions):
            raise ValueError(f"process {RANK} has kept other tokens than the first")


if __name__ == "__main__":
    script = sys.argv[1] if len(sys.argv) > 1 else ""
    if WORLD == 1 or not os.path.isfile(script) or os.path.basename(script) == "train.py":
        usage = "torchrun --nproc_per_node N tensor_parallel.py SCRIPT.py ..., but no train.py"
        sys.exit(f"tensor_parallel.py: {usage}")
    parallel.DIVIDED, sys.argv = True, sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
