"""sample.py: text, counts, FLOPs and the picture, against transformers, plain loops and prefill."""

import json
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_sdtp import checkpoint_with_heads
from transformers import LlamaForCausalLM as Reference

import cli
import flops
import sample
from model import Transformer
from sdtp import load_heads, prefill
from tokenizer import Tokenizer

PROMPT = "hello there, how are you today?"
N = len(PROMPT) + 1  # with <s>: 32 tokens, the protected are 4 and 3
STAGES = {"heads/tiny": {2: 0.5, 4: 0.3}, "heads/few": {2: 0.2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    checkpoint_with_heads(folder, STAGES, num_hidden_layers=6)
    return folder


@pytest.fixture
def run(world, monkeypatch, capsys):
    """sample.py with flags, in the world's folder; returns (what it prints, its rows)."""

    def script(flags, prompt=PROMPT):
        monkeypatch.chdir(world)
        argv = f"sample.py --ckpt tiny --dtype float32 --max_new_tokens 5 --json r.json {flags}"
        monkeypatch.setattr(sys, "argv", [*argv.split(), "--prompt", prompt])
        sample.main()
        return capsys.readouterr().out, json.loads((world / "r.json").read_text())

    return script


def test_compare(run, world):
    """Dense text is transformers' greedy one; alive, FLOPs and bytes are what the shares say."""
    out, (dense, pruned) = run("--compare")
    reference, tokenizer = Reference.from_pretrained(world / "tiny"), Tokenizer(world / "tiny")
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    new = reference.generate(ids, max_new_tokens=5, do_sample=False)[0, N:]
    assert len(new) == 5 and out.splitlines()[2:4] == ["[dense]", tokenizer.decode(new)]
    counts = [32, 32, 16, 16, 10, 10]  # half, then 0.3 * 32 = 9.6
    assert [dense["alive"], pruned["alive"]] == ["32 32 32 32 32 32", "32 32 16 16 10 10"]
    assert [dense["mean_alive"], pruned["mean_alive"]] == [1, sum(counts) / 6 / 32]
    assert pruned["kv_bytes"] == sum(2 * 2 * 8 * 4 * (n + 5) for n in counts)
    model = Transformer.from_pretrained(world / "tiny")
    heads = load_heads(world / "heads/tiny", model)[0]
    share = sum(flops.executed_flops(model.config, 32, counts, heads))
    share /= sum(flops.executed_flops(model.config, 32, [32] * 6))
    assert pruned["flops_share"] == pytest.approx(share) and f"FLOPs {share:.1%} of dense" in out


def test_kv(run):
    """--kv keeps 40 % of the keys and values, of dense and pruned prompts; alive stays."""
    out, (dense, pruned) = run("--compare --kv h2o")
    assert [dense["held"], pruned["held"]] == ["13 13 13 13 13 13", "13 13 13 13 10 10"]
    assert "[sdtp+h2o] tokens in the KV cache per layer: 13 13 13 13 10 10" in out


def test_keep(run, world):
    """--keep is the compute of the paper's stages at this prompt's length; a floor says so."""
    config = Transformer.from_pretrained(world / "tiny").config
    counts = flops.alive_per_layer(flops.at_keep(config, STAGES["heads/tiny"], 0.45, N), N, 6)
    assert run("--keep 0.45")[1][0]["alive"] == " ".join(map(str, counts)) == "32 32 25 25 21 21"
    out, rows = run("--heads heads/few")
    assert rows[0]["alive"] == "32 32 7 7 7 7" and "7 (at the end the protected alone)" in out


def test_sampling_is_seeded(run):
    first, again, other = (run(f"--temperature 1.5 --seed {seed}")[0] for seed in (1, 1, 2))
    assert first.splitlines()[2] == again.splitlines()[2] != other.splitlines()[2]


def test_stream_waits_for_whole_characters(monkeypatch, capsys):
    def generate(*_, on_token, **__):
        for byte in "né漢!".encode():
            on_token([byte])
            shown.append(capsys.readouterr().out)

    shown, how = [], dict(eos_token_ids=[], decode=lambda ids: bytes(ids).decode(errors="replace"))
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "cost", lambda *_: {})
    config = sample.SampleConfig(device="cpu")
    sample.run(tiny.build(), SimpleNamespace(**how), tiny.ids(5), config, "dense", None, None)
    assert shown == ["n", "", "é", "", "", "漢", "!"]


def test_picture(run, world, monkeypatch):
    """Every token stands on the colour of its fate, which the legend names and counts."""
    prompt, figures = "a b\nc$d_e$ f" + PROMPT, []
    monkeypatch.setattr(cli, "save_figure", lambda figure, path: figures.append(figure))
    run("--picture p.png", prompt)
    model = Transformer.from_pretrained(world / "tiny", torch.float32)
    ids = torch.tensor(Tokenizer(world / "tiny").encode(prompt))
    _, cache = prefill(model, ids, *load_heads(world / "heads/tiny", model)[:2])
    first, middle, last = (set(cache[layer].rows()[2].tolist()) for layer in (0, 2, 4))
    fates = {"dropped at layer 2": first - middle, "dropped at layer 4": middle - last}
    fates["alive"] = last
    axis = figures[0].axes[0]
    cells = [patch for patch in axis.patches if patch.get_width()]
    for patch, (fate, tokens) in zip(axis.get_legend().get_patches(), fates.items(), strict=True):
        color = patch.get_facecolor()
        assert patch.get_label() == f"{fate}: {len(tokens)}"
        assert tokens == {i for i, cell in enumerate(cells) if cell.get_facecolor() == color}
    assert "".join(text.get_text() for text in axis.texts[1:14]) == "a b c<unk>d<unk>e<unk> f"
