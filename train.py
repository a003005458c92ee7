"""Train pruning heads for a frozen model, then measure them.

    python train.py                                # the default checkpoint on Python's own manual, and on questions made from it
    python train.py --ckpt llama2-7b               # Llama 2 7B on Dolly too
    python train.py --data FILE.jsonl --resume     # go on with a run that was stopped
    python train.py --paper                        # the paper's stages, heads and losses
    python train.py --init out/heads --lm_weight 1 --distill --noise 0.05 --list_weight 0.1 --level_weight 0.01 --lr 5e-4 --epochs 1 --out_dir out2   # go on by the pruned loss

Each step marks a batch of packed prompts with the teacher (saliency.py) and trains the heads to rank the spans of their
tokens likewise, within a prompt (L_list) and between prompts (L_level), from the dense model's hidden states. With
--paper, or --lm_weight, it then runs the model once more with attention masked where the heads would drop a token, so
that they learn from what their pruning does too (below). At the end the maps of the LateKV are fitted to dense passes
(fit_late): by --init HEADS --epochs 0 for heads that stay as they are.
(paper eq. 8) L = L_lm + L_mse + L_rank, with --distill beside L_lm the KL divergence from the dense model's predictions.
"""

import hashlib
import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cli
import data
import saliency
from download import DEFAULT
from eval_tasks import FLOOR, METHODS, perplexity, policies, print_table
from model import read_json, visible
from sdtp import (
    FIRST_TOKENS, LateKV, PruneHead, Schedule, alive_count, calibrate, executed_flops, fingerprint, is_protected, load_heads,
    protected_count, save_heads, span_means, unit_rms, write_atomic,
)  # fmt: skip
from tokenizer import Tokenizer


@dataclass
class TrainConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    data: str = ""  # of pydoc, made, dolly, FILE.jsonl, FILE.txt, with commas (default: pydoc,made; dolly too for others' checkpoints)
    init: str = ""  # folder of trained heads to begin with; with --epochs 0 they stay as they are
    out_dir: str = "out"  # heads, tables, figures, log and checkpoint go here
    resume: bool = False  # go on with the run in out_dir
    paper: bool = False  # the paper's recipe instead of ours: see PAPER in train.py for the flags that it sets
    # the method
    first_layer: int = 4  # first of --stages (layers count from 0)
    step: int = 3  # layers from stage to stage
    stages: int = 0  # stages at most, as many as fit (0: ours, see LATE_LAYER in train.py)
    ratio: float = 0.9  # share kept at each of the paper's stages; other stages keep what costs as much
    shares: str = ""  # a schedule instead of these four: LAYER:SHARE with commas, as in 4:0.7,10:0.5
    span: int = 16  # neighbouring tokens scored, kept and dropped together
    late: bool = True  # tokens that a share of 0 leaves behind stay as keys and values, by fitted maps (LateKV)
    # the heads
    divisor: int = 4  # their hidden layer has hidden_size / divisor units
    norm: bool = True  # layer-norm the state
    position: bool = True  # they know where in the prompt a token is
    matches: int = 8  # products with the prompt's last tokens that they see
    ending: bool = True  # they know how the prompt ends: plain text, or a question
    attention: bool = True  # they see how much attention a token gets in the block to come
    alike: bool = True  # they see how like the prompt's last tokens a token and its neighbours are
    conv: int = 0  # neighbours over which their hidden layer is convolved, an odd number (0: none)
    dropout: float = 0.1  # on their hidden layer, in training
    teacher: str = saliency.TEACHER  # response_attention, grad_norm, grad_x_input (the paper's) or attention_entropy
    label_loss: str = saliency.LABEL_LOSS  # the tokens that labels are for: those of the response, or all next tokens
    recency: float = 4.0  # plain text: labels grow by so many powers of e towards the prompt's end (tilted())
    primacy: float = 1.0  # other prompts: labels fall by so many (tilted())
    noisy_copies: int = 0  # average the labels of so many passes with noise on the embeddings (SmoothGrad)
    # the losses
    list_weight: float = 1.0  # weight of L_list
    list_span: int = 8  # tokens of a span in L_list and L_level: finer than --span teaches more
    list_power: float = 0.5  # of the labels in both: in L_list 0 for all alike, 1 for their sum's shares
    level_weight: float = 0.1  # weight of L_level, by which scores of different prompts can be compared (sdtp_adaptive)
    lm_weight: float = 0.0  # weight of L_lm, beside L_rank as a mean over pairs (eq. 8: 1)
    mse_weight: float = 0.0  # weight of L_mse
    rank_weight: float = 0.0  # weight of L_rank
    rank_reduction: str = "mean"  # of L_rank over pairs: mean, or sum as eq. 6 is printed
    rank_pairs: int = 1_000_000  # pairs sampled where a prompt has more
    distill: bool = False  # add KL(dense || pruned) on the response to L_lm
    tau: float = 1.0  # temperature of Gumbel-softmax
    noise: float = 1.0  # what its noise is multiplied by: less, and masks are more like what inference keeps
    hold_share: bool = True  # masks keep the schedule's share; --no-hold_share: what eq. 8 leaves them, soon nothing
    # the data
    prompt_len: int = 512  # text: tokens of a prompt
    score_len: int = 128  # response tokens (rows: at most)
    min_prompt: int = 64  # rows: shorter prompts are left out
    max_prompt: int = 1024  # rows: longer prompts are left out
    max_prompts: int = 0  # training prompts (0: all)
    label_cache: str = ""  # folder that keeps labels and states (default: of several epochs, in out_dir)
    # the optimisation
    epochs: int = 4  # passes over the training prompts (the paper: 2), which are marked once
    batch_tokens: int = 1024  # tokens packed into one forward
    accumulate: int = 1  # batches per step
    lr: float = 2e-3  # peak learning rate of AdamW
    warmup: float = 0.05  # share of the steps in which it rises; then a cosine to a tenth
    weight_decay: float = 0.01  # of AdamW
    grad_clip: float = 1.0  # largest norm of all heads' gradients together
    checkpoint_every: int = 20  # steps
    checkpoint_blocks: str = "auto"  # recompute blocks in the backward pass (slow, small): on, off, auto (on CUDA)
    seed: int = 0  # of initialisation, order of the data and Gumbel noise
    # the end
    eval_prompts: int = 32  # held-out prompts of the final table
    eval_methods: str = ",".join(METHODS)  # of that table, as --methods of eval_tasks.py; dense always
    eval_rows: str = ""  # .jsonl file of every prompt's results, as --rows of eval_tasks.py: shared, dense runs once
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda


