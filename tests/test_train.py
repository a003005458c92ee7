"""train.py against loops written from the formulas, and against runs that were not killed."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
import torch.nn.functional as F

import cli
import saliency
import train
from data import Example
from model import attend
from sdtp import PruneHead, Schedule, is_protected, keep_count, protected_count, select
from train import TrainConfig, head_losses, losses, make_batches, masked_attend, masked_forward, pack, rank_loss

WINDOW = {"model_type": "mistral", "sliding_window": 6}
each_model = pytest.mark.parametrize("fields", [{}, WINDOW], ids=["full", "window"])


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def paper(**flags):
    """The flags of --paper, others as given."""
    return TrainConfig(**(train.PAPER | flags))


# ---------------------------------------------------------------------------- the masked forward


def loop_attention(q, k, v, positions, alive, window=None):
    """DynamicViT's masked attention of one sequence, a loop over heads, queries and keys; (T, Hq, D)."""
    T, heads, size = q.shape
    rows = []
    for i in range(T):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            seen = [j for j in range(T) if 0 <= positions[i] - positions[j] < (window or 10**9)]
            a = torch.stack([q[i, h] @ k[j, g] / math.sqrt(size) for j in seen])
            # any constant may be taken off, and the largest over all is safe in float64
            weight = (a - a.max().detach()).exp() * torch.stack(
                [torch.ones((), dtype=q.dtype) if i == j else alive[j] for j in seen]
            )
            rows.append((weight / weight.sum()) @ torch.stack([v[j, g] for j in seen]))
    return torch.stack(rows).view(T, heads, size)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_masked_attend_equals_loop(window, groups):
    """Packed, grouped and windowed masked attention is the formula's, for masks of 0, 1 and between."""
    seqlens, kv = [7, 12], 2
    q, k, v = random(19, kv * groups, 8), random(19, kv, 8, seed=1) * 3, random(19, kv, 8, seed=2)
    positions = torch.cat([torch.arange(7), torch.tensor([0, 1, 2, 4, 5, 9, 10, 11, 12, 15, 16, 17])])
    alive = random(19, seed=3).clamp(0, 1)
    assert (alive == 0).sum() > 3 and ((alive > 0) & (alive < 1)).sum() > 3
    got = masked_attend(q, k, v, positions, positions, seqlens, seqlens, window, alive)
    parts = zip(*(t.split(seqlens) for t in (q, k, v, positions, alive)))
    expected = torch.cat([loop_attention(*part, window) for part in parts])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@each_model
def test_masked_forward_equals_removal(fields, monkeypatch):
    """Rows alive at the end are those of a model from which the dropped tokens were truly removed."""
    model, seqlens, prompt_lens = tiny.build(num_hidden_layers=4, **fields), [18, 27], [14, 20]
    ids, positions = torch.cat([tiny.ids(18), tiny.ids(27)]), model.positions(seqlens)
    free = torch.cat([(torch.arange(t) >= 2) & (torch.arange(t) < n) for t, n in zip(seqlens, prompt_lens)])
    torch.manual_seed(0)
    heads = {1: PruneHead(32), 3: PruneHead(32)}
    x, _, masks = masked_forward(model, heads, ids, seqlens, prompt_lens, free)
    for mask in masks.values():
        assert set(mask.tolist()) == {0.0, 1.0} and (mask[~free] == 1).all()
    assert (masks[3] <= masks[1]).all() and masks[3].sum() < masks[1].sum()  # cumulative
    y, rows, p, lengths = model.embed(ids), torch.arange(45), positions, seqlens
    for layer, block in enumerate(model.layers):
        if layer in masks:
            keep = masks[layer][rows] == 1
            lengths = [int(part.sum()) for part in keep.split(lengths)]
            y, rows, p = y[keep], rows[keep], p[keep]
        y = block(y, p, lengths)
    torch.testing.assert_close(x[rows], y, rtol=0, atol=1e-5)  # the mask, and so the weights, are float32


