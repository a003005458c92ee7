"""Several processes of torchrun: prompts are divided, or the model (tensor_parallel.py).

    torchrun --nproc_per_node 2 train.py --ckpt FOLDER

Training and evaluations take every world-th prompt, and put together what they find.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
DIVIDED = False  # whether the model is


def wait():
    """Wait for the other processes, if there are any; all but the first print nothing."""
    if WORLD > 1 and not dist.is_initialized():
        gpus, gpu = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if gpus and gpu >= gpus:
            raise ValueError(f"more processes than GPUs ({gpus}); CPU: CUDA_VISIBLE_DEVICES=")
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
