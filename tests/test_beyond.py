"""beyond.py: the head and its loss against plain loops, what is trained on, and a run."""

import json
import math
import sys

import pytest
import safetensors.torch
import tiny
import torch
import torch.nn.functional as F
from test_scorers import loop_attention

import beyond
import cli
import eval_tasks
import saliency
from data import Example
from sdtp import PruneHead, is_protected
from tokenizer import Tokenizer


def logits_by_hand(head, x, block):
    """Of one prompt: its tokens' features, each by a loop, through the paper's head."""
    n, x = len(x), x.double()
    weights = torch.tensor(loop_attention(block, x, range(n), 20)).mean(0)  # (T, T)
    means = torch.stack([weights[-last:].mean(0) for last in (1, 8, 32)], -1)
    logs = [[math.log(p + 1), math.log(n - p), math.log(n)] for p in range(n)]
    parts = [(n * means).clamp(min=1e-6).log() / 4, torch.arange(n)[:, None] / n]
    parts += [torch.tensor(logs) / 8]
    rows = block.input_layernorm(x)
    return PruneHead.logits(head, torch.cat((rows, *parts), -1))


def test_head():
    """Prompts in one call get each attention from their own end, with a window, and places."""
    torch.manual_seed(0)
    model, head = tiny.build(model_type="mistral", sliding_window=20), beyond.QuestionHead(32)
    x, block = model.embed(tiny.ids(50)), model.layers[1]
    got = head.logits(x, model.positions([40, 10]), [40, 10], block)
    wanted = [logits_by_hand(head, part, block) for part in x.split([40, 10])]
    assert (got - torch.cat(wanted)).abs().max() <= 1e-5 and got.std() > 0.1


def test_losses():
    """A cross-entropy over eights of free tokens: roots of mean labels, and mean scores."""
    model, head, ids = tiny.build(), beyond.QuestionHead(32), tiny.ids(45)
    labels = torch.rand(40).where(~is_protected(torch.arange(40), 40), math.nan)
    x = saliency.dense_states(model, ids[:40], [2])[0][2]
    score = head(x, torch.arange(40), [40], model.layers[2])
    both = torch.stack((score, labels))[:, 4:36].split([4, 8, 8, 8, 4], 1)
    mean, mark = torch.stack([part.mean(1) for part in both], 1)
    one = Example(ids[:40].tolist(), ids[40:].tolist())
    loss, terms = beyond.losses(model, {2: head}, {}, one, {2: labels}, None, None)
    wanted = F.cross_entropy(mean, mark.sqrt() / mark.sqrt().sum()).item()
    assert terms == {"list": loss} and loss.item() == pytest.approx(wanted)


def test_load(tmp_path):
    """Windows of all lengths up to --max_prompt; no prompt twice, nor in both parts."""
    tokenizer = Tokenizer(tiny.checkpoint(tmp_path / "tiny"))
    tiny.rows(tmp_path / "rows.jsonl", 60)
    (tmp_path / "a.txt").write_text("".join(f"{i} words. " for i in range(3000)))
    parts = beyond.load(f"{tmp_path}/a.txt,{tmp_path}/rows.jsonl", tokenizer, 512)
    prompts = [tuple(example.prompt) for part in parts for example in part]
    assert len({*prompts}) == len(prompts) and len(parts[0]) > 3 * len(parts[1]) > 0
    windows = [len(p) for p in prompts if tokenizer.decode(p[1:]).count("words") > 9]
    assert {*windows} == {256, 512} and len(prompts) - len(windows) == 60


def test_run(tmp_path, monkeypatch, capsys):
    """Heads learn labels of the middle layer, and every script finds their class."""

    def run(module, flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *flags.split(), "--device", "cpu"])
        cli.run(module.main)

    tiny.checkpoint(tmp_path / "tiny", max_position_embeddings=700)
    tiny.rows(tmp_path / "rows.jsonl", 60)
    both = f"--ckpt {tmp_path}/tiny --data {tmp_path}/rows.jsonl --dtype float32"
    flags = f"{both} --out_dir {tmp_path}/out --shares 0:0.7,2:0 --span 4"
    run(beyond, f"{flags} --max_prompts 14 --eval_prompts 2 --lr 0.02 --epochs 6")
    log = [json.loads(line)["list"] for line in open(tmp_path / "out/log.jsonl")]
    assert len(log) == 21 and sum(log[-2:]) < sum(log[:2])
    labels = [safetensors.torch.load_file(path) for path in (tmp_path / "out/labels").iterdir()]
    assert len(labels) == 14 + 2 and all(found.keys() == {"1"} for found in labels)
    capsys.readouterr()
    run(eval_tasks, f"{both} --heads {tmp_path}/out/heads --limit 2 --methods sdtp")
    assert "sdtp" in capsys.readouterr().out
    for flags in ("--rank_weight 0", "--shares 0:0.7,1:0.5", "--shares="):
        with pytest.raises(SystemExit, match=flags.rstrip("=").split()[0]):
            run(beyond, f"{flags} --out_dir {tmp_path}/new")
    helps = cli.comments(beyond.BeyondConfig)  # train.py's, and its own
    assert helps["lr"].startswith("highest") and helps["shares"].startswith("LAYER")
