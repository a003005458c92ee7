"""Train the pruning heads of a frozen model, as the paper does, then measure them.

    python train.py                                   # the default checkpoint, on Python's manual
    python train.py --ckpt llama2-7b                  # Llama 2 7B, on databricks-dolly-15k
    python train.py --ckpt FOLDER --data FILE.jsonl   # rows: instruction, context, response
    python train.py --resume                          # go on with a run that was stopped

A step takes a few prompts, one at a time. The teacher labels a prompt's tokens (saliency.py). Then
the model runs with attention masked where the heads would drop a token: none is removed, so that
gradients reach the heads. They learn from the labels and from what their pruning does to the
response, paper eq. 8: L = L_lm + L_mse + L_rank, of which L_rank, a sum over pairs, weighs most.
"""

import hashlib
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

import cli
import data
import eval_tasks
import memory
import parallel
import saliency
import sdtp
from download import DEFAULT
from flops import alive_per_layer, schedule_flops
from model import visible
from saliency import stored_label
from tokenizer import Tokenizer


@dataclass
class TrainConfig:
    ckpt: str = DEFAULT  # checkpoint folder or name
    data: str = ""  # of pydoc,made,dolly,FILE.jsonl,FILE.txt; none: the first two, or else dolly
    out_dir: str = "out"  # heads, table, figures, log, labels and checkpoint go here
    resume: bool = False  # go on with the run in out_dir, by its own flags
    # the paper's method
    first_layer: int = 4  # of the stages (layers count from 0)
    step: int = 3  # layers from stage to stage
    stages: int = 10  # at most, as many as fit (the paper's SDTP-low: 5)
    ratio: float = 0.9  # share of the tokens alive that each stage keeps
    lm_weight: float = 1.0  # weight of L_lm in the loss
    mse_weight: float = 1.0  # weight of L_mse
    rank_weight: float = 1.0  # weight of L_rank
    distill: bool = False  # add KL(dense model || pruned model) on the response to L_lm
    # ours; the defaults of the first two are the paper's
    teacher: str = "grad_x_input"  # grad_x_input, grad_norm or attention_entropy
    over: str = "response"  # labels are for the loss of the response's tokens, or of all
    shares: str = ""  # a schedule of your own: LAYER:SHARE with commas, as in 4:0.75,25:0
    span: int = 1  # neighbouring tokens that are kept or dropped together
    max_prompt: int = 1024  # rows with a longer prompt, in tokens, are left out
    max_prompts: int = 0  # training prompts at most (0: all)
    eval_prompts: int = 16  # held-out prompts of the final table
    epochs: int = 2  # passes over the training prompts
    accumulate: int = 4  # prompts per step
    lr: float = 2e-3  # highest learning rate of AdamW
    dtype: str = "auto"  # auto, bfloat16 or float32
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    seed: int = 0  # of the heads' weights, the order of the prompts and the noise


TAU = 1.0  # temperature of the sigmoid in gumbel_mask
MAX_PAIRS = 1_000_000  # of a prompt's tokens in L_rank, before pairs are sampled
WARMUP, WEIGHT_DECAY, GRAD_CLIP = 0.05, 0.01, 1.0  # share of the steps; AdamW's; largest norm
CHECKPOINT_EVERY = 20  # steps


# ---------------------------------------------------------------------------- the masked forward