# Our stages: one before the first block, as what is dropped later has cost more and heads at layers 0 to 2 prune about alike, and
# one from which on only the protected go on: at this share of the layers with a LateKV, at eval_tasks.FLOOR, where hardly anything
# still is read, without (results/LOG.md, sessions 4 to 9 and 17); shares fitted to --ratio. Found on 30 layers; with 16 or fewer the
# late one costs about the budget alone, or moves up, or goes (Schedule.fitted), and the early one drops little: give --stages or --shares there.
LATE_LAYER = 4 / 5
LATE_TOKENS = 2**17  # of the training prompts that its maps are fitted to, about
PAPER = {  # the flags that --paper sets: the paper's method, in the form in which it learns (README, "The method")
    "stages": 10, "span": 1, "divisor": 4, "norm": False, "position": False, "matches": 0, "ending": False, "attention": False, "alike": False, "conv": 0, "dropout": 0.0, "late": False, "epochs": 1, "teacher": "grad_norm", "recency": 0.0, "primacy": 0.0,
    "list_weight": 0.0, "level_weight": 0.0, "lm_weight": 0.1, "mse_weight": 1.0, "rank_weight": 1.0,
}  # fmt: skip
CONTEXT = "attention", "matches", "ending", "alike", "conv"  # options of heads that see other tokens
TERMS = "list", "level", "lm", "mse", "rank", "distill"  # of the loss
# Flags that may differ between runs whose heads are the same.
NOT_THE_RUN = "out_dir", "resume", "label_cache", "eval_methods", "eval_rows"


# ---------------------------------------------------------------------------- the masked forward


def masked_attend(q, k, v, positions, k_positions, seqlens, k_seqlens, window=None, alive=None):
    """attend() in which dropped tokens are hidden by multiplication, so that gradients reach `alive`.

    Attention weights are exp(a_ij) (M_j or [i = j]) / sum_j exp(a_ij) (M_j or [i = j]) (DynamicViT, Rao
    et al. 2021, eq. 11). alive: (T,) M, 1 or 0 in value. A large negative bias would have no gradient.
    """
    parts = zip(*(t.split(seqlens) for t in (q, k, v, positions, alive)))
    return torch.cat([masked_sdpa(*part, window) for part in parts])


def masked_sdpa(q, k, v, positions, alive, window=None):
    """masked_attend() for one sequence: q: (T, Hq, D), k, v: (T, Hkv, D), alive: (T,) -> (T, Hq, D)."""
    T, groups = len(q), q.shape[1] // k.shape[1]
    q = q.unflatten(1, (-1, groups)).permute(1, 2, 0, 3) * q.shape[-1] ** -0.5  # (Hkv, G, T, D)
    k, v = k.transpose(0, 1).unsqueeze(1), v.transpose(0, 1).unsqueeze(1)  # (Hkv, 1, T, D)
    a = (q @ k.transpose(-1, -2)).to(alive.dtype)  # (Hkv, G, T, T)
    eye = torch.eye(T, dtype=torch.bool, device=q.device)
    weight = torch.where(eye, 1.0, alive) * visible(positions, positions, window)  # (T, T): M_j or [i = j]
    # The maximum over what is kept makes the forward exact; a dropped token far above it would overflow,
    # and is held at e^30 times the largest kept weight (its own weight is 0, only dL/dM feels it).
    top = a.detach().masked_fill(weight.detach() == 0, -math.inf).amax(-1, keepdim=True)
    e = (a - top).clamp(max=30.0).exp() * weight
    out = (e.to(v.dtype) @ v) / e.sum(-1, keepdim=True)  # (Hkv, G, T, D)
    return out.to(v.dtype).permute(2, 0, 1, 3).flatten(1, 2)


def hold_share(score, alive, counts, index):
    """The shifts b (P,) of packed prompts' scores with sum_i alive_i sigmoid(score_i - b) = the prompt's count, by bisection.

    score, alive: (n,) of the tokens that may be dropped, index: (n,) the prompt of each; counts: (P,) how many of them
    the schedule keeps. A token survives Gumbel-softmax with probability sigmoid(score), so that many are expected to
    (all that are alive, where noise has left fewer).
    """
    s, alive = score.detach(), alive.detach()

    def sums(values):
        return values.new_zeros(len(counts)).index_add(0, index, values)

    low, high = ((edge + far).expand(len(counts)) for edge, far in ((s.amin(), -20), (s.amax(), 20)))
    for _ in range(40):
        middle = (low + high) / 2
        above = sums(alive * torch.sigmoid(s - middle[index])) > counts
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    # The gradient of b (implicit function theorem): without it L_lm would raise all scores for ever, to no effect.
    slope = alive * torch.sigmoid(s - middle[index]) * torch.sigmoid(middle[index] - s)
    return middle + sums((score - s) * slope) / sums(slope).clamp(min=1e-9)


