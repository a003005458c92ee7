"""beyond.py: the head, its loss, and a run."""

import json
import sys

import pytest
import tiny
import torch

import beyond
import cli
import eval_tasks


def head(seed=0):
    torch.manual_seed(seed)
    return beyond.QuestionHead(32)


def test_head_sees_what_comes_last():
    """A question's tokens change the scores before them; packed prompts do not see each other."""
    model, h = tiny.build(torch.float32), head()
    block, ids = model.layers[0], tiny.ids(50)

    def scores(ids, seqlens):
        return h(model.embed(ids), model.positions(seqlens), seqlens, block)

    alone = torch.cat((scores(ids[:40], [40]), scores(ids[40:], [10])))
    packed = scores(ids, [40, 10])
    assert (packed - alone).abs().max() <= 1e-5 and packed.std() > 0.01
    asked = ids[:40].clone()
    asked[-1] += 1
    changed = (scores(asked, [40]) - packed[:40]).abs() > 1e-4
    assert changed[:39].any()


def test_matches_equal_loops():
    h, x = head(), torch.randn(40, 32)
    found = h.matches(x)
    for t in (0, 17, 39):
        for m in range(beyond.MATCHES):
            part = slice(m * beyond.RANK, (m + 1) * beyond.RANK)
            products = [h.k_proj(x[t])[part] @ h.q_proj(x[i])[part] / 4 for i in range(8, 40)]
            products = torch.stack(products)
            assert found[t, m].item() == pytest.approx(products.max().item(), abs=1e-5)
            mean = products.exp().mean().log().item()
            assert found[t, beyond.MATCHES + m].item() == pytest.approx(mean, abs=1e-5)


def test_list_loss():
    """Against a loop; least where the scores are the logarithms of the targets."""
    score, labels = torch.randn(7, requires_grad=True), torch.rand(7)
    spans = torch.tensor([3, 3, 4, 4, 4, 9, 9])
    parts = [slice(0, 2), slice(2, 5), slice(5, 7)]
    wanted = torch.stack([labels[p].mean() for p in parts]).sqrt()
    means = torch.stack([score[p].mean() for p in parts])
    expected = -(wanted / wanted.sum() * means.log_softmax(0)).sum()
    assert beyond.list_loss(score, labels, spans).item() == pytest.approx(expected.item())
    best = torch.cat([s.log().expand(n) for s, n in zip(wanted, (2, 3, 2))]).requires_grad_()
    beyond.list_loss(best, labels, spans).backward()
    assert best.grad.abs().max() <= 1e-6


def test_run(tmp_path, monkeypatch, capsys):
    """Heads are trained at two layers, and every script finds their class."""
    tiny.checkpoint(tmp_path / "tiny", max_position_embeddings=700)
    tiny.rows(tmp_path / "rows.jsonl", 60, 120)
    flags = f"--ckpt {tmp_path}/tiny --data {tmp_path}/rows.jsonl --out_dir {tmp_path}/out"
    flags += " --device cpu --dtype float32 --max_prompts 14 --eval_prompts 2 --span 4 --lr 0.02 --epochs 6"
    monkeypatch.setattr(sys, "argv", ["beyond.py", *flags.split(), "--shares", "0:0.8,1:0.6,2:0"])
    cli.run(beyond.main)
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert len(log) == 21 and sum(row["list"] for row in log[-2:]) < sum(
        row["list"] for row in log[:2]
    )
    evaluation = f"--ckpt {tmp_path}/tiny --heads {tmp_path}/out/heads --data {tmp_path}/rows.jsonl"
    flags = [*evaluation.split(), "--limit", "2", "--methods", "sdtp", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["eval_tasks.py", *flags, "--device", "cpu"])
    cli.run(eval_tasks.main)
    assert "sdtp" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--rank_weight"):
        monkeypatch.setattr(sys, "argv", ["beyond.py", "--rank_weight", "0"])
        cli.run(beyond.main)