def loop_forward(model, ids, masks):
    """masked_forward of one sequence under given masks {layer: (T,)}, every attention a plain loop."""
    x, alive = model.embed(ids), torch.ones(len(ids), dtype=torch.float64)
    for layer, block in enumerate(model.layers):
        alive = alive * masks[layer] if layer in masks else alive
        attention = block.self_attn
        q, k, v = attention.qkv(block.input_layernorm(x), torch.arange(len(ids)))
        x = x + attention.o_proj(loop_attention(q, k, v, range(len(ids)), alive, attention.window).flatten(1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.logits(x)


@each_model
def test_lm_gradient_by_the_mask_equals_loop(fields, monkeypatch):
    """dL_lm/dM, through two cumulative stages, is a float64 DynamicViT loop's, and reaches dropped tokens."""
    model, seqlens, prompt_lens = tiny.build(**fields), [11, 15], [8, 11]
    ids = torch.cat([tiny.ids(11), tiny.ids(15)])
    free = torch.cat([(torch.arange(t) >= 1) & (torch.arange(t) < n - 1) for t, n in zip(seqlens, prompt_lens)])
    drawn = [(random(26, seed=s) > 0).double().requires_grad_() for s in (1, 2)]
    draws = iter(drawn)

    def gumbel(logits, tau, hard):
        keep = next(draws)[free]
        return torch.stack((keep, 1 - keep), dim=-1)

    monkeypatch.setattr(train.F, "gumbel_softmax", gumbel)
    rows = saliency.scored_rows(seqlens, prompt_lens)
    x, _, _ = masked_forward(model, {1: PruneHead(32), 2: PruneHead(32)}, ids, seqlens, prompt_lens, free)
    loss = torch.nn.functional.cross_entropy(model.logits(x[rows]), ids[rows + 1], reduction="sum")
    got = torch.autograd.grad(loss, drawn)

    plain = [d.detach().clone().requires_grad_() for d in drawn]
    total, start = 0.0, 0
    for t, n in zip(seqlens, prompt_lens):
        part = slice(start, start + t)
        masks = {layer: torch.where(free[part], m[part], torch.ones(())) for layer, m in zip((1, 2), plain)}
        log_probs = loop_forward(model, ids[part], masks).log_softmax(-1)
        total = total - sum(log_probs[i - 1, ids[part][i]] for i in range(n, t))
        start += t
    torch.testing.assert_close(loss, total, rtol=0, atol=1e-9)
    expected = torch.autograd.grad(total, plain)
    for ours, theirs, mask in zip(got, expected, drawn):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
        assert (ours[free & (mask == 0)].abs() > 1e-4).any() and (ours[~free] == 0).all()


@pytest.mark.parametrize("span, noise", [(1, 1.0), (4, 1.0), (4, 0.1)])
def test_lm_gradient_reaches_the_heads(span, noise, monkeypatch):
    """With real Gumbel masks, L_lm alone moves every stage's head; --checkpoint_blocks gives the same gradients."""
    calls, checkpoint = [], train.checkpoint
    monkeypatch.setattr(train, "checkpoint", lambda *a, **how: calls.append(1) or checkpoint(*a, **how))
    model, config = tiny.build(torch.float32), paper(mse_weight=0.0, rank_weight=0.0, noise=noise)
    heads, gradients = {1: PruneHead(32), 2: PruneHead(32)}, []
    for again in ("off", "on"):
        assert not calls
        config.checkpoint_blocks = again
        torch.manual_seed(0)
        for head in heads.values():
            head.zero_grad()
        terms, alive = losses(model, heads, batch(model), Schedule(3, {1: 0.8, 2: 0.5}, span=span), config)
        terms["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for head in heads.values() for p in head.parameters()]))
    assert len(calls) == 2 and (gradients[0].abs() > 1e-6).float().mean() > 0.9
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert 0 < alive[2] < alive[1] < 1


def test_masked_attend_is_stable():
    """Logits of several hundred: the forward is the float64 loop's; no NaN or infinity there or in a gradient."""
    T = 24
    q, k, v = (random(T, 2, 8, seed=s, dtype=torch.float32) for s in (1, 2, 3))
    q, k = (60 * q).requires_grad_(), (10 * k).requires_grad_()
    v = v.requires_grad_()
    alive = (random(T, seed=4) > 0.6).float().requires_grad_()
    positions = torch.arange(T)
    logits = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
    assert logits.abs().max() > 500
    out = masked_attend(q, k, v, positions, positions, [T], [T], None, alive)
    expected = loop_attention(*(t.detach().double() for t in (q, k, v)), positions, alive.detach().double())
    hidden = torch.where(torch.eye(T, dtype=bool), 1.0, alive.detach()) * torch.ones(T, T).tril()
    top = torch.where(hidden == 0, -torch.inf, logits.detach()).amax(-1)
    behind = logits.detach().masked_fill(torch.ones(T, T).triu(1) == 1, -torch.inf).amax(-1) - top
    assert behind.max() > 200  # a dropped token far above all that is alive; the loop's own weights vanish there
    fair = (behind < 300).all(0)
    torch.testing.assert_close(out[fair].double(), expected[fair], rtol=0, atol=1e-3)
    assert torch.isfinite(out).all()
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v, alive)):
        assert torch.isfinite(gradient).all()
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    out = masked_attend(*half, positions, positions, [T], [T], None, alive)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
    for gradient in torch.autograd.grad(out.float().square().sum(), (*half, alive)):
        assert torch.isfinite(gradient).all()


# ---------------------------------------------------------------------------- the losses


def loop_rank(scores, labels):
    """Eq. 6 as printed: the terms of all pairs i < j."""
    sign = lambda v: (v > 0) - (v < 0)  # noqa: E731
    s, y = scores.tolist(), labels.tolist()
    return [
        math.log1p(math.exp(-(s[i] - s[j]) * sign(y[i] - y[j]))) for i in range(len(s)) for j in range(i + 1, len(s))
    ]


@pytest.mark.parametrize("n", [2, 3, 17])
def test_rank_loss_equals_double_loop(n):
    """Mean and sum over the pairs of eq. 6, ties included, with the loop's gradient; one token has no pair."""
    scores, labels = random(n) * 3, random(n, seed=1).round()
    terms = loop_rank(scores, labels)
    assert rank_loss(scores, labels).item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)
    assert rank_loss(scores, labels, "sum").item() == pytest.approx(sum(terms), rel=1e-9)
    assert rank_loss(scores[:1], labels[:1]).item() == 0
    right = rank_loss(labels * 5, labels)
    assert right < rank_loss(-labels * 5, labels) or len(set(labels.tolist())) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sampled_rank_loss_is_unbiased(reduction):
    """The mean over many draws of the sampled loss is the full one's, ties included."""
    torch.manual_seed(0)
    scores, labels = random(6) * 5, torch.tensor([1.0, 1.0, 2.0, 5.0, 0.0, 2.0])
    terms = loop_rank(scores, labels)
    full = sum(terms) / (len(terms) if reduction == "mean" else 1)
    draws = torch.stack([rank_loss(scores, labels, reduction, max_pairs=14) for _ in range(3000)])
    assert draws.std() > 0
    assert abs(draws.mean().item() - full) < 4 * draws.std().item() / 3000**0.5 < 0.05 * full


def stage_tensors(seqlens, layers, seed=0):
    n = sum(seqlens)
    logits = {layer: random(n, 2, seed=seed + layer).requires_grad_() for layer in layers}
    return logits, {layer: random(n, seed=seed + 10 + layer).exp() * 7 for layer in layers}


def free_tokens(seqlens, prompt_lens):
    return torch.cat([(torch.arange(t) < n) & ~is_protected(torch.arange(t), n) for t, n in zip(seqlens, prompt_lens)])


def test_head_losses_equal_loops():
    """L_mse against saliency over its maximum per stage and prompt, L_rank summed over stages, and the overlap."""
    seqlens, prompt_lens, schedule = [30, 50], [24, 44], Schedule(9, {4: 0.8, 7: 0.5})
    logits, labels = stage_tensors(seqlens, schedule)
    labels[4][30:] *= 100  # another scale per prompt and stage
    free = free_tokens(seqlens, prompt_lens)
    got = head_losses(logits, labels, free, seqlens, prompt_lens, schedule, paper())
    mse, rank, overlap = (got.pop(name) for name in ("mse", "rank", "overlap"))
    assert not got
    squares, ranks, overlaps = [], [], []
    for layer in schedule:
        for start, n in ((0, 24), (30, 44)):
            last = int(n * 0.1 + 0.5)
            rows = [start + i for i in range(4, n - last)]
            pi, y = logits[layer][rows].tolist(), labels[layer][rows].tolist()
            squares.append(sum((1 / (1 + math.exp(d - k)) - s / max(y)) ** 2 for (k, d), s in zip(pi, y)) / len(y))
            terms = loop_rank(torch.tensor([k - d for k, d in pi], dtype=torch.float64), labels[layer][rows])
            ranks.append(sum(terms) / len(terms))
            count = keep_count(n, schedule[layer], protected_count(n)) - protected_count(n)
            order = lambda values: set(sorted(range(len(y)), key=lambda i: -values[i])[:count])  # noqa: E731
            overlaps.append(len(order([k - d for k, d in pi]) & order(y)) / count)
    assert mse.item() == pytest.approx(sum(squares) / 4, rel=1e-9)
    assert rank.item() == pytest.approx((sum(ranks[:2]) + sum(ranks[2:])) / 2, rel=1e-9)
    assert overlap.item() == pytest.approx(sum(overlaps) / 4, rel=1e-6)


