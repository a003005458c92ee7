"""beyond.py: the head, its loss, and a run."""

import json
import sys

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_scorers import loop_attention

import beyond
import cli
import eval_tasks
import saliency
import train


def test_head_sees_what_comes_last():
    """The prompt's end changes the scores before it; packed prompts do not see each other."""
    model, ids = tiny.build(torch.float32), tiny.ids(50)
    torch.manual_seed(0)
    head, block = beyond.QuestionHead(32), model.layers[0]

    def scores(ids, seqlens):
        return head(model.embed(ids), model.positions(seqlens), seqlens, block)

    packed = scores(ids, [40, 10])
    alone = torch.cat((scores(ids[:40], [40]), scores(ids[40:], [10])))
    assert (packed - alone).abs().max() <= 1e-5 and packed.std() > 0.01
    asked = ids[:40].clone()
    asked[-1] += 1
    assert ((scores(asked, [40]) - packed[:40])[:39].abs() > 1e-4).all()


def test_attention_from_end_equals_loops():
    model, n = tiny.build(), 40
    block, x, positions = model.layers[1], torch.randn(n, 32).double(), torch.arange(n)
    weights = torch.tensor(loop_attention(block, x, range(n), n)).mean(0)  # (T, T)
    wanted = torch.stack([weights[-last:].mean(0) for last in (1, 8, 32)], -1)
    found = beyond.attention_from_end(block.input_layernorm(x), positions, block)
    assert (found - (wanted * n).clamp(min=1e-6).log() / 4).abs().max() <= 1e-4


def test_list_loss():
    """A cross-entropy of spans' means, targets and scores."""
    score, labels = torch.randn(7), torch.rand(7)
    spans = torch.tensor([3, 3, 4, 4, 4, 9, 9])
    parts = [slice(0, 2), slice(2, 5), slice(5, 7)]
    wanted = torch.stack([labels[p].mean() for p in parts]).sqrt()
    means = torch.stack([score[p].mean() for p in parts])
    expected = F.cross_entropy(means, wanted / wanted.sum()).item()
    assert beyond.list_loss(score, labels, spans).item() == pytest.approx(expected)


def test_labels_are_of_the_middle_layer(tmp_path):
    model, config = tiny.build(torch.float32), train.TrainConfig()
    one = beyond.data.Example(tiny.ids(30).tolist(), tiny.ids(5).tolist())
    found = beyond.label(model, one, [0, 2], config, tmp_path)
    wanted = saliency.stored_label(model, one, [1], config, tmp_path)[1]
    assert torch.equal(found[0], wanted) and torch.equal(found[2], wanted) and wanted.std() > 0


def test_run(tmp_path, monkeypatch, capsys):
    """Heads are trained at two layers, and every script finds their class."""

    def run(module, flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *flags.split(), "--device", "cpu"])
        cli.run(module.main)

    tiny.checkpoint(tmp_path / "tiny", max_position_embeddings=700)
    tiny.rows(tmp_path / "rows.jsonl", 60)
    both = f"--ckpt {tmp_path}/tiny --data {tmp_path}/rows.jsonl --dtype float32"
    flags = f"{both} --out_dir {tmp_path}/out --shares 0:0.8,1:0.6,2:0 --span 4"
    run(beyond, f"{flags} --max_prompts 14 --eval_prompts 2 --lr 0.02 --epochs 6")
    log = [json.loads(line)["list"] for line in open(tmp_path / "out/log.jsonl")]
    assert len(log) == 21 and sum(log[-2:]) < sum(log[:2])
    capsys.readouterr()
    run(eval_tasks, f"{both} --heads {tmp_path}/out/heads --limit 2 --methods sdtp")
    assert "sdtp" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--rank_weight"):
        run(beyond, "--rank_weight 0")
