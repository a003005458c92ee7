"""host.py against our Transformer of the same weights, and against transformers itself."""

import pytest
import tiny
import torch
from test_kv import packed
from test_model import load, logits_of, reference
from test_sdtp import heads_of

from host import Host, generate_inputs
from kv import compressed
from model import KVCache
from scorers import last_attention
from sdtp import dense, generate, load_heads, prefill, pruned, save_heads

FAMILIES = {
    "llama": dict(attention_bias=True, tie_word_embeddings=True),
    "mistral": dict(sliding_window=7),
    "qwen2": dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": dict(head_dim=12),
    "gemma": dict(head_dim=16),
}
STAGES, LENS = {0: 0.8, 2: 0.5}, [40, 1, 33]
METHODS = {
    "dense": dense,
    "heads": pruned(heads_of(STAGES), STAGES, span=2),
    "scorer": pruned({2: last_attention()}, {2: 0.5}),
    "h2o": compressed(pruned(heads_of(STAGES), STAGES), "h2o", 0.3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_host_is_our_transformer(family, tmp_path):
    hf = reference(family, tmp_path, **FAMILIES[family])
    before = logits_of(hf)
    host, ours, ids = Host(hf), load(tmp_path), packed(LENS)
    for name, method in METHODS.items():
        if name == "h2o" and host.config.sliding_window:
            continue
        caches = [KVCache(3, extra=12), KVCache(3, extra=12)]
        logits = [method(m, ids, LENS, cache) for m, cache in zip((ours, host), caches)]
        assert torch.equal(*logits) and caches[0].seqlens() == caches[1].seqlens()
        for mine, its in zip(*caches):
            assert torch.equal(mine.k, its.k) and torch.equal(mine.positions, its.positions)
        new = generate(ours, ids, 12, method, seqlens=LENS)  # past the window
        assert new == generate(host, ids, 12, method, seqlens=LENS)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        host(ids[:9], attend=lambda *_: 1 / 0)
    assert torch.equal(before, logits_of(hf)) and hf.config._attn_implementation == "eager"


def test_heads_of_the_folder_load(tmp_path):
    hf, heads = reference("llama", tmp_path), heads_of(STAGES)
    save_heads(tmp_path / "heads", heads, load(tmp_path), STAGES)
    loaded = load_heads(tmp_path / "heads", Host(hf))[0]
    assert torch.equal(loaded[2].fc1.weight, heads[2].fc1.weight)
    with pytest.raises(ValueError, match="other weights"):
        load_heads(tmp_path / "heads", Host(tiny.randomise(hf, seed=1)))


REFUSED = [
    ("gemma2", "softcap", dict(head_dim=16, query_pre_attn_scalar=16)),
    ("granite", "logits", dict(attention_multiplier=8**-0.5, embedding_multiplier=12.0)),
    ("gpt_oss", "s_aux", dict(head_dim=8, num_local_experts=4)),
    ("llama", "logits", {}),  # made to mix rows outside of attention
]


@pytest.mark.parametrize("family, reason, fields", REFUSED)
def test_what_a_host_cannot_be(family, reason, fields, tmp_path):
    hf = reference(family, tmp_path, **fields)
    if family == "llama":
        shift = torch.nn.ZeroPad2d((0, 0, 1, -1))  # each row gets some of the one before
        hf.model.layers[1].mlp.register_forward_hook(lambda _, x, out: out + shift(out))
    with pytest.raises(ValueError, match=f"^host '{family}': .*{reason}"):
        Host(hf)


def test_hf_generate_after_a_pruned_prefill(tmp_path):
    hf, ids, stages = reference("llama", tmp_path), tiny.ids(40), {1: 0.6, 2: 0.4}
    host, method = Host(hf), pruned(heads_of(stages), stages)
    _, cache = prefill(host, ids, heads_of(stages), stages)
    for implementation, window in (("eager", None), ("sdpa", 7)):
        hf.set_attn_implementation(implementation)
        host.config.sliding_window = window
        with pytest.raises(ValueError, match="attn_implementation sdpa, no sliding window"):
            generate_inputs(host, ids, cache)
    host.config.sliding_window = None
    how = dict(generate_inputs(host, ids, cache), pad_token_id=0)
    out = hf.generate(**how, do_sample=False, max_new_tokens=12)[0].tolist()
    assert out[40:] == generate(host, ids, 12, method)[0] != generate(host, ids, 12)[0]
    with pytest.raises(ValueError, match="all of one prompt at layer 0"):
        generate_inputs(host, ids, prefill(host, ids, heads_of(STAGES), STAGES)[1])