class MaskedAttention(torch.autograd.Function):
    """Attention in which dropped tokens are hidden, and yet get a gradient.

    P_ij = E_ij W_ij,  E_ij = exp(a_ij) / sum_j exp(a_ij) W_ij,  W_ij = M_j, or 1 where i = j
    (DynamicViT, Rao et al. 2021, eq. 11), a_ij: scores. M is 1 or 0. With g = dL/d(output):
        dL/dP_ij = g_i . v_j,   D_i = sum_j P_ij dL/dP_ij = g_i . output_i,
        dL/da_ij = P_ij (dL/dP_ij - D_i),   dL/dM_j = sum_i E_ij (dL/dP_ij - D_i) over i != j.
    So a dropped token, whose P is 0, still learns what it would be worth. E is at most e^30 here.
    By blocks of rows, and E anew in the backward pass: no attention head's map is held whole.
    """

    @staticmethod
    def forward(ctx, q, k, v, alive, seen, sinks):
        """q, scaled, k, v: (H, T, D), alive: (T,) M, seen: (T, T) bool; sinks: model.Extras's."""
        hidden, outs, norms = ~(seen & (or_itself(alive) > 0)), [], []
        for rows, keys in row_blocks(q):
            a = scores(q[:, rows], k[:, keys], hidden[rows, keys])
            P = a.softmax(-1)
            norm = a.amax(-1) - P.amax(-1).log()  # log of the sum of exp(a): (H, rows)
            if sinks is not None:
                with_sinks = norm.logaddexp(sinks.to(norm)[:, None])
                P, norm = P * (norm - with_sinks).exp()[..., None], with_sinks
            outs.append(P.to(v.dtype) @ v[:, keys])
            norms.append(norm)
        out = torch.cat(outs, 1)
        ctx.save_for_backward(q, k, v, alive, seen, out, torch.cat(norms, 1))
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, alive, seen, out, norm = ctx.saved_tensors
        W, D = or_itself(alive).to(norm.dtype), (g * out).sum(-1, dtype=norm.dtype)
        dq, d_alive = [], torch.zeros_like(alive)
        dk, dv = torch.zeros_like(k, dtype=norm.dtype), torch.zeros_like(v, dtype=norm.dtype)
        for rows, keys in row_blocks(q):
            a = scores(q[:, rows], k[:, keys], ~seen[rows, keys])
            E = a.sub_(norm[:, rows, None]).clamp_(max=30).exp_()
            dP = (g[:, rows] @ v[:, keys].mT).to(E.dtype)
            dE = dP.sub_(D[:, rows, None]).mul_(E)
            d_alive[keys] += dE.sum((0, 1))
            d_alive[rows] -= dE[..., rows].diagonal(0, 1, 2).sum(0)  # i = j
            da = dE.mul_(W[rows, keys]).to(q.dtype)
            P = E.mul_(W[rows, keys]).to(v.dtype)
            dq.append(da @ k[:, keys])
            dk[:, keys] += da.mT @ q[:, rows]
            dv[:, keys] += P.mT @ g[:, rows]
        return torch.cat(dq, 1), dk.to(k.dtype), dv.to(v.dtype), d_alive, None, None