def stage_mask(pi, alive, free, seqlens, prompt_lens, share, tau=1.0, span=1, noise=1.0):
    """Eq. 2 at one stage: pi: (T, 2) head logits, alive: (T,) mask so far -> (T,) mask from here on.

    share: what the schedule leaves alive of a prompt (0: the protected tokens, whatever pi), or None to take pi as it is;
    span: neighbours that live or die together, by their mean; noise: what Gumbel noise is multiplied by (eq. 2: 1).
    """
    if share == 0:
        return torch.where(free, 0.0, alive)
    rows, sizes = free.nonzero()[:, 0], torch.tensor(seqlens, device=free.device)
    prompt = torch.arange(len(sizes), device=free.device).repeat_interleave(sizes)[rows]
    starts = (sizes.cumsum(0) - sizes)[prompt]
    score = (pi[rows, 0] - pi[rows, 1]) / noise
    places = rows + (span - 1) * starts  # position + span * the prompt's start: no span is of two prompts
    score, index = span_means(score, places, span)
    if share is not None:
        counts = torch.tensor([alive_count(n, share) - protected_count(n) for n in prompt_lens], device=free.device)
        shift = hold_share(score[index], alive[rows], counts, prompt)
        score = score - shift[prompt.new_zeros(len(score)).scatter(0, index, prompt)]
    logits = torch.stack((score, torch.zeros_like(score)), -1)
    keep = F.gumbel_softmax(logits, tau / noise, hard=True)[index, 0]  # straight-through
    return alive * keep.new_ones(len(alive)).index_copy(0, rows, keep)


def prompt_logits(head, x, seqlens, prompt_lens, block):
    """(T, 2) head logits of the prompts' tokens, which are all that a head sees, before `block`; 0 for the responses'."""
    parts = [rows[:n] for rows, n in zip(torch.arange(len(x), device=x.device).split(seqlens), prompt_lens)]
    rows, positions = torch.cat(parts), torch.cat([torch.arange(n, device=x.device) for n in prompt_lens])
    scored = head.logits(x[rows], positions, list(prompt_lens), block)
    return scored.new_zeros(len(x), 2).index_copy(0, rows, scored)


def masked_forward(model, heads, ids, seqlens, prompt_lens, free, schedule=None, checkpoint_blocks=False, **how):
    """The pruned model of training: no token is removed, dropped ones are hidden from the others.

    free: (T,) bool, the tokens a stage may drop; schedule: {layer: the share to hold its mask to, or None} (default:
    None at each head's layer); how: tau, span and noise of stage_mask(). Returns (output of the last block
    (T, hidden_size), {layer: head logits (T, 2)}, {layer: cumulative mask M (T,)}).
    """
    x, positions, alive, logits, masks = model.embed(ids), model.positions(seqlens), None, {}, {}
    schedule = dict.fromkeys(heads) if schedule is None else schedule
    for layer, block in enumerate(model.layers):
        if layer in schedule:
            if layer in heads:
                logits[layer] = prompt_logits(heads[layer], x, seqlens, prompt_lens, block)
            alive = torch.ones(len(x), device=x.device) if alive is None else alive
            pi, share = logits.get(layer), schedule[layer]
            masks[layer] = alive = stage_mask(pi, alive, free, seqlens, prompt_lens, share, **how)
        if alive is None:
            x = block(x, positions, seqlens)
            continue
        run = partial(checkpoint, block, use_reentrant=False) if checkpoint_blocks else block
        x = run(x, positions, seqlens, None, partial(masked_attend, alive=alive))
    return x, logits, masks


# ---------------------------------------------------------------------------- the losses


def rank_loss(scores, labels, reduction="mean", max_pairs=1_000_000):
    """Eq. 6 over the pairs i < j of one prompt: log(1 + exp(-(pi_i - pi_j) sign(s_i - s_j))).

    scores, labels: (n,). mean: over the pairs; where there are more than max_pairs, that many are
    drawn with replacement, an unbiased estimate. sum: mean times the number of pairs.
    """
    n = len(scores)
    pairs = n * (n - 1) // 2
    if pairs == 0:
        return scores.sum() * 0
    if pairs <= max_pairs:  # the term is symmetric: all (i, j) are each pair twice, and log 2 for i = j
        terms = F.softplus((scores[None] - scores[:, None]) * (labels[:, None] - labels[None]).sign())
        mean = (terms.sum() - n * math.log(2)) / (2 * pairs)
    else:
        i = torch.randint(n, (max_pairs,)).to(scores.device)
        j = (i + 1 + torch.randint(n - 1, (max_pairs,)).to(scores.device)) % n  # any other token
        mean = F.softplus((scores[j] - scores[i]) * (labels[i] - labels[j]).sign()).mean()
    return mean * pairs if reduction == "sum" else mean


def list_loss(scores, labels, power=0.5):
    """-sum_i t_i log softmax(scores)_i with t = labels^power / their sum, over the spans of one prompt (ListNet, Cao et al. 2007).

    scores, labels: (S,). At power 1 t is each span's share of all that matters, at 0 all spans are alike.
    """
    target = (labels / labels.max().clamp(min=1e-30)) ** power
    return -(target / target.sum().clamp(min=1e-30) * scores.log_softmax(-1)).sum()


