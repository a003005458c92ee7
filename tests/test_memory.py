"""memory.py: the memory that is reckoned against the profiler's count of tensors alive."""

import json
import re
import sys

import huggingface_hub
import pytest
import tiny
import torch
from test_download import Hub

import download
import memory
import saliency
from bench import cpu_peak_bytes
from data import Example
from sdtp import paper_schedule, prefill
from train import TrainConfig, train

WIDE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=8, vocab_size=3000)


@pytest.mark.parametrize("kind", [dict(model_type="llama"), dict(model_type="gemma", head_dim=64)])
@pytest.mark.parametrize("job", ["prefill", "labels", "recomputed labels", "training"])
def test_reckoned_is_what_is_alive(tmp_path, monkeypatch, job, kind):
    """Within 15 %, beside the weights and what malloc keeps."""
    fields = {**tiny.SIZES, **WIDE, **kind, "max_position_embeddings": 2048}
    model, ids = tiny.build(torch.float32, **fields), tiny.ids(640)
    stages, job, again = paper_schedule(8), job.split()[-1], job.startswith("recomputed")
    monkeypatch.setattr(memory, "must_recompute", lambda *_: again)
    heads = {layer: memory.PruneHead(128) for layer in stages}
    config = TrainConfig(epochs=1, accumulate=1, out_dir=str(tmp_path))
    examples = [Example(ids[:512].tolist(), ids[512:].tolist())]
    calls = {
        "prefill": lambda: prefill(model, ids.repeat(3), heads, stages),
        "labels": lambda: saliency.label(model, ids, 512, stages),
        "training": lambda: train(model, heads, stages, examples, config),
    }
    n = 3 * 640 if job == "prefill" else 512
    reckoned = memory.peak_bytes(memory.empty_model(fields), job, n, stages)
    beside = memory.HOLES + sum(p.numel() for p in model.parameters()) * 4
    assert reckoned - beside == pytest.approx(cpu_peak_bytes(calls[job]), rel=0.15)


def test_plan(tmp_path, monkeypatch, capsys):
    """The files that would come, none of which is fetched; without a hub, or of a folder, too."""
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["download.py", "mistral-7b", "--plan"])
    download.main()
    said = capsys.readouterr().out
    assert "Apache-2.0" in said and all(f"0.500 GB  {file}\n" in said for file in Hub.files)
    assert "3.000 GB  in all" in said and "prefill of 32,768 tokens" in said and hub.asked == []
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: 1 / 0)
    download.main()
    assert re.search(r"(14.5|29.0) +weights", capsys.readouterr().out)
    (tmp_path / "mine").mkdir()
    raw = {**memory.shape_fields("10m"), "num_hidden_layers": 5}
    (tmp_path / "mine/config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(sys, "argv", ["download.py", "mine", "--plan"])
    download.main()
    assert "config.json" in capsys.readouterr().out