def row_blocks(q):
    """(rows, keys) slices: blocks of rows, and the keys up to their last."""
    H, T, _ = q.shape
    step = max(16, (2**26 if q.is_cuda else 2**19) // (H * T))  # on the CPU, what its cache holds
    return [(slice(i, i + step), slice(0, i + step)) for i in range(0, T, step)]


def or_itself(alive):
    """W: (T, T), M_j or 1 where i = j."""
    return alive.expand(len(alive), -1).clone().fill_diagonal_(1.0)


def scores(q, k, hidden):
    """q: (H, rows, D), scaled, k: (H, keys, D), hidden: (rows, keys) -> a, float32 or wider."""
    a = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    return a.add_(torch.zeros_like(a[0]).masked_fill_(hidden, -math.inf))


def masked_attend(q, k, v, positions, k_positions, seqlens, k_seqlens, extras, alive):
    """model.attend() of one prompt and its response; alive: (T,) the mask M, 1 or 0."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    q, k, v = (t.transpose(0, 1) for t in (q * q.shape[-1] ** -0.5, k, v))  # (Hq, T, D)
    seen = visible(positions, positions, extras.window)
    return MaskedAttention.apply(q, k, v, alive, seen, extras.sinks).transpose(0, 1)


def gumbel_mask(score, alive, share, span, generator):
    """Eq. 2 at one stage: which tokens of a prompt are alive from here on, (n,), 1 or 0 in value.

    score: (n,) keep logit - drop logit, unused at a share of 0; alive: (n,) the mask so far.
    The mask keeps what sdtp.select() would keep at inference, of scores with Gumbel noise: as many
    as the schedule says, as nothing in eq. 8 fixes that number. Its gradient is that of a sigmoid
    around the lowest score that is kept, the cut (straight-through).
    """
    n = len(alive)
    positions, here = torch.arange(n, device=alive.device), alive.detach() > 0
    free = ~sdtp.is_protected(positions, n)
    if sdtp.alive_count(n, share) == sdtp.protected_count(n):  # no free token stays
        return alive.where(~free, 0.0)
    z = noisy(score, here & free, free, span, generator)
    rows = here.nonzero()[:, 0]
    index, _ = sdtp.select(z.detach()[rows], positions[rows], share, [len(rows)], [n], span)
    kept = torch.zeros_like(here).index_fill(0, rows[index], True)
    if torch.equal(kept, here):  # all stay
        return alive
    cut = z.detach()[kept & free].min()
    # As many stay whatever the scores are. So the cut rises with them (implicit function theorem:
    # by a mean of their changes, the nearest weighing most), and a constant in all is no gain.
    slope = torch.sigmoid((z.detach() - cut) / TAU)
    slope = (slope * (1 - slope)).where(here & free, 0.0)
    cut = cut + (slope * (z - z.detach())).sum() / slope.sum()
    # A token dropped before stays at 0, by the product below. Where this stage would keep it, its
    # factor is 1, so that the gradient reaches the mask of the stage that dropped it.
    hard = kept.where(here, z.detach() >= cut.detach()).to(alive.dtype)
    soft = torch.sigmoid((z - cut) / TAU)
    keep = hard + (soft - soft.detach())
    return alive * keep.where(free, 1.0)


def noisy(score, candidates, free, span, generator):
    """(n,) scores with the difference of two Gumbel draws; one draw per span, and its mean score.

    The mean is over the candidates of a span or, where there are none, over its free tokens.
    """
    spans = torch.arange(len(score), device=score.device) // span
    draws = -torch.empty(2, len(score)).exponential_(generator=generator).log()
    weight = candidates.float() + 1e-9 * free.float()  # counts where there is no candidate
    sums = torch.zeros(2, len(score), device=score.device)
    sums = sums.index_add(1, spans, torch.stack((weight * score, weight)))
    mean = (sums[0] / sums[1].clamp(min=1e-12))[spans] if span > 1 else score
    return mean + (draws[0] - draws[1]).to(score.device)[spans]


# ---------------------------------------------------------------------------- the losses


def rank_loss(score, labels, generator=None):
    """Eq. 6: the sum over pairs i < j of log(1 + exp(-(pi_i - pi_j) sign(s_i - s_j))).

    score, labels: (n,) of one prompt. Of more than MAX_PAIRS pairs that many are drawn: unbiased.
    """
    n = len(score)
    if n * (n - 1) // 2 <= MAX_PAIRS:
        order = (labels[:, None] - labels[None]).sign()
        return F.softplus(-(score[:, None] - score[None]) * order).triu(1).sum()
    i = torch.randint(n, (MAX_PAIRS,), generator=generator)
    j = (i + 1 + torch.randint(n - 1, (MAX_PAIRS,), generator=generator)) % n  # any other token
    terms = F.softplus(-(score[i] - score[j]) * (labels[i] - labels[j]).sign())
    return terms.mean() * (n * (n - 1) // 2)


def losses(model, heads, schedule, example, labels, config, generator):
    """The loss of one prompt and its response, (scalar, {name: scalar of a term of it}).

    L_mse and L_rank are over all free tokens, those that an earlier stage dropped, too.
    heads: {layer: PruneHead}; labels: saliency.stored_label()'s; generator: of noise and pairs.
    """
    n, ids = len(example.prompt), torch.tensor(example.prompt + example.response)
    ids = ids.to(model.device)
    x, positions = model.embed(ids), model.positions([len(ids)])
    recompute = memory.must_recompute(model, len(ids))
    free, alive = ~sdtp.is_protected(positions[:n], n), torch.ones(n, device=model.device)
    mse, rank, score = 0.0, 0.0, None
    for layer, block in enumerate(model.layers):
        if layer in schedule:
            if layer in heads:
                pi = heads[layer].logits(x[:n], positions[:n], [n], block)  # eq. 1: (n, 2)
                score, label = pi[:, 0] - pi[:, 1], labels[layer]
                mse = mse + F.mse_loss(pi[free].softmax(-1)[:, 0], label[free])
                rank = rank + rank_loss(score[free], label[free], generator)  # eq. 6
            alive = gumbel_mask(score, alive, schedule[layer], config.span, generator)  # eq. 2
        attend = partial(masked_attend, alive=F.pad(alive, (0, len(ids) - n), value=1.0))
        run = partial(checkpoint, block, use_reentrant=False) if recompute else block
        x = run(x, positions, [len(ids)], None, attend)
    predicted = model.logits(x[n - 1 : -1]).float()
    lm = F.cross_entropy(predicted, ids[n:])
    if config.distill:  # KL(dense || pruned)
        with torch.no_grad():
            _, dense = saliency.dense_states(model, ids, ())
            target = model.logits(dense[n - 1 : -1]).float().log_softmax(-1)
        pruned = predicted.log_softmax(-1)
        lm = lm + F.kl_div(pruned, target, reduction="batchmean", log_target=True)
    loss = config.lm_weight * lm + config.mse_weight * mse + config.rank_weight * rank  # eq. 8
    return loss, {"lm": lm, "mse": mse, "rank": rank}


# ---------------------------------------------------------------------------- the loop


def train(model, heads, schedule, examples, config, losses=losses, label=stored_label):
    """Train the heads in place on Examples; OUT_DIR/log.jsonl has a line per step.

    losses, label: another method's. The random streams depend on the seed, the step and the
    prompt's place in it alone: a run that is killed and resumed ends like an unbroken one.
    """
    parameters = {f"{layer}.{k}": p for layer, h in heads.items() for k, p in h.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=WEIGHT_DECAY)
    out, began, order = Path(config.out_dir), time.perf_counter(), []
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(config.seed + epoch)
        order += torch.randperm(len(examples), generator=generator).tolist()
    groups = [order[i : i + config.accumulate] for i in range(0, len(order), config.accumulate)]
    first = restore(out, parameters, optimizer)
    for step in range(first, len(groups)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(groups), config.lr)
        optimizer.zero_grad()
        record = {}
        for place, i in parallel.mine(list(enumerate(groups[step]))):
            seed = ((config.seed * 1_000_003 + step) * 10_007 + place) % 2**63
            labels = label(model, examples[i], heads, config, out / "labels")
            draws = torch.Generator().manual_seed(seed)
            loss, terms = losses(model, heads, schedule, examples[i], labels, config, draws)
            (loss / config.accumulate).backward()  # each prompt weighs the same
            for name, term in {"loss": loss, **terms}.items():
                record[name] = record.get(name, 0.0) + term.item() / len(groups[step])
        parallel.share_step(list(parameters.values()), record)
        if not math.isfinite(record["loss"]):
            raise ValueError(f"the loss is {record['loss']}: a lower --lr, in another --out_dir")
        torch.nn.utils.clip_grad_norm_(parameters.values(), GRAD_CLIP)
        optimizer.step()
        if parallel.RANK:
            continue  # the first process writes
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step + 1, **record}) + "\n")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == len(groups):
            save_checkpoint(out, parameters, optimizer, step + 1)
        shown = " | ".join(f"{name} {value:.3f}" for name, value in record.items())
        left = (time.perf_counter() - began) / (step + 1 - first) * (len(groups) - step - 1) / 60
        print(f"step {step + 1}/{len(groups)} | {shown} | {left:.0f} min left", flush=True)


def learning_rate(step, steps, highest):
    """Linear warm-up, then a cosine to a tenth of the highest."""
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
    return highest * min((step + 1) / (WARMUP * steps), cosine)


def save_checkpoint(out, parameters, optimizer, step):
    """One file with all that a run needs to go on: weights, AdamW's moments, the step."""
    tensors = {"step": torch.tensor(step)}
    for name, p in parameters.items():
        tensors[f"heads.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value
    sdtp.write_atomic(out / "checkpoint.safetensors", safetensors.torch.save(tensors))


def restore(out, parameters, optimizer):
    """The first step; the weights and moments of the checkpoint, if there is one, are loaded."""
    path, step, lines, moments = out / "checkpoint.safetensors", 0, [], ("exp_avg", "exp_avg_sq")
    if path.is_file():
        try:
            tensors = safetensors.torch.load_file(path)
            for name, p in parameters.items():
                p.data.copy_(tensors[f"heads.{name}"])
                held = {k: tensors[f"{k}.{name}"].to(p.device) for k in moments}
                optimizer.state[p] = held | {"step": tensors[f"step.{name}"]}
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to begin anew") from None
        step = int(tensors["step"])
        lines = (out / "log.jsonl").read_text().splitlines(keepends=True)[:step]
    sdtp.write_atomic(out / "log.jsonl", "".join(lines).encode())
    return step


@torch.no_grad()
def draw_predictions(model, heads, examples, config, path, label=stored_label):
    """Scores against the teacher's labels at each stage, as ranks within held-out prompts."""
    import matplotlib.pyplot as plt

    ranks, count = {layer: [] for layer in heads}, len(heads)
    for example in examples:
        n, ids = len(example.prompt), torch.tensor(example.prompt, device=model.device)
        labels = label(model, example, heads, config, path.parent / "labels")
        states, _ = saliency.dense_states(model, ids, heads)
        positions = model.positions([n])
        for layer, x in states.items():
            score = heads[layer](x, positions, [n], model.layers[layer])
            both = torch.stack((labels[layer], score))[:, ~sdtp.is_protected(positions, n)]
            ranks[layer].append(both.argsort(-1).argsort(-1) / both.shape[1])
    figure, axes = plt.subplots(1, count, figsize=(2.4 * count, 2.7), layout="tight", squeeze=False)
    for axis, (layer, parts) in zip(axes[0], ranks.items()):
        both = torch.cat(parts, 1).cpu()
        axis.scatter(*both, s=1, alpha=0.3)
        axis.set_title(f"layer {layer}, rho {torch.corrcoef(both)[0, 1]:.2f}")
        axis.set(xlabel="label (rank)", ylabel="score (rank)")
    cli.save_figure(figure, path)


# ---------------------------------------------------------------------------- the command


def check_flags(config):
    """ValueError for a flag out of its range, or without effect beside another."""
    cli.one_of(config, teacher=saliency.TEACHERS, over=saliency.OVER)
    cli.at_least(1, config, "step", "stages", "span", "epochs", "eval_prompts")
    cli.at_least(parallel.WORLD, config, "accumulate")  # a prompt for each process
    cli.at_least(0, config, "first_layer", "max_prompts", "lm_weight", "mse_weight", "rank_weight")
    if not 0 < config.ratio <= 1 or not 0 < config.lr < math.inf:
        raise ValueError(f"--ratio {config.ratio} must be in (0, 1], --lr {config.lr} above 0")
    if not config.lm_weight + config.mse_weight + config.rank_weight:
        raise ValueError("--lm_weight, --mse_weight and --rank_weight are all 0")
    for holds, names, reason in (
        (config.shares, "first_layer step stages ratio", "--shares"),
        (config.teacher == "attention_entropy", "over", "--teacher attention_entropy"),
    ):
        for name in names.split():
            if holds and name in config.given:
                raise ValueError(f"--{name} has no effect with {reason}")


def make_schedule(config, layers):
    """The paper's schedule by the flags, or that of --shares; ValueError for a malformed one."""
    if not config.shares:
        stages = config.first_layer, config.step, config.stages
        return sdtp.paper_schedule(layers, config.ratio, *stages)
    try:
        pairs = [part.split(":") for part in config.shares.split(",")]
        schedule = {int(layer): float(share) for layer, share in pairs}
    except ValueError:
        raise ValueError(f"--shares {config.shares}: LAYER:SHARE with commas is needed") from None
    if len(schedule) < len(pairs) or not any(schedule.values()) or max(schedule) >= layers:
        raise ValueError(f"--shares {config.shares}: layers 0 to {layers - 1} once, a share > 0")
    return dict(sorted(schedule.items()))


def load_prompts(config, model, tokenizer, load=data.load):
    """(training, held-out) Examples; ValueError where none is, or one is too long for the model."""
    training, held_out = load(config.data, tokenizer, max_prompt=config.max_prompt)
    training, held_out = training[: config.max_prompts or None], held_out[: config.eval_prompts]
    if not training or not held_out:
        raise ValueError(f"--data {config.data}: no prompts to train on, or none held out")
    model.positions([max(len(e.prompt) + len(e.response) for e in training + held_out)])  # refuses
    return training, held_out


def main(config=None, Head=sdtp.PruneHead, losses=losses, label=stored_label, load=data.load):
    """The command; for another method, with its own flags, class of heads, and functions."""
    config = config or cli.parse(TrainConfig, __doc__)
    config.data = config.data or ("pydoc,made" if Path(config.ckpt).name == DEFAULT else "dolly")
    check_flags(config)
    out, (model, folder) = Path(config.out_dir), cli.load_model(config)
    layers, width = len(model.layers), model.config.hidden_size
    schedule = make_schedule(config, layers)
    torch.manual_seed(config.seed)
    heads = {layer: Head(width) for layer in schedule if schedule[layer]}
    sdtp.check_schedule(schedule, heads, layers)
    for head in heads.values():
        torch.nn.init.zeros_(head.fc2.weight)  # states are large: random scores would be saturated
        head.to(model.device)
    examples, held_out = load_prompts(config, model, Tokenizer(folder), load)
    n = int(statistics.median(len(e.prompt) for e in examples))
    mean_alive = statistics.mean(alive_per_layer(schedule, n, layers)) / n
    cost = schedule_flops(model.config, schedule, n) / schedule_flops(model.config, {}, n)
    stages = ", ".join(f"{layer}: {share:.3g}" for layer, share in schedule.items())
    print(f"{len(examples)} prompts, {len(held_out)} held-out ones; alive from layer {stages}")
    print(f"mean alive {mean_alive:.1%} of {n} tokens, {cost:.1%} of dense's FLOPs", flush=True)
    model.known_fingerprint = sdtp.fingerprint(model)  # computed once
    begun = json.dumps([*saliency.identity(model), Head.__name__, examples])
    begun = hashlib.sha256(begun.encode()).hexdigest()
    if config.resume and config.saved.get("begun") != begun:
        raise ValueError(f"--resume: the weights, prompts or script of the run in {out} are others")
    run = {**asdict(config), "begun": begun}
    sdtp.write_atomic(out / "config.json", (json.dumps(run, indent=2) + "\n").encode())
    train(model, heads, schedule, examples, config, losses, label)
    info = {k: v for k, v in asdict(config).items() if k not in ("out_dir", "resume")}
    sdtp.save_heads(out / "heads", heads, model, schedule, **info, prompts=len(examples))
    draw_predictions(model, heads, held_out[:8], config, out / "predictions.png", label)
    methods = ["dense", "sdtp", "random", "most_recent", "teacher"]
    stages = {"": (heads, schedule, config.span)}
    how = dict(seed=config.seed, teacher=(config.teacher, config.over))
    rows = eval_tasks.perplexity(model, held_out, methods, stages, **how)
    eval_tasks.print_rows(rows)
    cli.write_rows(out / "eval.json", rows, source=config.data, seed=config.seed)
    (out / "checkpoint.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
