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
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

from model import read_tensors
from sdtp import fingerprint

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
DIVIDED = False  # whether the model is
ROWS = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "query_key_value", "dense_h_to_4h"
COLUMNS = "o_proj", "down_proj", "dense", "dense_4h_to_h"  # their outputs are summed


def wait():
    """Wait for the other processes, if there are any; all but the first print nothing."""
    if WORLD > 1 and not dist.is_initialized():
        gpus, gpu = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if gpus and gpu >= gpus:
            raise ValueError(f"torchrun started more processes than there are GPUs ({gpus})")
        if gpus:
            torch.cuda.set_device(gpu)
        kinds = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(kinds, timeout=timedelta(days=1))
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    if WORLD > 1:
        dist.barrier()


def first(call):
    """call(), in the first process before the others: it may download."""
    if RANK:
        wait()
    found = call()
    if not RANK:
        wait()
    return found


def mine(items):
    """This process's part of a list: every world-th item."""
    return items if WORLD == 1 or DIVIDED else items[RANK::WORLD]


def gathered(item):
    """The items of all processes, a list in their order."""
    items = [None] * WORLD
    dist.all_gather_object(items, item)
    return items


def joined(part, count):
    """The list of `count` items, on every process, of which each has its mine()."""
    if WORLD == 1 or DIVIDED:
        return part
    whole = [None] * count
    for rank, items in enumerate(gathered(part)):
        whole[rank::WORLD] = items
    return whole


def total(x):
    """A tensor's sum over all processes."""
    if x.requires_grad:
        raise ValueError("a divided model has no gradients: no labels (teacher), no training")
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
    records = gathered(record)
    for name in {name for part in records for name in part}:
        record[name] = sum(part.get(name, 0.0) for part in records)


def over_heads(x):
    """A mean over a process's attention heads -> that over all of them."""
    return total(x) / WORLD if DIVIDED else x


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
    if hasattr(config, "all_heads"):
        local |= {"all_heads": Hq, "first_head": RANK * (Hq // WORLD)}
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
    model.identity = found[0]
    for block in model.layers:
        block.register_forward_pre_hook(check_positions)
        summed = [m for name, m in block.named_modules() if name.split(".")[-1] in COLUMNS]
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
            raise RuntimeError(f"process {RANK} has kept other tokens than the first")


if __name__ == "__main__":
    import parallel  # the module that the script uses: this file itself is __main__

    script = sys.argv[1] if len(sys.argv) > 1 else ""
    if WORLD == 1 or not os.path.isfile(script) or os.path.basename(script) == "train.py":
        usage = "torchrun --nproc_per_node N parallel.py SCRIPT.py ..., any script but train.py"
        sys.exit(f"parallel.py: {usage}")
    parallel.DIVIDED, sys.argv = True, sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
