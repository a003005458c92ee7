"""Every checkpoint name's family, from training to the tables, on tiny random checkpoints."""

import json
import sys

import pytest
import tiny

import bench
import cli
import eval_tasks
import sample
import train

QWEN3 = dict(model_type="qwen3", head_dim=8, tie_word_embeddings=True)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=32, hidden_size=32)
NAMES = {
    "llama2-7b": dict(num_key_value_heads=4),
    "mistral-7b": dict(model_type="mistral", sliding_window=None),
    "qwen2-7b": dict(model_type="qwen2"),
    "gemma-7b": dict(model_type="gemma", head_dim=16),
    "bloom-7b": dict(model_type="bloom", n_layer=6, n_head=4),
    "gpt-oss-20b": dict(model_type="gpt_oss", **EXPERTS),
    "llama3.2-1b": dict(
        tie_word_embeddings=True, rope_scaling=dict(rope_type="llama3", factor=8.0)
    ),
    "qwen3-0.6b": QWEN3,
}
NAMES["llama3.2-1b"]["rope_scaling"] |= dict(low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize("name", NAMES)
def test_end_to_end(name, tmp_path, monkeypatch, capsys):
    """train.py, sample.py, bench.py and eval_tasks.py run, with heads that drop tokens."""
    tiny.checkpoint(
        tmp_path / name, num_hidden_layers=6, max_position_embeddings=512, **NAMES[name]
    )
    tiny.rows(tmp_path / "rows.jsonl", 30)

    def run(script, flags):
        common = f"--ckpt {tmp_path}/{name} --device cpu --dtype float32"
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *common.split(), *flags.split()])
        cli.run(script.main)
        return capsys.readouterr().out

    data, heads = f"--data {tmp_path}/rows.jsonl", f"--heads {tmp_path}/out/heads"
    few = "--first_layer 2 --step 2 --max_prompts 4 --eval_prompts 2 --epochs 1"
    assert "step 1/1" in run(train, f"{data} {few} --out_dir {tmp_path}/out")
    assert "mean alive" in run(sample, f"{heads} --prompt {'abcdefghij' * 8} --max_new_tokens 4")
    assert "sdtp" in run(bench, f"{heads} --lengths 64 --new_tokens 2 --repeats 1")
    run(eval_tasks, f"{heads} {data} --limit 1 --json {tmp_path}/table.json")
    table = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert table["sdtp"]["mean_alive"] < 0.95 and table["sdtp"]["flops_share"] < 1