def level_loss(scores, labels, power=0.5):
    """(log sum_i e^scores_i - log sum_i labels_i^power)^2 over the spans of one prompt.

    scores, labels: (S,). list_loss() does not change when a constant is added to all scores of a prompt. This fixes the constant:
    the sum of e^score over the prompt's spans should be that of labels^power, so that a span that is read more scores higher
    than one that is read less, even in another prompt. 0 where nothing is read.
    """
    wanted = (labels.clamp(min=1e-30).log() * power).logsumexp(-1)
    return (scores.logsumexp(-1) - wanted) ** 2 * (labels.max() > 1e-30)


def head_losses(logits, labels, free, seqlens, prompt_lens, schedule, config):
    """{"list": L_list, "level": L_level, "mse": L_mse, "rank": L_rank, "overlap": ...} of the heads with their labels, over
    the tokens that may be dropped.

    L_list, L_level: list_loss() and level_loss() of the spans' means. L_mse: between softmax(pi)[keep] and saliency / its
    maximum, mean over tokens. L_rank: mean over pairs. All but L_mse, their mean, are summed over stages; all: mean over
    prompts. A loss of weight 0 is left out. Overlap: of the tokens that the heads would keep with those that the
    labels would, dropped ones ranked too.
    """
    terms = {"list": [], "level": [], "mse": [], "rank": [], "overlap": []}
    for layer, pi in logits.items():
        parts = zip(pi.split(seqlens), labels[layer].split(seqlens), free.split(seqlens), prompt_lens)
        for pi_row, label, droppable, n in parts:
            pi_row, label, positions = pi_row[droppable], label[droppable], droppable.nonzero()[:, 0]
            if not len(label):
                continue
            score = pi_row[:, 0] - pi_row[:, 1]
            if config.list_weight or config.level_weight:
                means = [span_means(values, positions, config.list_span)[0] for values in (score, label)]
            if config.list_weight:
                terms["list"].append(list_loss(*means, config.list_power) * len(logits))
            if config.level_weight:
                terms["level"].append(level_loss(*means, config.list_power) * len(logits))
            if config.mse_weight:
                terms["mse"].append(F.mse_loss(pi_row.softmax(-1)[:, 0], label / label.max().clamp(min=1e-30)))
            if config.rank_weight:
                loss = rank_loss(score, label, config.rank_reduction, config.rank_pairs)
                terms["rank"].append(loss * len(logits))
            count = alive_count(n, schedule[layer]) - protected_count(n)
            if count:
                spans = (span_means(v.detach(), positions, schedule.span) for v in (score, label))
                best = (means[index].topk(count).indices for means, index in spans)
                terms["overlap"].append(torch.isin(*best).float().mean())
    if not terms["overlap"]:  # only what is protected stays
        terms["overlap"] = [torch.tensor(math.nan)]
    return {name: torch.stack(values).mean() for name, values in terms.items() if values}


def recompute(model, config):
    """Whether blocks are recomputed in backward passes."""
    return config.checkpoint_blocks == "on" or (config.checkpoint_blocks == "auto" and model.device.type == "cuda")


def losses(model, heads, batch, schedule, config):
    """All losses of a packed batch: {name: scalar tensor}, and the share of droppable tokens alive per stage."""
    ids, seqlens, prompt_lens, labels, states = batch
    positions, terms, alive = model.positions(seqlens), {}, {}
    free = torch.cat([~is_protected(p, n) for p, n in zip(positions.split(seqlens), prompt_lens)])
    if config.lm_weight:
        terms, alive, logits = pruned_losses(model, heads, ids, seqlens, prompt_lens, free, schedule, config)
    else:  # heads read the dense states
        logits = {
            layer: prompt_logits(head, states[layer], seqlens, prompt_lens, model.layers[layer])
            for layer, head in heads.items()
        }
    terms |= head_losses(logits, labels, free, seqlens, prompt_lens, schedule, config)
    return {"loss": weighted(terms, config), **terms}, alive


def pruned_losses(model, heads, ids, seqlens, prompt_lens, free, schedule, config):
    """({"lm": L_lm, "distill": KL(dense || pruned), with --distill}, share of droppable tokens alive per stage, head logits)
    of the masked forward; both losses are means over the response's tokens."""
    # what a LateKV leaves behind is read on, nearly as if it went on: its stage hides nothing
    stages = {layer: schedule[layer] for layer in (schedule.scored() if schedule.late else schedule)}
    held = {layer: share if config.hold_share or not share else None for layer, share in stages.items()}
    x, logits, masks = masked_forward(
        model, heads, ids, seqlens, prompt_lens, free, held, recompute(model, config),
        tau=config.tau, span=schedule.span, noise=config.noise,
    )  # fmt: skip
    rows = saliency.scored_rows(seqlens, prompt_lens)
    log_probs = model.logits(x[rows]).float().log_softmax(-1)
    terms = {"lm": F.nll_loss(log_probs, ids[rows + 1])}
    if config.distill:
        with torch.no_grad():
            _, dense = saliency.hidden_states(model, ids, (), seqlens)
            target = model.logits(dense[rows]).float().log_softmax(-1)
        terms["distill"] = F.kl_div(log_probs, target, log_target=True, reduction="batchmean")
    return terms, {layer: mask[free].mean().item() for layer, mask in masks.items()}, logits


def weighted(terms, config):
    """The sum of the losses by their weights; distillation goes by L_lm's."""
    weights = {name: getattr(config, f"{'lm' if name == 'distill' else name}_weight") for name in TERMS}
    return sum(weight * terms[name] for name, weight in weights.items() if name in terms)


