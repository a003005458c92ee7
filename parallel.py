"""Several processes of torchrun: each with the whole model, or each with a part of it.

    torchrun --nproc_per_node 2 train.py --ckpt FOLDER               # prompts are divided
    torchrun --nproc_per_node 2 parallel.py sample.py --ckpt FOLDER  # the model is divided

Divided prompts: training and evaluations take every world-th prompt, and put together what they
find. Divided model (Megatron-LM, Shoeybi et al. 2019): a process reads and holds some heads, a part
of each MLP or some experts. The tokens' states and the pruning heads are the same everywhere, so
all processes drop the same tokens.
"""

import os
import runpy
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from model import read_tensors
from model_bloom import alibi_slopes

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
DIVIDED = False  # whether the model is
ROWS = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "query_key_value", "dense_h_to_4h"
COLUMNS = "o_proj", "down_proj", "dense", "dense_4h_to_h"  # their outputs are summed


def wait():
    """Wait for the other processes, if there are any; all but the first print nothing."""
    if WORLD > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    if WORLD > 1:
        dist.barrier()


def mine(items):
    """This process's part of a list: every world-th item."""
    return items if WORLD == 1 or DIVIDED else items[RANK::WORLD]


def joined(part, count):
    """The list of `count` items, on every process, of which each has its mine()."""
    if WORLD == 1 or DIVIDED:
        return part
    parts, whole = [None] * WORLD, [None] * count
    dist.all_gather_object(parts, part)
    for rank, items in enumerate(parts):
        whole[rank::WORLD] = items
    return whole


def total(x):
    """A tensor's sum over all processes."""
    if x.requires_grad:
        raise ValueError("a divided model does not train: run train.py under torchrun by itself")
    x = x.contiguous().clone()
    dist.all_reduce(x)
    return x


def share_step(parameters, record):
    """A step's gradients and figures, {name: number}, become their sums over divided prompts."""
    if WORLD == 1 or DIVIDED:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = total(torch.cat([g.flatten() for g in grads]))
    for p, grad in zip(parameters, flat.split([g.numel() for g in grads])):
        p.grad = grad.view_as(p)
    records = [None] * WORLD
    dist.all_gather_object(records, record)
    for name in {name for part in records for name in part}:
        record[name] = sum(part.get(name, 0.0) for part in records)


def over_heads(x):
    """A sum over a process's attention heads -> that over all heads."""
    return total(x) if DIVIDED else x


# ---------------------------------------------------------------------------- a divided model
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
    """Let the parts of a model meet; named_parameters() are those of the whole (fingerprints)."""
    names, whole = dict(model.named_parameters()), {}
    for _, name, file in read_tensors(folder):
        if name.removeprefix(model.prefix) in names:  # mapped: what nobody looks at is not read
            whole[name.removeprefix(model.prefix)] = file.get_tensor(name)
    model.named_parameters = lambda recurse=True: iter(whole.items())
    slopes = alibi_slopes(model.config.num_attention_heads).chunk(WORLD)[RANK]
    for block in model.layers:
        block.self_attn.slopes = slopes  # BLOOM's
        summed = [m for name, m in block.named_modules() if name.split(".")[-1] in COLUMNS]
        if hasattr(block.mlp, "experts"):
            block.mlp.first, summed = RANK * block.mlp.experts.count, [*summed, block.mlp]
        for module in summed:
            module.register_forward_hook(lambda module, inputs, output: total(output))


if __name__ == "__main__":
    import parallel  # the module that the script uses: this file itself is __main__

    parallel.DIVIDED, sys.argv = True, sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
