"""train.py against loops written from the formulas, and against runs that were not killed."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from scipy.optimize import approx_fprime, brentq
from scipy.special import expit

import cli
import memory
import saliency
import sdtp
import train
from data import Example
from model import Extras, KVCache, Transformer
from train import TrainConfig, gumbel_mask, losses, masked_attend, rank_loss

N, T = 30, 38  # tokens of example(), and with the response
FREE = ~sdtp.is_protected(torch.arange(N), N)
WINDOW = {"model_type": "mistral", "sliding_window": 9}
STAGES = "--first_layer 1 --step 1"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def example(n=N, response=T - N):
    return Example(tiny.ids(n).tolist(), tiny.ids(response, seed=n).tolist())


def make_heads(*layers):
    """{layer: PruneHead} whose scores are about as far apart as the noise moves them."""
    torch.manual_seed(0)
    heads = {layer: sdtp.PruneHead(32) for layer in layers}
    for head in heads.values():
        head.fc2.weight.data *= 5
    return heads


def make_labels(layers, n=N, device="cpu"):
    return {i: normal(n, seed=i, dtype=torch.float32).abs().to(device) for i in layers}


def run_losses(model, heads, schedule, one=example(), **flags):
    labels, config = make_labels(heads, len(one.prompt), model.device), TrainConfig(**flags)
    return losses(model, heads, schedule, one, labels, config, seeded())


def spy(monkeypatch, owner, name):
    """A list that collects (arguments, result) of each call of owner.name."""
    calls, run = [], getattr(owner, name)

    def noted(*args, **more):
        calls.append((args, run(*args, **more)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, noted)
    return calls


def loop_attention(q, k, v, alive, extras=Extras()):
    """DynamicViT's masked attention, a loop over rows, heads and keys; (T, Hq, D)."""
    rows, groups = [], q.shape[1] // k.shape[1]
    for i in range(len(q)):
        for h in range(q.shape[1]):
            keys = [j for j in range(i + 1) if extras.window is None or i - j < extras.window]
            weights = [torch.ones_like(alive[0]) if j == i else alive[j] for j in keys]
            a = [q[i, h] @ k[j, h // groups] / math.sqrt(q.shape[2]) for j in keys]
            top = max(score for score, weight in zip(a, weights) if weight > 0).detach()
            e = [(s - top).clamp(max=700).exp() * weight for s, weight in zip(a, weights)]
            norm = sum(e) + (0 if extras.sinks is None else (extras.sinks[h] - top).exp())
            rows.append(sum(p / norm * v[j, h // groups] for p, j in zip(e, keys)))
    return torch.stack(rows).view(q.shape)


def run_masked(q, k, v, alive, extras=Extras()):
    at = torch.arange(len(q))
    return masked_attend(q, k, v, at, at, [len(q)], [len(q)], extras, alive)


@pytest.mark.parametrize("sinks", [None, normal(6, seed=9)], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_masked_attention_equals_loop(groups, window, sinks, monkeypatch):
    """Output and all gradients, that by the mask too, are the loop's; by blocks of rows as well."""
    q, k = normal(14, 6, 8), normal(14, 6 // groups, 8, seed=1) * 2
    v, alive = normal(14, 6 // groups, 8, seed=2), (normal(14, seed=3) > 0).double()
    g, extras, found = normal(14, 6, 8, seed=4), Extras(window, sinks), []
    for attention, rows in ((loop_attention, 0), (run_masked, 14), (run_masked, 4)):
        monkeypatch.setattr(train, "max", lambda *_, rows=rows: rows, raising=False)  # of a block
        leaves = [t.clone().requires_grad_() for t in (q, k, v, alive)]
        out = attention(*leaves, extras)
        found.append((out, *torch.autograd.grad((out * g).sum(), leaves)))
    for ours in found[1:]:
        torch.testing.assert_close(ours, found[0], rtol=1e-9, atol=1e-12)
    assert (ours[-1][alive == 0].abs() > 1e-3).sum() > 3  # the dropped learn too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_attention_is_stable(dtype):
    """Logits of 1000 and a dropped token far above all others: finite, and the output is right."""
    q, k, v = (normal(24, 2, 8, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    q, k, alive = 60 * q, 20 * k, (normal(24, seed=4) > 0).to(dtype)
    k[3], alive[3] = q[9], 0.0
    leaves = [t.requires_grad_() for t in (q, k, v, alive)]
    out, expected = run_masked(*leaves), loop_attention(*(t.detach().double() for t in leaves))
    if dtype == torch.float32:  # bfloat16 has too few digits
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-3)
    for t in (out, *torch.autograd.grad(out.float().square().sum(), leaves)):
        assert t.dtype == dtype and t.isfinite().all()


@pytest.mark.parametrize("span", [1, 4])
@pytest.mark.parametrize("schedule", [{1: 0.6, 2: 0.4}, {0: 0.5, 2: 0.0}])
@pytest.mark.parametrize("fields", [{}, WINDOW, tiny.QWEN3, tiny.BLOOM, tiny.GPT_OSS])
def test_masked_forward_equals_removal(fields, schedule, span, monkeypatch):
    """Without noise the masks and the response's logits are those of prefill and decoding."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.fill_(1.0))
    model, heads = tiny.build(**fields), make_heads(*(i for i in schedule if schedule[i]))
    masks, seen = spy(monkeypatch, train, "gumbel_mask"), spy(monkeypatch, model, "logits")
    one, cache = example(), KVCache(3)
    run_losses(model, heads, schedule, span=span)
    ((_, got),), ids = seen, torch.tensor(one.prompt + one.response)
    first, _ = sdtp.prefill(model, ids[:N], heads, schedule, cache=cache, span=span)
    for layer, (_, mask) in zip(schedule, masks):
        assert torch.equal(mask.nonzero()[:, 0], cache[layer].positions[0, : cache.alive[layer][0]])
    rest = model(ids[N:-1], torch.arange(N, T - 1), [T - N - 1], cache)
    torch.testing.assert_close(got, torch.cat((first, rest)), rtol=0, atol=1e-8)
    assert (got - model(ids)[N - 1 : -1]).abs().max() > 0.1  # what was dropped is missed


@pytest.mark.parametrize("fields, recompute", [({}, False), (WINDOW, True)])
def test_lm_gradient_by_the_masks_equals_loop(fields, recompute, monkeypatch):
    """dL_lm/dM of two cumulative stages is a loop's, for the dropped too; blocks may run twice."""
    model, one, heads = tiny.build(**fields), example(14, 4), make_heads(1, 2)
    drawn = [(normal(14, seed=seed) > 0).double().requires_grad_() for seed in (1, 2)]
    draws, calls = iter(drawn), spy(monkeypatch, train, "checkpoint")
    monkeypatch.setattr(train, "gumbel_mask", lambda score, alive, *_: alive * next(draws))
    monkeypatch.setattr(memory, "must_recompute", lambda *_: recompute)
    _, terms = run_losses(model, heads, {1: 0.7, 2: 0.5}, one)
    got = torch.autograd.grad(terms["lm"], drawn)
    ids = torch.tensor(one.prompt + one.response)
    x, alive = model.embed(ids), torch.ones(18, dtype=torch.float64)

    def attend(q, k, v, *rest):
        return loop_attention(q, k, v, alive, rest[-1])

    for layer, block in enumerate(model.layers):
        alive = alive * F.pad(drawn[layer - 1], (0, 4), value=1.0) if layer else alive
        x = block(x, torch.arange(18), [18], None, attend)
    lm = F.cross_entropy(model.logits(x[13:-1]), ids[14:])
    assert terms["lm"].item() == pytest.approx(lm.item(), rel=1e-6) and len(calls) == 3 * recompute
    torch.testing.assert_close(got, torch.autograd.grad(lm, drawn), rtol=1e-4, atol=1e-5)
    assert (torch.cat(got)[torch.cat(drawn) == 0].abs() > 1e-3).sum() > 1


@pytest.mark.parametrize("span", [1, 16])
@pytest.mark.parametrize("n", [5, 30, 200])
def test_masks_keep_the_count_of_the_schedule(n, span):
    """At the floor too; the dropped stay so; values are 0 and 1; no gradient without a choice."""
    protected = sdtp.is_protected(torch.arange(n), n)
    for seed in range(20):
        alive, draws = torch.ones(n), seeded(seed)
        for share in (1.0, 0.9, 0.7, 0.69, 0.4, 0.12, 0.0):
            score, count = normal(n, seed=seed).float().requires_grad_(), sdtp.alive_count(n, share)
            mask = gumbel_mask(score if share else None, alive, share, span, draws)
            assert mask.sum() == count and (mask <= alive).all()
            assert set(mask.tolist()) <= {0.0, 1.0} and (mask[protected] == 1).all()
            assert mask.requires_grad == (protected.sum() < count < alive.sum())
            alive = mask.detach()


def keep_function(score, noise, alive, kept, free, span):
    """keep of a stage by method section 3 as a function of its scores, which now are `score`."""
    means, places = np.zeros((len(score), len(score))), np.arange(len(score))
    for i in places[free]:
        near = (places // span == i // span) & free
        near = near & alive if (near & alive).any() else near
        means[i, near] = 1 / near.sum()
    now = means @ score + noise
    cut = now[kept & free].min()
    soft, hard = expit(now - cut), np.where(alive, kept, now >= cut)

    def keep(score):
        z = means @ score + noise  # the cut holds the sum over those alive
        moved = brentq(lambda cut: (expit(z - cut) - soft)[alive & free].sum(), -50, 50)
        return np.where(free, hard + expit(z - moved) - soft, 1.0)

    return keep


@pytest.mark.parametrize("span", [1, 4])
def test_gradient_of_masks_equals_finite_differences(span):
    """Of two stages; what the first dropped gets a gradient there, a constant has none."""
    n, alive, keeps, leaves = 36, torch.ones(36), [], []
    free, g = ~sdtp.is_protected(torch.arange(n), n).numpy(), normal(n, seed=5)
    for seed, share in ((18, 0.7), (19, 0.5)):
        leaves.append((2 * normal(n, seed=seed).float()).requires_grad_())
        mask = gumbel_mask(leaves[-1], alive, share, span, seeded(seed))
        draws = -torch.empty(2, n).exponential_(generator=seeded(seed)).log().numpy()
        noise = (draws[0] - draws[1])[np.arange(n) // span]
        now = leaves[-1].detach().double().numpy()
        before, after = (t.detach().numpy() > 0 for t in (alive, mask))
        keeps.append((keep_function(now, noise, before, after, free, span), now))
        alive = mask
    got = torch.autograd.grad((g * mask).sum(), leaves)
    first, second = (keep(now) for keep, now in keeps)
    for ours, other, (keep, now) in zip(got, (second, first), keeps):
        slopes = approx_fprime(now, lambda score: (g.numpy() * other) @ keep(score), 1e-6)
        np.testing.assert_allclose(ours, slopes, rtol=0, atol=1e-5)
        assert abs(ours.sum()) < 1e-6 and ours.abs().max() > 5e-3
    assert (got[0][(first == 0) & (second == 1)].abs() > 1e-3).any()


def loop_rank(scores, labels):
    """Eq. 6 as printed: a sum over all pairs i < j."""
    total, s, y = 0.0, scores.tolist(), labels.tolist()
    for j in range(len(s)):
        for i in range(j):
            sign = (y[i] > y[j]) - (y[i] < y[j])
            total += math.log1p(math.exp(-(s[i] - s[j]) * sign))
    return total


def test_rank_loss(monkeypatch):
    """Eq. 6, ties included; the mean over many draws of pairs is the sum over all pairs."""
    scores, labels = normal(6) * 5, torch.tensor([1.0, 1.0, 2.0, 5.0, 0.0, 2.0])
    full, draws = loop_rank(scores, labels), seeded()
    assert rank_loss(scores, labels).item() == pytest.approx(full)
    assert rank_loss(scores[:1], labels[:1]) == 0  # no pair
    monkeypatch.setattr(train, "MAX_PAIRS", 14)  # of 15
    found = torch.stack([rank_loss(scores, labels, draws) for _ in range(3000)])
    assert abs(found.mean() - full) < 4 * found.std() / 3000**0.5 < 0.05 * full


def test_losses_equal_loops(monkeypatch):
    """L_lm with KL(dense || pruned), L_mse, L_rank, eq. 8; no protected token is in a loss."""
    model, heads, schedule, one = tiny.build(), make_heads(1, 2), {1: 0.8, 2: 0.5}, example()
    labels, seen = make_labels(heads), spy(monkeypatch, model, "logits")
    calls = {layer: spy(monkeypatch, head, "logits") for layer, head in heads.items()}
    for layer in heads:
        labels[layer][~FREE] = math.nan
    config = TrainConfig(lm_weight=2.0, mse_weight=30.0, rank_weight=0.01, distill=True)
    loss, terms = losses(model, heads, schedule, one, labels, config, seeded())
    mse = rank = 0.0
    for layer, [((x, positions, seqlens, block), pi)] in calls.items():
        assert len(x) == N and seqlens == [N] and block is model.layers[layer]
        assert positions.tolist() == list(range(N))
        rows = [(k - d, y) for (k, d), y in zip(pi[FREE].tolist(), labels[layer][FREE].tolist())]
        mse += sum((1 / (1 + math.exp(-score)) - y) ** 2 for score, y in rows) / len(rows)
        rank += loop_rank(*torch.tensor(rows).double().T)
    log_probs = seen[0][1].log_softmax(-1)
    lm = -sum(log_probs[i, token].item() for i, token in enumerate(one.response)) / len(log_probs)
    dense = model(torch.tensor(one.prompt + one.response))[N - 1 : -1].log_softmax(-1)
    lm += (dense.exp() * (dense - log_probs)).sum(-1).mean().item()
    terms["loss"], total = loss, 2 * lm + 30 * mse + 0.01 * rank
    expected = {"lm": lm, "mse": mse, "rank": rank, "loss": total}
    assert {name: t.item() for name, t in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_learning_rate():
    """Linear warm-up to the highest, then a cosine to a tenth of it."""
    found = [train.learning_rate(step, 200, 1.0) for step in (0, 4, 10, 100, 199)]
    assert found == pytest.approx([0.1, 0.5, 1, 0.55, 0.1], abs=0.01)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_heads_learn_and_the_model_stays(tmp_path):
    model, heads = tiny.build(torch.float32), make_heads(1, 2)
    modules = torch.nn.ModuleList([model, *heads.values()])
    before = {name: p.detach().clone() for name, p in modules.named_parameters()}
    config = TrainConfig(out_dir=str(tmp_path), lr=0.01, epochs=5, accumulate=2)
    train.train(model, heads, {1: 0.8, 2: 0.5}, [example(n) for n in range(30, 38)], config)
    for name, p in modules.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("0.")  # the model's
    rank = [row["rank"] for row in read_log(tmp_path)]
    assert len(rank) == 20 and sum(rank[-4:]) < 0.95 * sum(rank[:4])


def test_a_step_is_the_mean_of_its_prompts(tmp_path):
    """Each prompt weighs the same, has its own noise, and comes once an epoch."""
    model, heads, calls, gradients = tiny.build(torch.float32), make_heads(1), [], []
    bias = heads[1].fc2.bias
    bias.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad[0].item()))

    def mine(model, heads, schedule, one, labels, config, generator):
        calls.append((len(one.prompt), generator.initial_seed()))
        return 1e-3 * len(one.prompt) * bias.sum(), {"tokens": torch.tensor(len(one.prompt))}

    config = TrainConfig(out_dir=str(tmp_path), epochs=2, accumulate=2)
    train.train(model, heads, {1: 0.8}, [example(n) for n in range(30, 35)], config, losses=mine)
    (sizes, seeds), log = zip(*calls), read_log(tmp_path)
    assert sorted(sizes[:5]) == sorted(sizes[5:]) == list(range(30, 35)) and sizes[:5] != sizes[5:]
    means = [(a + b) / 2 for a, b in zip(sizes[::2], sizes[1::2])]
    assert len(set(seeds)) == 10 and [row["tokens"] for row in log] == pytest.approx(means)
    assert gradients[1] / 1e-3 == pytest.approx(log[0]["tokens"]) == (sizes[0] + sizes[1]) / 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a checkpoint, rows, and an unbroken run."""
    folder = tmp_path_factory.mktemp("train")
    tiny.checkpoint(folder / "tiny", max_position_embeddings=700)
    tiny.rows(folder / "rows.jsonl", 60, 60)
    with pytest.MonkeyPatch.context() as patch:
        run(folder, "unbroken", patch)
    return folder


def argv(world, out, more):
    flags = f"--ckpt {world}/tiny --data {world}/rows.jsonl --out_dir {world}/{out} --device cpu"
    flags += f" --dtype float32 --accumulate 2 --eval_prompts 2 --max_prompts 14 {more}"
    return ["train.py", *flags.split()]


def run(world, out, patch, more=STAGES):
    patch.setattr(sys, "argv", argv(world, out, more))
    cli.run(train.main)


def same_run(a, b):
    names = "heads/heads.safetensors", "log.jsonl"
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def load_heads(world, out):
    model = Transformer.from_pretrained(world / "tiny", torch.float32)
    return sdtp.load_heads(world / out / "heads", model)


def test_run_writes_everything(world):
    out, log = world / "unbroken", read_log(world / "unbroken")
    assert (out / "predictions.png").is_file() and not (out / "checkpoint.safetensors").exists()
    assert [row["step"] for row in log] == list(range(1, 15)) and log[0].keys() > {"loss", "rank"}
    rows = json.loads((out / "eval.json").read_text())
    assert [r["method"] for r in rows] == ["dense", "sdtp", "random", "most_recent", "teacher"]
    heads, schedule, span, meta = load_heads(world, "unbroken")
    assert list(heads) == [1, 2] and schedule == pytest.approx({1: 0.9, 2: 0.81}) and span == 1
    assert (meta["teacher"], meta["epochs"], meta["prompts"]) == ("grad_x_input", 2, 14)


def die_at(step, how):
    """A learning_rate() that ends the run where that step begins."""
    plain = train.learning_rate
    return lambda now, *rest: how() if now == step else plain(now, *rest)


def test_killed_and_resumed_run_equals_unbroken(world, monkeypatch):
    """kill -9 between two checkpoints, then --resume: the same heads and log; refusals before."""
    out, checkpoint = world / "killed", world / "killed" / "checkpoint.safetensors"
    code = (
        "import os, cli, test_train, train; train.CHECKPOINT_EVERY = 3\n"
        "train.learning_rate = test_train.die_at(5, lambda: os.kill(os.getpid(), 9))\n"
        "cli.run(train.main)"
    )
    command = [sys.executable, "-c", code, *argv(world, "killed", STAGES)[1:]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, stdout=subprocess.DEVNULL, env=env).returncode == -9
    assert len(read_log(out)) == 5 and not (out / "heads").exists()
    for flags, error in ((STAGES, "holds a run"), ("--resume --lr 0.5", "has --lr 0.002")):
        with pytest.raises(SystemExit, match=error):
            run(world, "killed", monkeypatch, flags)
    saved = checkpoint.read_bytes()
    checkpoint.write_bytes(saved[:-100])
    with pytest.raises(SystemExit, match="checkpoint.safetensors is damaged"):
        run(world, "killed", monkeypatch, "--resume")
    checkpoint.write_bytes(saved)
    labels, steps = spy(monkeypatch, saliency, "label"), spy(monkeypatch, train, "learning_rate")
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out_dir", str(out)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="script of the run"):
        patch.setattr(sdtp, "fingerprint", lambda model: "other weights")
        cli.run(train.main)
    cli.run(train.main)  # all other flags are the run's own
    assert same_run(out, world / "unbroken") and len(steps) == 14 - 3
    assert sum(isinstance(args[3], dict) for args, _ in labels) == 14 - 10 + 2  # the rest was kept
    with pytest.raises(SystemExit, match="holds a finished run"):
        run(world, "killed", monkeypatch, "--resume")


def test_a_run_stopped_before_its_first_checkpoint(world, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "learning_rate", die_at(2, sys.exit))
        run(world, "again", patch)
    run(world, "again", monkeypatch, STAGES + " --resume")
    assert same_run(world / "again", world / "unbroken")


def test_other_schedules(world, monkeypatch, capsys):
    """Spans and a share of 0 are trained and saved; what a schedule costs is printed."""
    more = "--epochs 1 --max_prompts 2 --teacher grad_norm"
    run(world, "spans", monkeypatch, f"--shares 2:0,1:0.7 --span 4 {more}")
    heads, *found, _ = load_heads(world, "spans")
    assert found == [{1: 0.7, 2: 0.0}, 4] and list(heads) == [1]
    assert "mean alive 100.0%" not in capsys.readouterr().out
    run(world, "nothing", monkeypatch, f"--first_layer 2 --ratio 1 {more}")
    assert "mean alive 100.0%" in capsys.readouterr().out


def test_a_loss_that_is_not_finite(world, monkeypatch):
    """It ends the run in one line; no heads are written."""
    monkeypatch.setattr(train, "rank_loss", lambda score, *_: score.sum() * math.nan)
    with pytest.raises(SystemExit, match="the loss is nan: a lower --lr"):
        run(world, "nan", monkeypatch)
    assert not (world / "nan" / "heads").exists()


@tiny.on_cuda
def test_cuda_equals_cpu():
    model, heads, found = tiny.build(torch.float32), make_heads(1, 2), []
    for device in ("cpu", "cuda"):
        modules = torch.nn.ModuleList([model, *heads.values()]).to(device)
        loss, _ = run_losses(model, heads, {1: 0.8, 2: 0.5}, distill=True)
        gradients = torch.autograd.grad(loss, list(modules[1:].parameters()))
        found.append([t.cpu() for t in (loss, *gradients)])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