# ---------------------------------------------------------------------------- labels and batches


def make_batches(examples, config):
    """Lists of examples of at most batch_tokens together (or one longer one), in a seeded order per epoch."""
    batches = []
    for epoch in range(config.epochs):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed + epoch))
        room = 0
        for example in (examples[i] for i in order.tolist()):
            size = len(example.prompt) + len(example.response)
            if size > room:
                batches.append([])
                room = config.batch_tokens
            batches[-1].append(example)
            room -= size
    return batches


def pack(model, examples, layers, config):
    """(ids (T,), seqlens, prompt_lens, {layer: labels (T,), tilted()}, {layer: dense states (T, hidden_size)}) of a batch, through
    --label_cache, if there is one."""
    layers = list(layers)
    seqlens, prompt_lens = [len(e.prompt) + len(e.response) for e in examples], [len(e.prompt) for e in examples]
    ids = torch.tensor([t for e in examples for t in e.prompt + e.response], device=model.device)
    starts = prompt_lens if config.label_loss == "response" else None
    how = config.teacher, seqlens, starts, recompute(model, config), config.noisy_copies
    mark = partial(saliency.mark, model, ids, layers, *how)
    labels, states = marked_once(mark, model, examples, seqlens, layers, config) if config.label_cache else mark()
    return ids, seqlens, prompt_lens, tilted(labels, examples, config.recency, config.primacy), states


def tilted(labels, examples, recency, primacy):
    """Labels (T,) of the layers, times e^(recency * position / prompt tokens) in plain text, e^(-primacy * the same) elsewhere,
    over the mean of that over the prompt.

    What a text goes on with is mostly recent. Which of the old it reads is hard to foretell, and heads that try do worse
    than recency alone (results/LOG.md, session 6). What an answer reads may be anywhere, but it reads what is near more,
    and a token that is dropped is missing to all that come after it, too (results/LOG.md, session 11).
    """
    tilts = []
    for e in examples:
        rate, n = recency if e.text else -primacy, len(e.prompt)
        tilt = torch.arange(n + len(e.response)) * (rate / n)
        tilts.append((tilt - tilt[:n].logsumexp(0)).exp() * n)
    return {layer: label * torch.cat(tilts).to(label) for layer, label in labels.items()}