def test_protected_and_response_tokens_never_enter():
    """Other labels and logits on protected and response tokens change no head loss, and get no gradient."""
    seqlens, prompt_lens, schedule = [30, 50], [24, 44], Schedule(9, {4: 0.8, 7: 0.5})
    logits, labels = stage_tensors(seqlens, schedule)
    free = free_tokens(seqlens, prompt_lens)
    config = paper(list_weight=1.0)
    before = head_losses(logits, labels, free, seqlens, prompt_lens, schedule, config)
    other_logits, other_labels = stage_tensors(seqlens, schedule, seed=50)
    changed = {
        layer: torch.where(free[:, None], logits[layer], 30 * other_logits[layer]).detach().requires_grad_()
        for layer in schedule
    }
    moved = {layer: torch.where(free, labels[layer], 1e6 * other_labels[layer]) for layer in schedule}
    after = head_losses(changed, moved, free, seqlens, prompt_lens, schedule, config)
    assert before.keys() == after.keys() == {"list", "mse", "rank", "overlap"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    (after["list"] + after["mse"] + after["rank"]).backward()
    for pi in changed.values():
        assert (pi.grad[~free] == 0).all() and (pi.grad[free] != 0).any(dim=-1).all()


def batch(model, seqlens=(26, 34), prompt_lens=(20, 30), layers=(1, 2)):
    examples = [
        Example(tiny.ids(n, seed=n).tolist(), tiny.ids(t - n, seed=t).tolist()) for t, n in zip(seqlens, prompt_lens)
    ]
    return pack(model, examples, dict.fromkeys(layers), paper(teacher="grad_norm"))


def forced(keep):
    """Heads that keep, or drop, whatever they may."""
    heads = {layer: PruneHead(32) for layer in (1, 2)}
    for head in heads.values():
        torch.nn.init.zeros_(head.fc2.weight)
        head.fc2.bias.data = torch.tensor([100.0, -100.0]) * (1 if keep else -1)
    return heads


def test_losses_mask_and_score_the_right_tokens(monkeypatch):
    """Heads that would drop all leave protected and response tokens; L_lm is the response's cross-entropy."""
    model, schedule, seen = tiny.build(torch.float32), Schedule(3, {1: 0.8, 2: 0.5}), {}

    def spy(*args, **how):
        seen["x"], seen["logits"], seen["masks"] = masked_forward(*args, **how)
        return seen["x"], seen["logits"], seen["masks"]

    monkeypatch.setattr(train, "masked_forward", spy)
    ids, *_ = data = batch(model)
    terms, alive = losses(
        model,
        forced(keep=False),
        data,
        schedule,
        paper(hold_share=False, lm_weight=3.0, mse_weight=5.0, rank_weight=7.0),
    )
    kept = [*range(4), *range(18, 26), *(26 + i for i in (*range(4), *range(27, 34)))]
    for mask in seen["masks"].values():
        assert mask.nonzero().flatten().tolist() == kept
    assert alive == {1: 0.0, 2: 0.0}
    log_probs = model.logits(seen["x"]).log_softmax(-1)
    nats = [-log_probs[i - 1, ids[i]].item() for i in (*range(20, 26), *range(26 + 30, 26 + 34))]
    assert terms["lm"].item() == pytest.approx(sum(nats) / 10, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(
        3 * terms["lm"].item() + 5 * terms["mse"].item() + 7 * terms["rank"].item(), rel=1e-5
    )


def test_held_masks_keep_the_share_of_the_schedule():
    """hold_share: whatever the scores' level, the tokens alive after each stage are on average the schedule's count."""
    model, schedule = tiny.build(torch.float32), Schedule(3, {1: 0.8, 2: 0.5})
    seqlens, prompt_lens = [48, 60], [44, 52]
    ids, free = torch.cat([tiny.ids(n) for n in seqlens]), free_tokens(seqlens, prompt_lens)
    heads = {layer: PruneHead(32) for layer in schedule}
    for head, level in zip(heads.values(), (9.0, -9.0)):
        head.fc2.bias.data[0] += level
    alive = {layer: [] for layer in schedule}
    for seed in range(60):
        torch.manual_seed(seed)
        _, _, masks = masked_forward(model, heads, ids, seqlens, prompt_lens, free, schedule=schedule)
        for layer, mask in masks.items():
            alive[layer].append([m[:n].sum().item() for m, n in zip(mask.split(seqlens), prompt_lens)])
    for layer, share in schedule.items():
        counts = torch.tensor(alive[layer])
        wanted = torch.tensor([keep_count(n, share, protected_count(n)) for n in prompt_lens])
        assert (counts.mean(0) - wanted).abs().max() < 1.0 and counts.std(0).min() > 0.5


def packed_spans(seqlens, span):
    """(T,) the span of each row, of no two sequences the same."""
    return torch.cat([100 * i + torch.arange(n) // span for i, n in enumerate(seqlens)])


@pytest.mark.parametrize("span", [1, 4])
def test_masks_with_little_noise_are_those_of_inference(span):
    """Spans live or die together by their mean, those that select() keeps; only what it takes of the last span may differ."""
    seqlens, prompt_lens = [46, 60], [42, 52]
    free, pi = free_tokens(seqlens, prompt_lens), random(106, 2)
    alive = torch.ones(106, dtype=torch.float64)
    mask = train.stage_mask(pi, alive, free, seqlens, prompt_lens, 0.5, 1.0, span, 1e-4)
    for m, logits, f, n in zip(*(t.split(seqlens) for t in (mask, pi, free)), prompt_lens):
        score, positions = logits[:n, 0] - logits[:n, 1], torch.arange(n)
        kept, _ = select(score, positions, 0.5, [n], [n], span)
        expected = torch.zeros(n).index_fill(0, kept, 1.0)
        spans = positions // span
        for i in spans[f[:n]].unique():
            assert len(m[:n][f[:n] & (spans == i)].unique()) == 1
        wrong = spans[m[:n] != expected]
        assert len(wrong.unique()) <= 1 and len(wrong) < max(2, span)
        assert 0 < m[f].sum() < f.sum() and (m[~f] == 1).all()


def test_losses_mask_by_spans_and_noise(monkeypatch):
    """The masks of losses() go by the schedule's spans, and by --noise: with hardly any they are the same at every draw."""
    model, schedule, seen, taus = tiny.build(torch.float32), Schedule(3, {1: 0.5}, span=4), [], []
    monkeypatch.setattr(train, "masked_forward", lambda *a, **how: seen.append(masked_forward(*a, **how)) or seen[-1])
    gumbel = F.gumbel_softmax
    monkeypatch.setattr(F, "gumbel_softmax", lambda logits, tau, hard: taus.append(tau) or gumbel(logits, tau, hard))
    torch.manual_seed(0)
    heads, data = {1: PruneHead(32)}, batch(model, layers=(1,))
    for noise in (1.0, 1.0, 1e-4, 1e-4):
        losses(model, heads, data, schedule, paper(noise=noise, tau=0.5))
    assert taus == [0.5, 0.5, 5e3, 5e3]  # the noise that is multiplied is Gumbel's, before the temperature
    masks = [masks[1] for _, _, masks in seen]
    assert not torch.equal(*masks[:2]) and torch.equal(*masks[2:])
    free, spans = free_tokens([26, 34], [20, 30]), packed_spans([26, 34], 4)
    assert all(len(mask[free & (spans == i)].unique()) == 1 for mask in masks for i in spans[free].unique())


@pytest.mark.parametrize("noise", [1.0, 0.01])
def test_gradient_of_masks_by_spans(noise):
    """It reaches every token of a span alike, little noise does not put it out, and to raise all of a prompt's scores is of no effect."""
    seqlens, prompt_lens = [46, 60], [42, 52]
    free, pi = free_tokens(seqlens, prompt_lens), random(106, 2).requires_grad_()
    alive, weights = torch.ones(106, dtype=torch.float64), random(106, seed=1)
    torch.manual_seed(0)
    (train.stage_mask(pi, alive, free, seqlens, prompt_lens, 0.5, 1.0, 4, noise) * weights).sum().backward()
    spans = packed_spans(seqlens, 4)
    for i in spans[free].unique():
        by = pi.grad[free & (spans == i)]
        torch.testing.assert_close(by, by[:1].expand(len(by), 2))
        assert by[0, 0] == -by[0, 1] and by.abs().max() > 1e-4
    assert (pi.grad[~free] == 0).all()
    for by in pi.grad[:, 0].split(seqlens):
        assert abs(by.sum()) < 1e-6 * by.abs().sum()


@pytest.mark.parametrize("span", [1, 4])
def test_noise_moves_masks(span):
    """With little noise the lowest spans always die and the highest live, with more they sometimes do not."""
    seqlens, prompt_lens = [48], [44]
    free, pi = free_tokens(seqlens, prompt_lens), F.pad(0.1 * torch.arange(48.0)[:, None], (0, 1))
    drawn = {}
    for noise in (0.1, 1.0):
        torch.manual_seed(0)
        draws = [
            train.stage_mask(pi, torch.ones(48), free, seqlens, prompt_lens, 0.5, 1.0, span, noise) for _ in range(300)
        ]
        drawn[noise] = torch.stack(draws).mean(0)[free]
    assert drawn[0.1][: 2 * span].max() < 0.02 and drawn[0.1][-2 * span :].min() > 0.98
    assert drawn[1.0][: 2 * span].min() > 0.05 and drawn[1.0][-2 * span :].max() < 0.95


def test_masks_of_a_floor():
    """A stage with a share of 0 hides all but the protected tokens from the others, and has no head."""
    model, seqlens, prompt_lens = tiny.build(torch.float32), [48, 60], [44, 52]
    ids, free = torch.cat([tiny.ids(n) for n in seqlens]), free_tokens(seqlens, prompt_lens)
    for schedule in ({1: 0.8, 2: 0.0}, {1: None, 2: 0.0}):
        _, logits, masks = masked_forward(model, {1: PruneHead(32)}, ids, seqlens, prompt_lens, free, schedule=schedule)
        assert list(logits) == [1] and 0 < masks[1][free].sum() < free.sum()
        assert torch.equal(masks[2], (~free).float())


def test_distill_is_the_kl_divergence():
    """--distill adds KL(dense || pruned) over the response, 0 where nothing is dropped."""
    model, schedule, config = (
        tiny.build(torch.float32),
        Schedule(3, {1: 0.8, 2: 0.5}),
        paper(hold_share=False, distill=True, lm_weight=2.0),
    )
    data = ids, seqlens, prompt_lens, *_ = batch(model)
    terms, alive = losses(model, forced(keep=True), data, schedule, config)
    assert alive == {1: 1.0, 2: 1.0} and abs(terms["distill"].item()) < 1e-6
    pruned, _ = losses(model, forced(keep=False), data, schedule, config)
    dense = model(ids, seqlens=seqlens).double().log_softmax(-1)
    masked, _, _ = masked_forward(
        model, forced(keep=False), ids, seqlens, prompt_lens, free_tokens(seqlens, prompt_lens)
    )
    student = model.logits(masked).double().log_softmax(-1)
    rows = [*range(19, 25), *range(26 + 29, 26 + 33)]
    kl = sum((dense[r].exp() * (dense[r] - student[r])).sum().item() for r in rows) / len(rows)
    assert kl > 0.05 and pruned["distill"].item() == pytest.approx(kl, rel=1e-4)
    rest = 2 * (pruned["lm"] + pruned["distill"]) + pruned["mse"] + pruned["rank"]
    assert pruned["loss"].item() == pytest.approx(rest.item(), rel=1e-5)


# ---------------------------------------------------------------------------- batches, labels, learning rate


def test_make_batches():
    """Batches hold at most batch_tokens (or one longer prompt), every example once per epoch, in a seeded order."""
    sizes = torch.randint(10, 90, (40,), generator=torch.Generator().manual_seed(0)).tolist() + [500]
    examples = [Example([i] * (n - 3), [i] * 3) for i, n in enumerate(sizes)]
    config = paper(epochs=3, batch_tokens=200, seed=4)
    batches = make_batches(examples, config)
    flat = [e.prompt[0] for b in batches for e in b]
    epochs = [flat[i : i + 41] for i in range(0, len(flat), 41)]
    assert len(epochs) == 3 and all(sorted(e) == list(range(41)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert all(len(b) == 1 or sum(sizes[e.prompt[0]] for e in b) <= 200 for b in batches)
    assert len(batches) < 3 * sum(sizes) / 120  # and they are filled
    assert (
        make_batches(examples, config) == batches != make_batches(examples, paper(epochs=3, batch_tokens=200, seed=9))
    )


def test_learning_rate():
    """Linear warm-up to lr, then a cosine to a tenth: its end points, its middle, and no step up."""
    config, steps = paper(lr=0.5, warmup=0.1), 200
    rates = [train.learning_rate(s, steps, config) for s in range(steps)]
    assert rates[:20] == pytest.approx([0.5 * (s + 1) / 20 for s in range(20)])
    assert rates[20] == 0.5 and rates[110] == pytest.approx(0.5 * 0.55) and rates[-1] == pytest.approx(0.05, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[19:], rates[20:])) and min(rates[20:]) >= 0.05
    assert train.learning_rate(0, 1, config) == 0.5


def test_label_cache(tmp_path, monkeypatch):
    """Cached labels are the computed ones and cost no pass; other layers, teachers and texts have their own."""
    model, config = tiny.build(torch.float32), paper(label_cache=str(tmp_path))
    examples = [Example(tiny.ids(n).tolist(), [5, 6, 7]) for n in (12, 20)]
    plain = pack(model, examples, {1: 0.5, 2: 0.4}, paper())
    passes, mark = [], saliency.mark
    monkeypatch.setattr(saliency, "mark", lambda *args: passes.append(1) or mark(*args))

    def same(a, b):
        assert torch.equal(a[0], b[0]) and a[1:3] == b[1:3] and a[3].keys() == b[3].keys() == a[4].keys() == b[4].keys()
        return all(torch.equal(x[layer], y[layer]) for x, y in zip(a[3:], b[3:]) for layer in x)

    assert same(pack(model, examples, {1: 0.5, 2: 0.4}, config), plain) and len(passes) == 1
    assert same(pack(model, examples, {1: 0.5, 2: 0.4}, config), plain) and len(passes) == 1
    one = pack(model, examples[1:], {1: 0.5, 2: 0.4}, config)
    assert len(passes) == 1 and torch.equal(one[3][2], plain[3][2][15:])
    assert same(pack(model, examples, {0: 0.5, 2: 0.4}, config), pack(model, examples, {0: 0.5, 2: 0.4}, paper()))
    config.teacher = "grad_x_input"
    for another in (
        model,
        tiny.build(torch.float64),
        tiny.build(torch.float32, rms_norm_eps=1e-5, num_hidden_layers=4),
    ):
        passes.clear()
        pack(another, examples, {1: 0.5, 2: 0.4}, config)
        assert len(passes) == 1


# ---------------------------------------------------------------------------- the loop, killed and resumed

FLAGS = (
    "--dtype float32 --device cpu --first_layer 1 --step 1 --prompt_len 30 --score_len 8 --batch_tokens 80"
    " --checkpoint_every 10 --epochs 2 --eval_prompts 2 --accumulate 2 --rank_pairs 40"
    " --stages 2 --span 3 --matches 0 --no-ending --no-attention --no-alike --lm_weight 0.1 --mse_weight 1 --rank_weight 1"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, a text, and an unbroken run's folder."""
    folder = tmp_path_factory.mktemp("train")
    tiny.checkpoint(folder / "tiny")
    words = torch.randint(0, 40, (4200,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text("".join(tiny.ALPHABET[3 + w] for w in words))
    with pytest.MonkeyPatch.context() as patch:
        run(folder, "unbroken", patch)
    return folder


def argv(folder, out, *more):
    return f"train.py --ckpt {folder}/tiny --data {folder}/text.txt --out_dir {folder}/{out} {FLAGS}".split() + list(
        more
    )


def run(folder, out, patch, *more):
    patch.setattr(sys, "argv", argv(folder, out, *more))
    patch.setenv("MPLBACKEND", "Agg")
    cli.run(train.main)


def steps_logged(out):
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def test_run_writes_everything(world):
    """A run leaves heads, both figures, the config, one log row per step and the table of all methods."""
    out = world / "unbroken"
    for name in ("losses.png", "predictions.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert not (out / "checkpoint.safetensors").exists()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == list(range(1, len(log) + 1)) and len(log) > 40
    assert {"loss", "list", "lm", "mse", "rank", "overlap", "alive", "alive_1", "alive_2"} <= log[0].keys()
    rows = json.loads((out / "eval.json").read_text())
    assert [r["method"] for r in rows] == [
        "dense",
        "sdtp",
        "random",
        "most_recent",
        "last_attention",
        "teacher",
        "floor",
    ]
    assert {"commit", "command", "versions", "machine", "seed", "source"} <= rows[0].keys()
    meta = json.loads((out / "heads" / "heads.json").read_text())
    assert list(meta["schedule"]) == ["1", "2"] and meta["span"] == 3 and meta["head"]["position"]
    total = sum(meta["schedule"].values())
    assert total == pytest.approx(1 + 0.9)  # as much alive as with one stage of 0.9 at layer 2
    assert {"fingerprint", "teacher", "data", "commit", "seed"} <= meta.keys()


@pytest.mark.parametrize("recipe", [[], ["--paper"]], ids=["ours", "paper"])
def test_recipes(world, monkeypatch, capsys, recipe):
    """The default trains by imitation alone, each prompt marked once for all epochs; --paper by the paper's losses on its heads."""
    flags = (
        f"--ckpt {world}/tiny --data {world}/text.txt --out_dir {world}/recipe --dtype float32 --first_layer 1 --step 1"
    )
    flags += " --prompt_len 30 --score_len 8 --batch_tokens 80 --max_prompts 6 --eval_prompts 1"
    marked, mark = [], saliency.mark
    monkeypatch.setattr(saliency, "mark", lambda model, ids, *rest: marked.append(len(ids)) or mark(model, ids, *rest))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), *recipe])
    measured, measure = [], train.perplexity
    monkeypatch.setattr(train, "perplexity", lambda *a, **k: measured.extend(a[4].values()) or measure(*a, **k))
    cli.run(train.main)
    assert measured and not any(head.training for head in measured)
    found = re.search(r"recipe/heads, ([\d.]+)% of the FLOPs of a pruned prefill of 30 tokens", capsys.readouterr().out)
    assert 0 < float(found[1]) < 100
    log = [json.loads(line) for line in (world / "recipe" / "log.jsonl").read_text().splitlines()]
    meta = json.loads((world / "recipe" / "heads" / "heads.json").read_text())
    if recipe:
        assert {"lm", "mse", "rank", "alive_2"} <= log[0].keys() and "list" not in log[0] and len(log) == 3
        bare = {
            "norm": False,
            "position": False,
            "matches": 0,
            "ending": False,
            "attention": 0,
            "alike": False,
            "conv": 0,
        }
        assert meta["head"] == {"divisor": 4, **bare} and meta["span"] == 1
        assert list(meta["schedule"]) == ["1", "2"] and meta["teacher"] == "grad_norm"
    else:
        assert not (world / "recipe" / "labels").exists()
        assert "list" in log[0] and not {"lm", "mse", "rank", "alive"} & log[0].keys() and len(log) == 12
        assert 6 * 38 < sum(marked) < 3 * 6 * 38
        assert list(meta["schedule"]) == ["0"] and meta["teacher"] == "response_attention"


@pytest.mark.parametrize("flag", ["--attention", "--matches 2", "--ending", "--alike", "--conv 3"])
def test_masked_stages_refuse_heads_that_see_others(world, monkeypatch, flag):
    """Of several stages, in one line, before the run begins."""
    none = "--no-attention --matches 0 --no-ending --no-alike --conv 0 --stages 2 --lm_weight 0.1".split()
    with pytest.raises(SystemExit, match="these heads would see masked tokens"):
        run(world, "masked", monkeypatch, *none, *flag.split())
    assert not (world / "masked").exists()


def test_eval_methods_of_another_span(world, monkeypatch):
    """sdtp_adaptive by spans of its own is calibrated anew; the table may be asked for otherwise on --resume."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "perplexity", None)
        with pytest.raises(TypeError):
            run(world, "adaptive", patch, "--epochs", "1")  # dies before its table
    run(world, "adaptive", monkeypatch, "--epochs", "1", "--resume", "--eval_methods", "sdtp_adaptive@3")
    rows = json.loads((world / "adaptive" / "eval.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "sdtp_adaptive@3"] and rows[1]["mean_alive"] < 1


@pytest.mark.parametrize("methods", ["sdtp,nonsense", "random@4@9"])
def test_eval_methods_are_checked_first(world, monkeypatch, methods):
    """Before the run begins, that is."""
    with pytest.raises(SystemExit, match="nonsense|layers 0 to 2"):
        run(world, "unknown", monkeypatch, "--eval_methods", methods)
    assert not (world / "unknown").exists()


def test_init(world, monkeypatch):
    """--init goes on from trained heads, by the pruned loss; it refuses heads with other options or at other layers, in one line."""
    flags = "--mse_weight 0 --rank_weight 0 --list_weight 0.1 --stages 1 --epochs 1".split()
    tune = "--lm_weight 1 --distill --noise 0.1 --lr 1e-9".split()
    with monkeypatch.context() as patch:
        run(world, "first", patch, *flags, "--lm_weight", "0")
        run(world, "second", patch, *flags, *tune, "--init", f"{world}/first/heads")
        for other in ("--divisor 8", "--first_layer 0"):
            with pytest.raises(SystemExit, match="--init .*first/heads: heads at layers"):
                run(world, "third", patch, *flags, *tune, "--init", f"{world}/first/heads", *other.split())
            assert not (world / "third").exists()
    log = [json.loads(line) for line in (world / "second" / "log.jsonl").read_text().splitlines()]
    assert {"lm", "distill", "list"} <= log[0].keys() and 0.01 < max(row["distill"] for row in log) < 100
    first, second = (
        safetensors.torch.load_file(world / out / "heads/heads.safetensors") for out in ("first", "second")
    )
    assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)


def test_late_hides_nothing():
    """L_lm under a schedule with a LateKV is that without its stage, and not that of one that drops there."""
    model, config = tiny.build(torch.float32, num_hidden_layers=5), TrainConfig(lm_weight=1.0, span=1)
    ids, n, m = tiny.ids(50), [40], [50]
    free = ~is_protected(torch.arange(50), 40)
    heads, found = {1: PruneHead(32)}, []
    for shares, late in (({1: 0.6, 3: 0.0}, True), ({1: 0.6}, False), ({1: 0.6, 3: 0.0}, False)):
        torch.manual_seed(0)
        schedule = Schedule(5, shares, late=late)
        found.append(train.pruned_losses(model, heads, ids, m, n, free, schedule, config)[0]["lm"].item())
    assert found[0] == found[1] != found[2]


def test_init_as_they_are(world, monkeypatch):
    """--epochs 0 with --init leaves the heads as they are and fits a LateKV to them; without --init it is refused."""
    with monkeypatch.context() as patch:
        run(world, "bare", patch, "--shares", "1:0.6", "--epochs", "1")
        run(world, "fitted", patch, "--shares", "1:0.6,2:0", "--late", "--epochs", "0", "--init", f"{world}/bare/heads")
        with pytest.raises(SystemExit, match="--epochs 0"):
            run(world, "none", patch, "--epochs", "0")
    bare, fitted = (safetensors.torch.load_file(world / out / "heads/heads.safetensors") for out in ("bare", "fitted"))
    assert all(torch.equal(bare[name], fitted[name]) for name in bare)
    assert fitted.keys() - bare.keys() == {"2.proj.weight", "2.proj.bias"}
    meta = json.loads((world / "fitted" / "heads" / "heads.json").read_text())
    assert meta["late_kv"] and meta["schedule"] == {"1": 0.6, "2": 0.0}
    assert not (world / "fitted" / "losses.png").exists()


@pytest.mark.parametrize("bias", [False, True])
def test_fit_late(monkeypatch, bias):
    """The maps are least squares' own but for the rounding to bfloat16; what is linear in the normed state they give exactly; so
    many tokens are read as LATE_TOKENS asks for."""
    model = tiny.build(num_hidden_layers=5, attention_bias=bias)
    examples = [Example(tiny.ids(50, seed).tolist(), tiny.ids(10, seed).tolist()) for seed in range(30)]

    def states():
        rows, targets = [], [[], []]
        for e in examples:
            x, positions = model.embed(torch.tensor(e.prompt + e.response)), torch.arange(60)
            for layer, block in enumerate(model.layers):
                if layer == 2:
                    rows.append(x[4:])
                if layer > 2:
                    seen, attention = block.input_layernorm(x), block.self_attn
                    targets[layer - 3].append(torch.cat((attention.k_proj(seen), attention.v_proj(seen)), -1)[4:])
                x = block(x, positions, [60])
        return torch.cat(rows), torch.cat([torch.cat(t) for t in targets], -1)

    x, y = states()
    z = torch.cat((x / x.pow(2).mean(-1, keepdim=True).sqrt(), torch.ones(len(x), 1)), -1)
    best = (z @ torch.linalg.lstsq(z, y).solution - y).pow(2).sum()
    late = train.fit_late(model, examples, 2)
    assert late.proj.weight.dtype == torch.bfloat16 and not late.proj.weight.requires_grad
    error = (late(x).flatten(1) - y).pow(2).sum()
    assert 0.05 * y.pow(2).sum() < best < error < 1.01 * best
    for block in model.layers[2:]:  # which now add nothing
        for proj in (block.self_attn.o_proj, block.mlp.down_proj):
            for p in proj.parameters():
                p.zero_()
    x, y = states()
    late = train.fit_late(model, examples, 2)
    assert (late(x).flatten(1) - y).pow(2).mean() < 1e-4 * y.pow(2).mean()
    monkeypatch.setattr(train, "LATE_TOKENS", 100)
    assert torch.equal(train.fit_late(model, examples, 2).proj.bias, train.fit_late(model, examples[:2], 2).proj.bias)
    assert not torch.equal(late.proj.bias, train.fit_late(model, examples, 2).proj.bias)


@tiny.on_cuda
def test_run_on_cuda(world, monkeypatch, capsys):
    """The same run on CUDA, the paper's losses and a killed run's resumption included, learns as on the CPU and measures all methods."""
    run(world, "cuda", monkeypatch, "--device", "cuda")
    rows, expected = (json.loads((world / out / "eval.json").read_text()) for out in ("cuda", "unbroken"))
    assert [r["method"] for r in rows] == [r["method"] for r in expected] and rows[0]["device"] == "cuda:0"
    for row, other in zip(rows, expected):
        assert row["method"] in ("sdtp", "random") or row["loss"] == pytest.approx(other["loss"], abs=1e-3)
    first, other = (json.loads((world / out / "log.jsonl").read_text().splitlines()[0]) for out in ("cuda", "unbroken"))
    for name in ("list", "mse", "rank"):  # before any update; L_lm sees Gumbel noise of another generator
        assert first[name] == pytest.approx(other[name], rel=1e-3)
    with pytest.raises(SystemExit):  # stopped after its first step, by a loss that is no number
        with monkeypatch.context() as patch:
            steps = iter([train.train_step])
            patch.setattr(train, "train_step", lambda *args: next(steps, stop)(*args))
            run(world, "cuda_killed", patch, "--device", "cuda", "--checkpoint_every", "1")
    run(world, "cuda_killed", monkeypatch, "--device", "cuda", "--checkpoint_every", "1", "--resume")
    assert steps_logged(world / "cuda_killed") == steps_logged(world / "cuda")
    assert (world / "cuda_killed" / "heads" / "heads.safetensors").is_file()


def stop(*args):
    raise ValueError("stopped")


@pytest.mark.parametrize("cache", ["", "labels"])
@pytest.mark.parametrize("recency, primacy", [(3.0, 2.0), (0.0, 2.0), (3.0, 0.0)])
def test_tilted_labels(recency, primacy, tmp_path, cache):
    """Labels of plain text grow towards the prompt's end, those of other prompts fall; the label cache holds them as marked."""
    model = tiny.build(torch.float32)
    a, b = (Example(tiny.ids(12).tolist(), tiny.ids(4).tolist(), text) for text in (True, False))
    config = train.TrainConfig(recency=0.0, primacy=0.0, label_cache=str(tmp_path / cache) if cache else "")
    plain = train.pack(model, [a, b], [0, 2], config)[3]
    config.recency, config.primacy = recency, primacy
    for _ in range(2):  # from the cache too
        labels = train.pack(model, [a, b], [0, 2], config)[3]
        for layer in (0, 2):
            growth = (labels[layer] / plain[layer])[plain[layer] > 0]
            # of 15 tokens: nothing reads the last one
            tilts = [[math.exp(rate * i / 12) for i in range(15)] for rate in (recency, -primacy)]
            expected = [tilt / (sum(each[:12]) / 12) for each in tilts for tilt in each]
            torch.testing.assert_close(growth, torch.tensor(expected))


def test_list_loss():
    """L_list by hand, and its minimum where the scores are the logarithms of the targets."""
    scores, labels = random(5), torch.tensor([3.0, 0.0, 12.0, 0.75, 6.0], dtype=torch.float64)
    targets = (labels**0.5).tolist()
    total = sum(math.exp(s) for s in scores.tolist())
    by_hand = -sum(t / sum(targets) * math.log(math.exp(s) / total) for t, s in zip(targets, scores.tolist()))
    assert train.list_loss(scores, labels).item() == pytest.approx(by_hand)
    best = (labels.clamp(min=1e-12) ** 0.5).log().requires_grad_()
    train.list_loss(best, labels).backward()
    assert best.grad.abs().max() < 1e-5 and train.list_loss(scores, labels) > train.list_loss(best, labels)


def test_level_loss():
    """L_level by hand: 0 where the scores are the logarithms of labels^power but for their order, and a constant more is its square."""
    labels = torch.tensor([3.0, 0.0, 12.0, 0.75, 6.0], dtype=torch.float64)
    scores = random(5)
    wanted = math.log(sum(label**0.5 for label in labels.tolist()))
    by_hand = (math.log(sum(math.exp(s) for s in scores.tolist())) - wanted) ** 2
    assert train.level_loss(scores, labels).item() == pytest.approx(by_hand)
    best = (labels.clamp(min=1e-12) ** 0.5).log().flip(0)
    assert train.level_loss(best, labels).item() == pytest.approx(0, abs=1e-9)
    assert train.level_loss(best + 3, labels).item() == pytest.approx(9)
    assert train.level_loss(scores, 0 * labels).item() == 0  # and not the square of log(1e-30)


def test_imitation_reads_dense_states_of_prompts_alone():
    """Without L_lm the heads score the dense model's prompt rows, as prefill would at the first stage, and masks are not drawn."""
    model, schedule = tiny.build(torch.float32), Schedule(3, {1: 0.6, 2: 0.5}, span=4)
    torch.manual_seed(0)
    heads = {layer: PruneHead(32, norm=True, position=True, matches=2, ending=True, attention=4) for layer in schedule}
    data = ids, seqlens, prompt_lens, labels, _ = batch(model)
    terms, alive = losses(model, heads, data, schedule, TrainConfig(list_span=4))
    assert alive == {} and terms.keys() == {"loss", "list", "level", "overlap"}
    states, _ = saliency.hidden_states(model, ids, (1, 2), seqlens)
    expected = 0.0
    for start, n in ((0, 20), (26, 30)):
        free = range(4, n - keep_count(n, 0.1))
        for layer, head in heads.items():
            score = head(states[layer][start : start + n], torch.arange(n), [n], model.layers[layer]).detach()
            spans = sorted({p // 4 for p in free})
            members = [[p for p in free if p // 4 == s] for s in spans]
            means = torch.stack([score[m].mean() for m in members])
            target = torch.stack([labels[layer][start : start + n][m].mean() for m in members])
            expected += train.list_loss(means, target).item() / 2
    assert terms["list"].item() == pytest.approx(expected, rel=1e-5)


def test_killed_and_resumed_run_equals_unbroken(world, monkeypatch, capsys):
    """kill -9 between two checkpoints, then --resume: heads byte-identical, the log too; refusals on the way."""
    out = world / "killed"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(Path(train.__file__).parent)}
    slow = "import time, sys, cli, train\nstep = train.train_step\ntrain.train_step = lambda *a: time.sleep(0.02) or step(*a)\ncli.run(train.main)"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *argv(world, "killed")[1:]], env=env, stdout=subprocess.DEVNULL, cwd=world
    )
    try:
        while steps_logged(out) < 24:
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done, total = steps_logged(out), steps_logged(world / "unbroken")
    assert done % 10 and done < total and (out / "checkpoint.safetensors").is_file() and not (out / "heads").exists()

    with pytest.raises(SystemExit, match="unfinished run"):
        run(world, "killed", monkeypatch)
    checkpoint = (out / "checkpoint.safetensors").read_bytes()
    (out / "checkpoint.safetensors").write_bytes(checkpoint[:-100])
    with pytest.raises(SystemExit, match="is damaged"):
        run(world, "killed", monkeypatch, "--resume")
    (out / "checkpoint.safetensors").write_bytes(checkpoint)
    with pytest.raises(SystemExit, match="--lr 0.002, not 0.5"):
        run(world, "killed", monkeypatch, "--resume", "--lr", "0.5")
    saved = (out / "config.json").read_text()
    for missing, name in (("with other labels", "labels"), ("without --primacy", "primacy")):
        flags = json.loads(saved)
        del flags[name]
        (out / "config.json").write_text(json.dumps(flags))
        with pytest.raises(SystemExit, match=f"another version of train.py, {missing}"):
            run(world, "killed", monkeypatch, "--resume")
    (out / "config.json").write_text(saved)
    # nothing but the folder is needed: the flags are the run's own
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out_dir", str(out)])
    cli.run(train.main)
    assert f"{total - done // 10 * 10} of {total} steps to go" in capsys.readouterr().out
    for name in ("heads/heads.safetensors", "log.jsonl"):
        assert (out / name).read_bytes() == (world / "unbroken" / name).read_bytes()
    with pytest.raises(SystemExit, match="finished"):
        run(world, "killed", monkeypatch, "--resume")


def test_a_loss_that_is_no_number_stops_the_run(world, monkeypatch):
    """NaN in the loss ends the run in one line; no heads are written."""
    monkeypatch.setattr(train, "rank_loss", lambda scores, *rest: scores.sum() * math.nan)
    with pytest.raises(SystemExit, match="the loss is nan"):
        run(world, "nan", monkeypatch)
    assert not (world / "nan" / "heads").exists()


def test_killed_before_the_first_checkpoint(world, monkeypatch):
    """A run over a finished one, stopped before any checkpoint, starts over on --resume, its log too."""
    shutil.copytree(world / "unbroken", world / "early")
    step = train.train_step

    def stop(*args, left=[3]):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stop)
        with pytest.raises(SystemExit):
            run(world, "early", patch)
    assert steps_logged(world / "early") == 3
    run(world, "early", monkeypatch, "--resume")
    for name in ("heads/heads.safetensors", "log.jsonl"):
        assert (world / "early" / name).read_bytes() == (world / "unbroken" / name).read_bytes()


def test_what_is_given_wins_over_paper(world, monkeypatch):
    """--paper fills in what was not given, a flag given with its default's value stays; --resume goes on with the run's own,
    and refuses a flag given otherwise, one of the default's value too."""
    seen = []

    def stop(*args):
        seen.append(args[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", stop)
    flags = f"train.py --ckpt {world}/tiny --data {world}/text.txt --out_dir {world}/given --dtype float32 --device cpu"
    flags += " --first_layer 1 --step 1 --prompt_len 30 --score_len 8 --epochs 3"
    recipe = "--paper --rank_weight 0 --norm --teacher response_attention"
    for more in (recipe, "--resume", f"{recipe} --resume", "--paper --resume"):
        monkeypatch.setattr(sys, "argv", [*flags.split(), *more.split()])
        with pytest.raises(SystemExit):
            cli.run(train.main)
        saved = json.loads((world / "given" / "config.json").read_text())
        for got in (vars(seen[-1]), saved):
            expected = train.PAPER | {"rank_weight": 0, "norm": True, "teacher": "response_attention", "epochs": 3}
            assert {name: got[name] for name in expected} == expected
    assert len(seen) == 4
    for flag, error in (("--lr 0.002", "--lr 0.1, not 0.002"), ("--no-norm", "--norm True, not False")):
        saved["lr"] = 0.1
        (world / "given" / "config.json").write_text(json.dumps(saved))
        monkeypatch.setattr(sys, "argv", [*flags.split(), "--resume", *flag.split()])
        with pytest.raises(SystemExit, match=error):
            cli.run(train.main)


@pytest.mark.parametrize(
    "flags, error",
    [
        ("--conv 4", "--conv 4: an odd number"),
        ("--dropout 1", "--dropout 1.0: at least 0"),
        ("--tau 0", "--tau 0.0: a number above 0"),
        ("--noise 0", "--noise 0.0: a number above 0"),
        ("--primacy 100", "--primacy 100.0: at most 20"),
        ("--list_weight 0", "all weights that rank are 0"),
        ("--distill", "--distill goes by --lm_weight"),
        ("--teacher x", "--teacher x: choose "),
        ("--epochs 0", "--epochs 0"),
    ],
)
def test_flags_out_of_range(flags, error):
    """Named in one line, before anything is loaded."""
    with pytest.raises(ValueError, match=error):
        train.check_flags(cli.parse(TrainConfig, "", flags.split()))


def test_base_weights_stay(tmp_path):
    """Training changes the heads and not one byte of the model."""
    model, schedule = tiny.build(torch.float32), Schedule(3, {1: 0.8, 2: 0.5})
    torch.manual_seed(0)
    heads = {layer: PruneHead(32) for layer in schedule}
    old = {k: v.clone() for k, v in train.parameters(heads).items()}
    before = {k: v.numpy().tobytes() for k, v in model.state_dict().items()}
    examples = [Example(tiny.ids(n).tolist(), tiny.ids(4, seed=n).tolist()) for n in range(30, 40)]
    config = paper(batch_tokens=100, out_dir=str(tmp_path), lr=0.01, epochs=4)
    history = train.train(model, heads, examples, schedule, config)
    assert {k: v.numpy().tobytes() for k, v in model.state_dict().items()} == before
    assert all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(old[k], p) for k, p in train.parameters(heads).items())
    assert sum(h["rank"] for h in history[-3:]) < sum(h["rank"] for h in history[:3])


def test_accumulation_equals_one_mean():
    """--accumulate adds the mean of the batches' losses: the step's gradient is that of the mean."""
    model, schedule, config = (
        tiny.build(torch.float32),
        Schedule(3, {1: 0.8, 2: 0.5}),
        paper(hold_share=False, accumulate=2, grad_clip=1e9),
    )
    examples = [Example(tiny.ids(n).tolist(), tiny.ids(4, seed=n).tolist()) for n in (20, 30)]
    heads = forced(keep=True)  # no draw can change what is kept
    gradients = []
    for batches in ([examples[:1]], [examples[1:]], [examples[:1], examples[1:]]):
        optimizer = torch.optim.SGD(train.parameters(heads).values(), lr=0.0)
        train.train_step(model, heads, optimizer, batches, schedule, config)
        gradients.append(torch.cat([p.grad.flatten() for p in train.parameters(heads).values()]))
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2, rtol=1e-4, atol=1e-7)
    assert gradients[0].abs().max() > 1e-6 and not torch.allclose(gradients[0], gradients[1])


def test_attend_and_masked_attend_agree_with_nothing_dropped():
    """A mask of ones is plain attention, whichever way it is computed."""
    q, k, v, positions = (
        random(9, 4, 8),
        random(9, 2, 8, seed=1),
        random(9, 2, 8, seed=2),
        torch.cat([torch.arange(4), torch.arange(5)]),
    )
    args = (positions, positions, [4, 5], [4, 5], 3)
    torch.testing.assert_close(
        masked_attend(q, k, v, *args, torch.ones(9, dtype=torch.float64)), attend(q, k, v, *args)
    )


@pytest.mark.parametrize("ratio", [0.9, 0.8])
@pytest.mark.parametrize("kept", [True, False], ids=["late", "no late"])
@pytest.mark.parametrize(
    "depth, late", [(30, (24, 25)), (32, (26, 27)), (28, (22, 23)), (12, None), (6, (6, 6)), (3, (3, 3))]
)
def test_default_schedule(depth, late, ratio, kept):
    """Two stages, the late one down to the protected tokens, with a LateKV or without, with the compute of the paper's at --ratio
    together; the late one begins later where it alone would leave more to spare than that, up to none."""
    late = late[not kept] if late else {0.9: 11, 0.8: 10}[ratio]
    schedule = train.make_schedule(TrainConfig(ratio=ratio, span=3, late=kept), depth)
    assert schedule.late == (kept and late < depth)
    assert list(schedule) == [0, late][: 1 + (late < depth)] and schedule.span == 3 and schedule.get(late, 0) == 0
    paper = [ratio ** len([s for s in range(min(4, depth - 1), depth, 3) if s <= i][:10]) for i in range(depth)]
    assert schedule[0] * late + 0.1 * (depth - late) == pytest.approx(sum(paper))


@pytest.mark.parametrize("depth", [30, 32, 8])
def test_paper_schedule(depth):
    """--paper has the paper's stages: layers 4, 7, 10, ..., after each a share of 0.9 of what was alive."""
    schedule = train.make_schedule(paper(), depth)
    layers = range(4, depth, 3)[:10]
    assert schedule == {layer: pytest.approx(0.9 ** (s + 1)) for s, layer in enumerate(layers)} and schedule.span == 1


def test_held_out_prompts_are_different_ones(monkeypatch):
    """A prompt that two sources give is measured once; trained on as often as it is given."""
    one, other, third = (train.data.Example(tiny.ids(40, seed).tolist(), [5]) for seed in range(3))
    monkeypatch.setattr(train.data, "load", lambda *_: ([one, one], [one, other, one, third]))
    found = train.prompts(TrainConfig(eval_prompts=2), None, tiny.build())
    assert found == ([one, one], [one, other])


def test_given_shares():
    """--shares is the schedule as written, whatever the flags of stages; a malformed one is named."""
    config = TrainConfig(shares="10:0.5,4:0.7", span=3, ratio=0.1)
    schedule = train.make_schedule(config, 30)
    assert schedule == {4: 0.7, 10: 0.5} and schedule.span == 3
    for shares in ("4", "4:0.7,", "4:a", "x:0.7", "4:0.7,4:0.6", "4:0.7:1", ":"):
        with pytest.raises(ValueError, match=f"--shares {shares}: LAYER:SHARE"):
            train.make_schedule(TrainConfig(shares=shares), 30)
    with pytest.raises(ValueError, match="layer 40"):
        train.make_schedule(TrainConfig(shares="40:0.7"), 30)
