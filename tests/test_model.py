"""model.py against transformers and against float64 loops."""

import json
import math
import os

import pytest
import safetensors.torch
import tiny
import torch

import model
from model import Config, Extras, KVCache, LayerCache, Transformer, attend, attend_cache, sdpa

os.environ["HF_HUB_OFFLINE"] = "1"
LINEAR = dict(rope_type="linear", factor=4.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32)
MSCALE = dict(mscale=0.7, mscale_all_dim=0.4, truncate=False, beta_fast=16.0)
DYNAMIC = dict(rope_type="dynamic", factor=4.0)
OLD32 = dict(**LLAMA3, original_max_position_embeddings=32)
T = 40  # prompt; the windows below are 7, so T > 2 * window

WINDOW = dict(use_sliding_window=True, max_window_layers=1)
CASES = {  # name, which begins with the family -> fields of its config
    "llama, every head its own keys": dict(num_key_value_heads=4),
    "llama, one group, head_dim apart": dict(num_key_value_heads=1, head_dim=12),
    "llama, tied": dict(tie_word_embeddings=True),
    "llama, biases": dict(attention_bias=True, mlp_bias=True),
    "llama, rope_theta and eps": dict(rope_parameters={"rope_theta": 300.0}, rms_norm_eps=0.1),
    "llama, linear rope": dict(rope_parameters=LINEAR),
    "llama, llama3 rope": dict(rope_parameters={**OLD32, "rope_theta": 500.0}, head_dim=16),
    "llama, llama3 rope, max_position_embeddings": dict(rope_parameters=LLAMA3),
    "llama, yarn": dict(rope_parameters=YARN),
    "llama, yarn, outer length": dict(rope_parameters=YARN, original_max_position_embeddings=16),
    "qwen2, yarn by mscale, not truncated": dict(rope_parameters=dict(YARN, **MSCALE)),
    "llama, dynamic": dict(rope_parameters=DYNAMIC, max_position_embeddings=16),
    "llama, sliding_window means nothing": dict(sliding_window=7),
    "mistral": dict(sliding_window=7),
    "mistral, no window": dict(sliding_window=None, head_dim=12),
    "qwen2, tied": dict(tie_word_embeddings=True, num_key_value_heads=4),
    "qwen2, window unused": dict(sliding_window=7, max_window_layers=0),
    "qwen2, window": dict(WINDOW, sliding_window=7),
    "qwen2, null": dict(WINDOW, sliding_window=None),
    "qwen3": dict(head_dim=16),
    "qwen3, biases, window": dict(WINDOW, head_dim=12, attention_bias=True, sliding_window=7),
    "gemma, untied": dict(head_dim=16, tie_word_embeddings=False),
    "gemma, biases, legacy gelu": dict(head_dim=8, attention_bias=True, hidden_act="gelu"),
}