def marked_once(mark, model, examples, seqlens, layers, config):
    """What mark() gives of a batch, ({layer: labels}, {layer: states}), from --label_cache, or called for and kept there."""
    run = [saliency.LABELS, fingerprint(model), str(model.norm.weight.dtype), config.teacher, config.label_loss]
    run += [layers, *[config.noisy_copies] * bool(config.noisy_copies)]
    keys = [json.dumps([*run, e.prompt, e.response]) for e in examples]
    paths = [Path(config.label_cache) / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors" for key in keys]
    if not all(path.is_file() for path in paths):  # then whole: a resumed run packs, and rounds, as an unbroken one
        parts = [torch.stack(list(m.values())).cpu().split(seqlens, 1) for m in mark()]  # per prompt, its stages
        for path, labels, states in zip(paths, *parts):
            if not path.is_file():
                tensors = {"labels": labels.contiguous(), "states": states.contiguous()}
                write_atomic(path, safetensors.torch.save(tensors))
    try:
        files = [safetensors.torch.load_file(path) for path in paths]
    except SafetensorError as error:
        raise ValueError(
            f"--label_cache {config.label_cache}: a file in it is damaged ({error}); delete the folder"
        ) from None
    stages = (torch.cat([f[name] for f in files], 1).to(model.device) for name in ("labels", "states"))
    return [dict(zip(layers, s)) for s in stages]


# ---------------------------------------------------------------------------- checkpoints


def parameters(heads):
    """{name: parameter} of all heads."""
    return {f"{layer}.{name}": p for layer, head in heads.items() for name, p in head.named_parameters()}


def save_checkpoint(path, heads, optimizer, step):
    """One file with all that a run needs to go on: weights, AdamW's moments, step, random state."""
    tensors = {"rng": torch.get_rng_state(), "step": torch.tensor(step)}
    for name, p in parameters(heads).items():
        tensors[f"heads.{name}"] = p.detach()
        tensors.update({f"adamw.{name}.{key}": value for key, value in optimizer.state[p].items()})
    if torch.cuda.is_available():
        tensors["cuda_rng"] = torch.cuda.get_rng_state()
    write_atomic(path, safetensors.torch.save(tensors))


def load_checkpoint(path, heads, optimizer):
    """Restores what save_checkpoint wrote; returns the step."""
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and start again") from None
    for name, p in parameters(heads).items():
        p.data.copy_(tensors[f"heads.{name}"])
        optimizer.state[p] = {
            key: tensors[f"adamw.{name}.{key}"].to(p.device if key != "step" else "cpu")
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    torch.set_rng_state(tensors["rng"])
    if "cuda_rng" in tensors:
        torch.cuda.set_rng_state(tensors["cuda_rng"])
    return int(tensors["step"])


def run_flags(config):
    """The flags that make a run what it is, as a dict."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_THE_RUN}


def run_info(config):
    """What config.json and heads.json say of a run: its flags, and of which kind its labels are."""
    return run_flags(config) | {"labels": saliency.LABELS}


def saved_flags(config):
    """Fill in the flags of the run that --resume goes on with; ValueError for one given otherwise on the command line."""
    saved = read_json(Path(config.out_dir) / "config.json")
    unknown = run_flags(config).keys() - saved.keys()
    if unknown or saved.get("labels") != saliency.LABELS:
        other = f"without --{min(unknown)}" if unknown else "with other labels"
        raise ValueError(f"--resume: the run in {config.out_dir} was begun by another version of train.py, {other}")
    for name, value in run_flags(config).items():
        chosen = name in ("data", "device", "dtype") and value in ("", "auto")  # by the run
        if name in config.given and not chosen and value != saved[name]:
            raise ValueError(f"--resume: the run in {config.out_dir} has --{name} {saved[name]!r}, not {value!r}")
        setattr(config, name, saved[name])


def start_or_resume(config, heads, optimizer):
    """Returns (first step, log rows so far); refuses to overwrite an unfinished run."""
    out, path = Path(config.out_dir), Path(config.out_dir) / "checkpoint.safetensors"
    if not config.resume:
        if path.is_file():
            raise ValueError(
                f"{path} belongs to an unfinished run: go on with --resume, or choose another --out_dir, or delete it"
            )
        (out / "eval.json").unlink(missing_ok=True)  # an older run's: would say that this one is finished
        write_atomic(out / "config.json", (json.dumps(run_info(config), indent=2) + "\n").encode())
    if not path.is_file():  # a new run, or one killed before its first checkpoint
        if (out / "eval.json").is_file():
            raise ValueError(f"--resume: the run in {out} is finished")
        write_atomic(out / "log.jsonl", b"")
        return 0, []
    step = load_checkpoint(path, heads, optimizer)
    lines = [json.loads(line) for line in data.read_text(out / "log.jsonl").splitlines() if line.endswith("}")]
    history = [line for line in lines if line["step"] <= step]
    write_atomic(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode())
    return step, history


# ---------------------------------------------------------------------------- figures


def draw_losses(history, path):
    """The loss terms, the top-k overlap and the share alive at the last stage against the step."""
    import matplotlib.pyplot as plt

    names = [n for n in ("loss", *TERMS, "overlap", "alive") if n in history[-1]]
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 2.8))
    for axis, name in zip(axes, names):
        axis.plot([h["step"] for h in history], [h[name] for h in history], linewidth=0.8)
        axis.set(title=name, xlabel="step")
    figure.tight_layout()
    cli.save_figure(figure, path)


@torch.no_grad()
def draw_predictions(model, heads, examples, schedule, config, path):
    """Predicted score against label per stage, as ranks within held-out prompts (dense states)."""
    import matplotlib.pyplot as plt

    points = {layer: [] for layer in schedule.scored()}
    for example in examples[:8]:
        _, _, (n,), labels, states = pack(model, [example], points, config)
        positions = torch.arange(n, device=model.device)
        free = ~is_protected(positions, n)
        for layer, x in states.items():
            both = torch.stack(
                (labels[layer][:n][free], heads[layer](x[:n], positions, [n], model.layers[layer])[free])
            )
            points[layer].append(both.argsort(-1).argsort(-1) / both.shape[1])
    figure, axes = plt.subplots(1, len(points), figsize=(2.4 * len(points), 2.8), sharey=True, squeeze=False)
    for axis, (layer, parts) in zip(axes[0], points.items()):
        label, score = torch.cat(parts, dim=1).cpu()
        axis.scatter(label, score, s=1, alpha=0.3)
        correlation = torch.corrcoef(torch.stack((label, score)))[0, 1]
        axis.set(title=f"layer {layer}, rho {correlation:.2f}", xlabel="label (rank)")
    axes[0, 0].set_ylabel("head (rank)")
    figure.tight_layout()
    cli.save_figure(figure, path)


# ---------------------------------------------------------------------------- keys and values of late layers


@torch.no_grad()
def fit_late(model, examples, layer):
    """A LateKV for a layer, its maps a ridge regression of each later layer's keys (not rotated) and values on the normed state
    there, over dense passes of these Examples, responses included, until LATE_TOKENS are read.

    The first tokens are left out: they are never left behind, and like no others (attention sinks).
    """
    late, (gram, cross, read) = LateKV(model.config, layer), (0.0, 0.0, 0)
    for e in tqdm(examples, desc="late maps", disable=None):
        if read >= LATE_TOKENS:
            break
        ids = torch.tensor(e.prompt + e.response, device=model.device)
        x, positions = model.embed(ids), model.positions([len(ids)])
        targets = [x[:, :0]]  # of the last layer, with none after it, nothing is to be foretold
        for depth, block in enumerate(model.layers):
            if depth == layer:
                z = F.pad(unit_rms(x).float(), (0, 1), value=1.0)[FIRST_TOKENS:]
            if depth > layer:
                seen, attention = block.input_layernorm(x), block.self_attn
                targets += [attention.k_proj(seen), attention.v_proj(seen)]
            x = block(x, positions, [len(ids)])
        y = torch.cat(targets, -1).float()[FIRST_TOKENS:]
        gram, cross, read = gram + (z.T @ z).double(), cross + (z.T @ y).double(), read + len(ids)
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    maps = torch.linalg.solve(gram + ridge, cross).float()
    late.proj.weight.copy_(maps[:-1].T)
    late.proj.bias.copy_(maps[-1])
    return late.to(model.device).requires_grad_(False)


# ---------------------------------------------------------------------------- the loop


def learning_rate(step, steps, config):
    """Linear warm-up, then a cosine from lr to a tenth of it."""
    warm = max(1, int(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def new_head(model, config):
    """A PruneHead by the flags, whose scores start at 0: hidden states are large (rms 5 to 27 in SmolLM2), and random
    scores that start saturated cost a hundred steps (held-out rank loss 0.55 against 0.65 after 64)."""
    attention = model.config.num_attention_heads * config.attention
    same = {
        name: getattr(config, name)
        for name in ("divisor", "norm", "position", "matches", "ending", "alike", "conv", "dropout")
    }
    head = PruneHead(model.config.hidden_size, attention=attention, **same)
    for name in ("fc2", "end_proj", "conv"):  # the latter two grow as they are of use
        if part := getattr(head, name, None):
            torch.nn.init.zeros_(part.weight)
    return head.to(model.device)


def begin_with(folder, model, heads):
    """Give the heads the weights of those in a folder; ValueError where these are at other layers, or have other options."""
    trained, own, meta = load_heads(folder, model)
    trained = {layer: trained[layer] for layer in own.scored()}  # no LateKV
    if list(trained) != list(heads) or any(h.options != trained[layer].options for layer, h in heads.items()):
        options = next(iter(heads.values())).options
        raise ValueError(
            f"--init {folder}: heads at layers {list(trained)} with {meta.get('head')}; these flags ask for {list(heads)} with {options}"
        )
    for layer, head in heads.items():
        head.load_state_dict(trained[layer].state_dict())


def train_step(model, heads, optimizer, batches, schedule, config):
    """One optimizer step over `accumulate` batches; returns the means of what losses() gives, as floats."""
    optimizer.zero_grad(set_to_none=True)
    record = {}
    for examples in batches:
        terms, alive = losses(model, heads, pack(model, examples, heads, config), schedule, config)
        (terms["loss"] / len(batches)).backward()
        values = {name: t.item() for name, t in terms.items()} | {
            f"alive_{layer}": share for layer, share in alive.items()
        }
        for name, value in values.items():
            record[name] = record.get(name, 0.0) + value / len(batches)
    if not math.isfinite(record["loss"]):
        raise ValueError(
            f"the loss is {record['loss']} ({record}): lower --lr, or look at --tau, --noise and the weights"
        )
    record["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters(heads).values(), config.grad_clip).item()
    optimizer.step()
    return record | ({"alive": record[f"alive_{max(heads)}"]} if alive else {})


def train(model, heads, examples, schedule, config):
    """Train the heads in place; returns the log, one dict per step."""
    batches = make_batches(examples, config)
    groups = [batches[i : i + config.accumulate] for i in range(0, len(batches), config.accumulate)]
    optimizer = torch.optim.AdamW(parameters(heads).values(), lr=config.lr, weight_decay=config.weight_decay)
    first, history = start_or_resume(config, heads, optimizer)
    out, steps, begin, prompts = Path(config.out_dir), len(groups), time.perf_counter(), 0
    print(
        f"{len(examples)} prompts, {steps - first} of {steps} steps to go, share kept from layer",
        ", ".join(f"{layer}: {share:.3g}" for layer, share in schedule.items()),
        flush=True,
    )
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        record = {"step": step + 1} | train_step(model, heads, optimizer, groups[step], schedule, config)
        history.append(record)
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
            save_checkpoint(out / "checkpoint.safetensors", heads, optimizer, step + 1)
        prompts += sum(map(len, groups[step]))
        seconds = time.perf_counter() - begin
        eta = seconds / (step + 1 - first) * (steps - step - 1)
        shown = " ".join(f"{name} {record[name]:.3f}" for name in TERMS if name in record)
        shown += f" | alive {record['alive']:.2f}" if "alive" in record else ""
        print(
            f"step {step + 1}/{steps} | loss {record['loss']:.3f} {shown} | top-k overlap {record['overlap']:.2f}"
            f" | {seconds / prompts * 1000:.0f} ms/prompt | peak {peak_memory(config.device) / 2**30:.1f} GiB | eta {eta // 60:.0f}:{eta % 60:02.0f}",
            flush=True,
        )
    return history


def peak_memory(device):
    """Peak bytes: allocated on CUDA, resident on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_flags(config):
    """ValueError for a flag out of its range."""
    cli.one_of(config, teacher=saliency.TEACHERS, label_loss=saliency.LABEL_LOSSES)
    cli.one_of(config, rank_reduction=("mean", "sum"), checkpoint_blocks=("auto", "on", "off"))
    if config.epochs or not config.init:  # with --init, 0 are enough to fit a LateKV to heads that stay as they are
        cli.at_least(1, config, "epochs")
    cli.at_least(1, config, "batch_tokens", "accumulate", "checkpoint_every", "step", "rank_pairs")
    cli.at_least(1, config, "score_len", "eval_prompts", "span", "list_span", "divisor")
    cli.at_least(
        0, config, "first_layer", "stages", "max_prompts", "matches", "conv", "list_power", "noisy_copies", "recency", "primacy",
    )  # fmt: skip
    if not any(getattr(config, f"{name}_weight") for name in ("list", "lm", "mse", "rank")):
        raise ValueError(
            "all weights that rank are 0: give one of --list_weight, --lm_weight, --mse_weight, --rank_weight"
        )
    if config.distill and not config.lm_weight:
        raise ValueError("--distill goes by --lm_weight, which is 0")
    if config.conv and config.conv % 2 == 0:
        raise ValueError(f"--conv {config.conv}: an odd number is needed, the token itself in their middle")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"--dropout {config.dropout}: at least 0 and below 1 is needed")
    for name in ("recency", "primacy"):
        if (value := getattr(config, name)) > 20:
            raise ValueError(f"--{name} {value}: at most 20 powers of e are needed, or labels are no numbers any more")
    for name in ("tau", "noise"):
        if (value := getattr(config, name)) <= 0:
            raise ValueError(f"--{name} {value}: a number above 0 is needed")


def make_schedule(config, num_hidden_layers):
    """The Schedule of --shares, or of the stages with the compute of --ratio; ValueError for a malformed one."""
    if config.shares:
        shares = given_shares(config.shares)
        return Schedule(
            num_hidden_layers, shares, span=config.span, late=config.late and [*shares.values()].count(0) == 1
        )
    if config.stages:
        stages = {"first_layer": config.first_layer, "step": config.step, "stages": config.stages}
    else:
        depths = {0: 0.75, LATE_LAYER if config.late else FLOOR: 0.0}
        stages = {"shares": {round(depth * num_hidden_layers): share for depth, share in depths.items()}}
    schedule = Schedule(num_hidden_layers, **stages, span=config.span).with_ratio(config.ratio)
    return Schedule(num_hidden_layers, schedule, span=config.span, late=config.late and 0 in schedule.values())


def given_shares(text):
    """{layer: share} of --shares; ValueError for a malformed one."""
    try:
        pairs = [(int(layer), float(share)) for layer, share in (part.split(":") for part in text.split(","))]
    except ValueError:
        pairs = []
    if not pairs or len(dict(pairs)) < len(pairs):
        raise ValueError(f"--shares {text}: LAYER:SHARE with commas is needed, as in 4:0.7,10:0.5, each layer once")
    return dict(pairs)


def prompts(config, tokenizer, model):
    """(training Examples, held-out Examples), all of which can be pruned and fit the model; ValueError where none is left."""
    examples, held_out = data.load(
        config.data, tokenizer, config.prompt_len, config.score_len, config.min_prompt, config.max_prompt
    )
    examples = [e for e in examples if protected_count(len(e.prompt)) < len(e.prompt)][: config.max_prompts or None]
    held_out = list({json.dumps(e): e for e in held_out}.values())[: config.eval_prompts]  # each once
    if not examples or not held_out:
        raise ValueError(
            f"--data {config.data}: {len(examples)} training and {len(held_out)} held-out prompts; lower --prompt_len or --min_prompt"
        )
    longest = max(len(e.prompt) + len(e.response) for e in examples + held_out)
    model.positions([longest])  # refuses one that is too long now
    return examples, held_out


def measure(model, heads, held_out, schedule, history, config):
    """Both figures and the table of all methods on the held-out prompts, in out_dir."""
    out = Path(config.out_dir)
    (out / "losses.png").unlink(missing_ok=True)
    if history:
        draw_losses(history, out / "losses.png")
    draw_predictions(model, heads, held_out, schedule, config, out / "predictions.png")
    n = int(statistics.median(len(e.prompt) for e in held_out))
    *rest, scoring = executed_flops(model.config, n, schedule.alive(n), heads)
    share = scoring / (sum(rest) + scoring)
    print(f"heads in {out / 'heads'}, {share:.2%} of the FLOPs of a pruned prefill of {n} tokens", flush=True)
    print(f"now {len(held_out)} held-out prompts", flush=True)
    settings = {name: getattr(config, name) for name in ("teacher", "label_loss", "seed")}
    methods = config.eval_methods.split(",")
    rows = perplexity(model, held_out, methods, schedule, heads, rows=config.eval_rows, **settings)
    print_table(rows)
    cli.write_rows(out / "eval.json", rows, source=config.data, seed=config.seed)
    print(f"table in {out / 'eval.json'}, figures{' losses.png and' * bool(history)} predictions.png in {out}/")


def main():
    config = cli.parse(TrainConfig, __doc__)
    if config.resume:
        saved_flags(config)
    elif config.paper:
        for name in PAPER.keys() - config.given:
            setattr(config, name, PAPER[name])
    check_flags(config)
    own_cache = config.epochs > 1 and not config.label_cache
    if own_cache:
        config.label_cache = str(Path(config.out_dir) / "labels")
    config.data = config.data or ("pydoc,made" if Path(config.ckpt).name == DEFAULT else "dolly,pydoc,made")
    model, folder = cli.load_model(config)
    schedule = make_schedule(config, len(model.layers))
    if not schedule.scored():
        raise ValueError(f"--shares {config.shares}: no stage with a share above 0, so there is no head to train")
    if len(schedule.scored()) > 1 and config.lm_weight and any(getattr(config, name) for name in CONTEXT):
        raise ValueError(
            "--lm_weight with several stages: give --no-attention --matches 0 --no-ending --no-alike --conv 0, as these heads would see masked tokens"
        )
    examples, held_out = prompts(config, Tokenizer(folder), model)
    torch.manual_seed(config.seed)
    heads = {layer: new_head(model, config) for layer in schedule.scored()}
    if config.init:
        begin_with(config.init, model, heads)
    policies(model.config, held_out, config.eval_methods.split(","), schedule, heads)  # refuses an unknown one now
    history = train(model, heads, examples, schedule, config)
    for head in heads.values():
        head.eval()
    if schedule.late:
        layer = max(schedule)
        heads[layer] = fit_late(model, examples, layer)
    if config.level_weight:  # else scores of different prompts cannot be compared
        schedule = calibrate(model, [e.prompt for e in examples], heads, schedule)
    info = run_info(config) | cli.ORIGIN
    save_heads(Path(config.out_dir) / "heads", heads, model, schedule, prompts=len(examples), **info)
    measure(model, heads, held_out, schedule, history, config)
    (Path(config.out_dir) / "checkpoint.safetensors").unlink(missing_ok=True)
    if own_cache:
        shutil.rmtree(config.label_cache)


if __name__ == "__main__":
    cli.run(main)