def edit(folder, **changes):
    """Change fields of a config.json; None removes one."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    raw = {k: v for k, v in raw.items() if v is not None or k == "sliding_window"}
    path.write_text(json.dumps(raw))


def hub_spelling(folder, **fields):
    """rope_theta + rope_scaling, no layer_types: as on the hub, not as transformers 5 writes it."""
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = {"type" if kind == "linear" else "rope_type": kind, **rope}
    fields.update(rope_parameters=None, layer_types=None, rope_theta=theta)
    edit(folder, **fields, rope_scaling=None if kind == "default" else scaling)


def reference(family, folder, shard="1GB", **fields):
    """A random transformers model, written to `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_theta": 10000.0, "rope_type": "default", **fields.pop("rope_parameters", {})}
    config = AutoConfig.for_model(family, **{**tiny.SIZES, "rope_parameters": rope, **fields})
    how = dict(attn_implementation="eager", dtype=torch.float32)
    hf = tiny.randomise(AutoModelForCausalLM.from_config(config, **how).eval(), family == "gemma")
    hf.save_pretrained(folder, max_shard_size=shard)
    return hf


def logits_of(hf, ids=tiny.ids(T), **how):
    """(T, vocab_size) float32 of a transformers model."""
    with torch.no_grad():
        logits = hf(ids[None], **how).logits[0]
    assert logits.std() >= 1
    return logits


def load(folder, dtype=torch.float32):
    return Transformer.from_pretrained(folder, dtype)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    """fp32 logits are transformers', from config.json in both spellings."""
    expected = logits_of(reference(case.split(",")[0], tmp_path, **CASES[case]))
    assert (load(tmp_path)(tiny.ids(T)) - expected).abs().max() <= 1e-4
    hub_spelling(tmp_path, **CASES[case])
    assert (load(tmp_path)(tiny.ids(T)) - expected).abs().max() <= 1e-4


def test_mistral_with_layer_types(tmp_path):
    """transformers takes it for Ministral, which reads them."""
    types = ["full_attention", "sliding_attention", "full_attention"]
    hf = reference("ministral", tmp_path, sliding_window=7, layer_types=types, head_dim=8)
    edit(tmp_path, model_type="mistral")
    assert (load(tmp_path)(tiny.ids(T)) - logits_of(hf)).abs().max() <= 1e-4


@pytest.mark.parametrize("family, window", [("llama", None), ("mistral", 7)])
def test_dropped_tokens(family, window, tmp_path):
    """With tokens missing, logits are those of transformers with a mask by original positions."""
    hf = reference(family, tmp_path, sliding_window=window)
    kept = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:T].sort().values
    distance = kept[:, None] - kept[None, :]
    seen = (distance >= 0) & (distance < (window or 64))
    mask = torch.zeros(1, 1, T, T).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = logits_of(hf, position_ids=kept[None], attention_mask=mask)
    assert (load(tmp_path)(tiny.ids(T), kept) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("gemma", True)])
def test_shards_equal_transformers(family, tied, tmp_path):
    """A checkpoint in many shards reads like one in a single file."""
    hf = reference(family, tmp_path, shard="10KB", tie_word_embeddings=tied, head_dim=8)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert (load(tmp_path)(tiny.ids(T)) - logits_of(hf)).abs().max() <= 1e-4
    missing = sorted(tmp_path.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing.name} does not exist"):
        load(tmp_path)


def test_window_defaults():
    """A config that is silent about the window has the one of transformers' class, null is none."""
    silent = dict(tiny.SIZES, model_type="qwen2", use_sliding_window=True, max_window_layers=1)
    assert [Config.from_dict(silent).window(layer) for layer in range(3)] == [None, 4096, 4096]
    null = dict(tiny.SIZES, model_type="mistral", sliding_window=None)
    assert Config.from_dict(null).window(0) is None


def test_bfloat16_stays_close(tmp_path):
    """bf16 weights and activations give the fp32 logits up to rounding; every tensor is bf16."""
    tiny.write(tmp_path)
    low, full = load(tmp_path, torch.bfloat16), load(tmp_path)
    assert all(t.dtype == torch.bfloat16 for t in low.state_dict().values())
    a, b = low(tiny.ids(T)).float().flatten(), full(tiny.ids(T)).flatten()
    assert torch.corrcoef(torch.stack((a, b)))[0, 1] > 0.99


def test_rope_is_a_complex_product():
    """Dimensions i and i + D / 2 turn by position * frequency, in float32 even in a bf16 model."""
    m = tiny.build(torch.bfloat16, max_position_embeddings=10**9)  # no table: there is no room
    x, positions = torch.ones(4, 3, 8).bfloat16(), torch.tensor([0, 1, 63, 50_000])
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    turned = torch.complex(*x.double().chunk(2, -1)) * turn
    expected = torch.cat((turned.real, turned.imag), -1)
    assert (m.layers[0].self_attn.rope(x, positions) - expected).abs().max() < 2e-2


def test_auto_dtype(tmp_path, monkeypatch):
    """dtype "auto" is bf16 on CUDA and where the CPU has bf16 products, else fp32; frozen."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        m = Transformer.from_pretrained(tiny.write(tmp_path))
        for p in m.parameters():
            assert p.dtype == (torch.bfloat16 if native else torch.float32)
            assert not p.requires_grad and not p.is_meta
        assert model.auto_dtype("cuda:1") == torch.bfloat16 and not m.training


def random_sinks(heads=4):
    return torch.randn(heads, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2


def build(kind):
    """A random model, with a window of 7 or with sinks."""
    fields = dict(model_type="mistral", sliding_window=7) if "window" in kind else {}
    m = tiny.build(**fields)
    for block in m.layers if "sinks" in kind else ():
        block.self_attn.sinks = random_sinks()
    return m


KINDS = ["full", "window", "sinks", "window and sinks"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [0, 3, 50])
def test_cache_equals_recomputation(kind, extra):
    """Decoding and adding several rows over ragged caches equals whole sequences with gaps."""
    m, cache = build(kind), KVCache(3, extra)
    prompts = [tiny.ids(30, seed) for seed in range(2)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    places = [torch.randperm(64, generator=g)[:30].sort().values for g in generators]
    whole, at = [m(ids, p) for ids, p in zip(prompts, places)], [0, 0]
    for step in [[11, 3], [1, 1], [4, 1], [1, 7], [1, 1], [9, 2], [1, 1]]:
        rows = [slice(a, a + n) for a, n in zip(at, step)]
        ids = torch.cat([p[r] for p, r in zip(prompts, rows)])
        positions = torch.cat([p[r] for p, r in zip(places, rows)])
        got = m(ids, positions, step, cache).split(step)
        assert all((g - w[r]).abs().max() < 1e-10 for g, w, r in zip(got, whole, rows))
        at = [r.stop for r in rows]
        assert cache.seqlens() == [at] * 3
        assert cache.next_positions().tolist() == [p[a - 1] + 1 for p, a in zip(places, at)]


def test_cache_bytes():
    """Room for the longest sequence's tokens and `extra`, twice a layer; it grows when exceeded."""
    m, row = tiny.build(torch.bfloat16, head_dim=16), 2 * 16 * 2 * 2  # k, v: 2 x 16 of 2 bytes
    cache = KVCache(3, extra=2)
    assert cache.nbytes() == 0
    m(tiny.ids(8), None, [5, 3], cache)
    assert cache.nbytes() == 3 * row * 2 * (5 + 2)
    m(tiny.ids(4), torch.tensor([5, 6, 3, 4]), [2, 2], cache)
    assert cache.nbytes() == 3 * row * 2 * 7
    m(tiny.ids(2), torch.tensor([7, 5]), [1, 1], cache)
    assert cache.seqlens() == [[8, 6]] * 3 and cache.nbytes() == 3 * row * 2 * 8
    assert [len(t) for t in cache[0].rows()] == [14] * 3


@pytest.mark.parametrize("step", [[1, 0], [1], [1, 1, 1]])
def test_cache_refuses_other_sequences(step):
    """Every sequence of the cache gets rows, and no other."""
    m, cache = tiny.build(), KVCache(3)
    m(tiny.ids(8), None, [5, 3], cache)
    with pytest.raises(ValueError, match="holds 2 sequences"):
        m(tiny.ids(sum(step)), torch.full((sum(step),), 5), step, cache)
    with pytest.raises(ValueError, match="give the positions"):
        m(tiny.ids(2), None, [1, 1], cache)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_weight(kind):
    """A batch decodes the same, whatever stands behind its sequences."""
    m, lens, cache = build(kind), [20, 1, 9], KVCache(3, extra=1)
    prompts = [tiny.ids(n + 1, n) for n in lens]
    m(torch.cat([p[:-1] for p in prompts]), None, lens, cache)
    for layer in cache.layers:
        for t, n in zip((*layer.k, *layer.v), 2 * lens):
            t[:, n:] = 1e4
    got = m(torch.stack([p[-1] for p in prompts]), torch.tensor(lens), [1, 1, 1], cache)
    assert all((a - m(p)[-1]).abs().max() < 1e-10 for a, p in zip(got, prompts))


def loop_weights(q, k, positions, k_positions, window, sinks):
    """Softmax weights (Hq, T, K), one dot product at a time."""
    Hq, Hkv, D = q.shape[1], k.shape[1], q.shape[2]
    weights = torch.zeros(Hq, len(q), len(k), dtype=torch.float64)
    for h in range(Hq):
        for i, p in enumerate(positions.tolist()):
            places = enumerate(k_positions.tolist())
            seen = [j for j, at in places if at <= p and (window is None or p - at < window)]
            dots = [float(q[i, h] @ k[j, h * Hkv // Hq]) for j in seen]
            scores = [math.exp(dot / D**0.5) for dot in dots]
            total = sum(scores) + (0 if sinks is None else math.exp(sinks[h]))
            weights[h, i, seen] = torch.tensor(scores, dtype=torch.float64) / total
    return weights


def random_qkv(T, K, N, seed, Hq=4, Hkv=2, D=6):
    """The last T of K tokens as queries, their positions drawn from N: as after dropping."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(T, Hq, D, generator=g, dtype=torch.float64)
    k, v = (torch.randn(K, Hkv, D, generator=g, dtype=torch.float64) for _ in range(2))
    k_positions = torch.randperm(N, generator=g)[:K].sort().values
    return q, k, v, k_positions[K - T :], k_positions


@pytest.mark.parametrize("sinks", [None, random_sinks()], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("T, K, N", [(9, 9, 9), (15, 15, 30), (1, 12, 30), (5, 12, 30), (1, 1, 9)])
def test_attention_equals_loop(T, K, N, window, sinks):
    """sdpa, in whole and by few rows, and attention_weights equal a loop, with tokens missing."""
    q, k, v, positions, k_positions = random_qkv(T, K, N, seed=T + K + N)
    weights = loop_weights(q, k, positions, k_positions, window, sinks)
    extras = Extras(window, sinks)
    got = model.attention_weights(q, k, positions, k_positions, extras)
    assert (got - weights).abs().max() < 1e-12
    assert torch.equal(model.visible(positions, k_positions, window), weights[0] > 0)
    expected = torch.einsum("htk,khd->thd", weights, v.repeat_interleave(2, dim=1))
    for rows in (1024, 4, 1):
        out = sdpa(q, k, v, positions, k_positions, extras, room=rows * 4 * K)
        assert (out - expected).abs().max() < 1e-12
    if T == 1:
        cache = LayerCache(extra=2)
        cache.append(k, v, k_positions, [K])
        out = attend_cache(q, cache, positions, extras)
        assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 7])
def test_sinks_in_bfloat16_and_their_gradient(window):
    """Sinks hold in a bf16 model, and gradients reach them as they do through the weights."""
    q, k, v, positions, k_positions = random_qkv(30, 30, 60, seed=1, D=64)
    extras = Extras(window, random_sinks().requires_grad_())
    weights = model.attention_weights(q, k, positions, k_positions, extras)
    exact = torch.einsum("htk,khd->thd", weights, v.repeat_interleave(2, dim=1))
    out = sdpa(q, k, v, positions, k_positions, extras)
    got, expected = (torch.autograd.grad(o.pow(2).sum(), extras.sinks)[0] for o in (out, exact))
    assert expected.abs().min() > 1e-3 and (got - expected).abs().max() < 1e-10
    low = [t.bfloat16() for t in (q, k, v)]
    rounded = sdpa(*low, positions, k_positions, Extras(window, extras.sinks.bfloat16()))
    assert (rounded - exact).abs().max() < 3e-2 and rounded.dtype == torch.bfloat16


PACKED = [([40, 1, 300], [40, 1, 300]), ([1, 1, 1], [40, 7, 300]), ([3, 1, 50], [40, 7, 300])]


@tiny.on_cuda
@pytest.mark.parametrize("extras", [Extras(), Extras(7), Extras(7, random_sinks(8))])
@pytest.mark.parametrize("seqlens, k_seqlens", PACKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_on_cuda(seqlens, k_seqlens, dtype, extras):
    """On CUDA, with FlashAttention where it is installed, attention is float64's on the CPU."""
    parts = [random_qkv(t, n, 2 * n, n, Hq=8, D=64) for t, n in zip(seqlens, k_seqlens)]
    q, k, v, positions, k_positions = (torch.cat(p) for p in zip(*parts))
    rounded = [t.to(dtype) for t in (q, k, v)]  # before both
    lens, exact = (seqlens, k_seqlens, extras), [t.double() for t in rounded]
    expected = attend(*exact, positions, k_positions, *lens)
    q, k, v, positions, k_positions = (t.cuda() for t in (*rounded, positions, k_positions))
    sinks = extras.sinks if extras.sinks is None else extras.sinks.cuda()
    got = attend(q, k, v, positions, k_positions, seqlens, k_seqlens, extras._replace(sinks=sinks))
    assert got.dtype == dtype and (got.cpu().double() - expected).abs().max() < 2e-2
    if max(seqlens) == 1:
        cache = LayerCache(extra=5)
        cache.append(k, v, k_positions, k_seqlens)
        got = attend_cache(q, cache, positions, extras._replace(sinks=sinks))
        assert (got.cpu().double() - expected).abs().max() < 2e-2


@tiny.on_cuda
def test_mask_memory_on_cuda():
    """Many rows under a mask take at most 2 GB: with grouped heads CUDA has no other kernel."""
    q, k, v, positions, k_positions = random_qkv(8192, 8200, 8200, 0, Hq=32, Hkv=8, D=128)
    q, k, v = (t.cuda().half() for t in (q, k, v))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sdpa(q, k, v, positions.cuda(), k_positions.cuda())
    assert torch.cuda.max_memory_allocated() - before < 2e9


def spoil_tensor(folder, name, shape):
    """Give a tensor of model.safetensors another shape, or take it away."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state.pop(name, None)
    if shape:
        state[name] = torch.ones(shape)
    safetensors.torch.save_file(state, folder / "model.safetensors")


def refusal(folder):
    """The one line, with the folder in it, that reading ends in."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


QWEN2, FULL = dict(model_type="qwen2"), "full_attention"
NO_LOW = {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}
CONFIGS = [
    (dict(model_type="mamba"), "model_type 'mamba'"),
    (dict(model_type=None), "model_type"),
    (dict(hidden_size=None), "hidden_size"),
    (dict(hidden_size="32"), "hidden_size"),
    (dict(num_key_value_heads=3), "num_key_value_heads"),
    (dict(num_hidden_layers=2), "model.layers.2."),
    (dict(attention_bias=True), "bias"),
    (dict(rope_scaling={"type": "ntk", "factor": 2.0}), "'ntk'"),
    (dict(rope_parameters={"rope_type": "other", "rope_theta": 1e4}), "'other'"),
    (dict(rope_scaling=[8.0]), "rope_scaling: a dict"),
    (dict(rope_scaling={"type": "linear"}), "factor"),
    (dict(rope_scaling=NO_LOW), "low_freq_factor"),
    (dict(rope_scaling={**LLAMA3, "original_max_position_embeddings": None}), "original_max"),
    (dict(rope_scaling={"full_attention": LINEAR}), "per layer type"),
    (dict(rope_theta="1e4"), "rope_theta"),
    (dict(attention_bias=1), "attention_bias"),
    (dict(hidden_act="relu"), "relu"),
    (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (dict(**QWEN2, layer_types=[FULL] * 2), "layer_types"),
    (dict(**QWEN2, layer_types=[FULL, "x", FULL]), "layer_types"),
    (dict(model_type="mistral", sliding_window=0), "sliding_window"),
]


@pytest.mark.parametrize("changes, named", CONFIGS)
def test_refused_config(changes, named, tmp_path):
    """What a config asks for and cannot be run is refused by name."""
    edit(tiny.write(tmp_path), **changes)
    assert named in refusal(tmp_path)


UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"
TENSORS = [(UP, None), (UP, (32, 48)), (BIAS, (32,)), ("lm_head.weight", None), ("model.x", (2,))]


@pytest.mark.parametrize("name, shape", TENSORS)
def test_refused_tensor(name, shape, tmp_path):
    """A tensor that is missing, misshaped or not in the config is named."""
    spoil_tensor(tiny.write(tmp_path), name, shape)
    assert name.removeprefix("model.") in refusal(tmp_path)


@pytest.mark.parametrize("content", [None, b"{", b"[]", "cut off"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_refused_file(name, content, tmp_path):
    """A file that does not exist, or is not what its name says, is named; a folder, too."""
    path = tiny.write(tmp_path / "ckpt") / name
    content = path.read_bytes()[:-100] if content == "cut off" else content
    path.unlink() if content is None else path.write_bytes(content)
    assert f"{name} {'does not exist' if content is None else 'is '}" in refusal(tmp_path / "ckpt")
    assert "nowhere/config.json does not exist" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("scale, tied", [(1.0, True), (-1.0, False)])
def test_tied_checkpoint_with_a_head(scale, tied, tmp_path):
    """The file's head counts, and stands for a missing embedding; old rotary buffers, and an
    index beside the file, do not count. All as in transformers."""
    from transformers import AutoModelForCausalLM

    reference("llama", tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * scale
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "y"}}')
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    m = load(tmp_path)
    assert (m(tiny.ids(T)) - expected).abs().max() <= 1e-4
    assert m.config.tie_word_embeddings == tied
    assert not any(p.requires_grad for p in m.parameters())
    del tensors["model.embed_tokens.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert (load(tmp_path)(tiny.ids(T)) - expected).abs().max() <= 1e-4


def test_prompt_beyond_positions():
    """A prompt of max_position_embeddings runs; one token more is refused, packed too, or none."""
    m = tiny.build()
    assert m(tiny.ids(64)).shape == (64, 61)
    for lens, error in (([65], "65 tokens .* 64 pos"), ([5, 65], "65 tokens"), ([0], "empty")):
        with pytest.raises(ValueError, match=error):
            m(tiny.ids(sum(lens)), seqlens=lens)
    assert tiny.build(rope_scaling=YARN)(tiny.ids(256)).shape == (256, 61)  # 8 times the old 32
    with pytest.raises(ValueError, match="dynamic RoPE beyond 64 tokens: one prompt at a time"):
        tiny.build(rope_scaling=DYNAMIC)(tiny.ids(80), seqlens=[70, 10])


@pytest.mark.network
def test_default_checkpoint():
    """The default checkpoint: transformers' argmax at 1,024 tokens of Python's manual."""
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM

    from download import checkpoint_folder
    from tokenizer import Tokenizer

    folder = checkpoint_folder()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(Tokenizer(folder).encode("\n".join(topics.values())[:9000])[:1024])
    with torch.inference_mode():
        same = load(folder)(ids).argmax(-1) == logits_of(theirs, ids).argmax(-1)
    assert len(ids) == 1024 and same.float().mean() >= 0.999
