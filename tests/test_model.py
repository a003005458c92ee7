"""model.py against transformers and against float64 loops."""

import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as model_py
from model import Config, KVCache, Transformer, attend, attention_weights, sdpa, visible

os.environ["HF_HUB_OFFLINE"] = "1"
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
STORIES = Path(__file__).parents[2] / "shared/data/stories260k"
T = 40  # prompt; the windows below are 7, so T > 2 * window

CASES = {
    "llama, every head its own keys": ("llama", dict(num_key_value_heads=4)),
    "llama, 2 heads a group": ("llama", {}),
    "llama, one group": ("llama", dict(num_key_value_heads=1)),
    "llama, head_dim apart": ("llama", dict(head_dim=12)),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, rope_theta and eps": ("llama", dict(rope_parameters={"rope_theta": 300.0}, rms_norm_eps=0.1)),
    "llama, linear rope": ("llama", dict(rope_parameters=LINEAR)),
    "llama, llama3 rope": ("llama", dict(rope_parameters={**LLAMA3, "rope_theta": 500.0}, head_dim=16)),
    "llama, llama3 rope, old length from max_position_embeddings": (
        "llama", dict(rope_parameters={k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}),
    ),
    "llama, sliding_window means nothing": ("llama", dict(sliding_window=7)),
    "mistral, window": ("mistral", dict(sliding_window=7)),
    "mistral, no window": ("mistral", dict(sliding_window=None)),
    "mistral, head_dim apart": ("mistral", dict(head_dim=12, sliding_window=7)),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "qwen2, window unused": ("qwen2", dict(sliding_window=7, max_window_layers=0)),
    "qwen2, window from layer 1": ("qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen2, window null": ("qwen2", dict(use_sliding_window=True, sliding_window=None, max_window_layers=1)),
    "gemma": ("gemma", dict(head_dim=16)),
    "gemma, one group, untied, biased": ("gemma", dict(head_dim=8, num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True)),
    "gemma, legacy gelu": ("gemma", dict(head_dim=8, hidden_act="gelu")),
}  # fmt: skip


def edit(folder, **changes):
    """Change fields of a config.json; None removes one."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None or k == "sliding_window"}))


def hub_spelling(folder, **fields):
    """rope_theta + rope_scaling, no layer_types, other fields as given: as on the hub, not as transformers 5 normalises them."""
    raw = json.loads((folder / "config.json").read_text())
    rope = dict(raw["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"type" if kind == "linear" else "rope_type": kind, **rope}
    edit(
        folder, **{**fields, "rope_parameters": None, "layer_types": None, "rope_theta": theta, "rope_scaling": scaling}
    )


def reference(family, folder, shard="1GB", **fields):
    """A random transformers model, written to `folder`; returns its float32 logits (T, vocab_size)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_theta": 10000.0, "rope_type": "default", **fields.pop("rope_parameters", {})}
    config = AutoConfig.for_model(family, **{**tiny.SIZES, "rope_parameters": rope, **fields})
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    tiny.randomise(hf, family == "gemma").save_pretrained(folder, max_shard_size=shard)
    with torch.no_grad():
        logits = hf(tiny.ids(T)[None]).logits[0]
    assert logits.std() >= 1
    return logits


def load(folder, dtype=torch.float32):
    return Transformer.from_pretrained(folder, dtype)


# ---------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    """fp32 logits are transformers', from config.json in both spellings."""
    family, fields = CASES[case]
    expected = reference(family, tmp_path, **fields)
    assert (load(tmp_path)(tiny.ids(T)) - expected).abs().max() <= 1e-4
    config = load(tmp_path).config
    hub_spelling(tmp_path, **fields)
    assert (load(tmp_path)(tiny.ids(T)) - expected).abs().max() <= 1e-4
    inverse = model_py.inverse_frequencies
    assert torch.equal(inverse(load(tmp_path).config), inverse(config))


@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("qwen2", False), ("gemma", True)])
def test_shards_equal_transformers(family, tied, tmp_path):
    """A checkpoint in many shards reads like one in a single file."""
    expected = reference(family, tmp_path, shard="10KB", tie_word_embeddings=tied, head_dim=8)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and not (tmp_path / "model.safetensors").exists()
    assert (load(tmp_path)(tiny.ids(T)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "family, fields, changes",
    [
        ("llama", {}, dict(rope_parameters={"rope_theta": 500.0, "rope_type": "default"})),
        ("llama", {}, dict(rope_parameters={"rope_theta": 10000.0, **LINEAR})),
        ("llama", {}, dict(rope_parameters={"rope_theta": 10000.0, **LLAMA3})),
        (
            "llama",
            dict(rope_parameters=LLAMA3),
            dict(rope_parameters={"rope_theta": 10000.0, **LLAMA3, "high_freq_factor": 8.0}),
        ),
        ("mistral", dict(sliding_window=7), dict(sliding_window=8)),
        ("mistral", dict(sliding_window=7), dict(sliding_window=None)),
        (
            "qwen2",
            dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
            dict(layer_types=["sliding_attention"] * 3),
        ),
    ],
)
def test_config_matters(family, fields, changes, tmp_path):
    """A changed rope_theta, scaling or window moves the logits: none of them is ignored."""
    expected = reference(family, tmp_path, **fields)
    edit(tmp_path, **changes)
    assert (load(tmp_path)(tiny.ids(T)) - expected).abs().max() > 1e-2


def test_qwen2_window_default():
    """A Qwen2 config that is silent about the window has the one of transformers' class."""
    from transformers import Qwen2Config

    raw = dict(tiny.SIZES, model_type="qwen2", use_sliding_window=True, max_window_layers=1)
    ours, theirs = Config.from_dict(raw), Qwen2Config(**raw)
    assert [ours.window(i) for i in range(3)] == [
        theirs.sliding_window if t.startswith("s") else None for t in theirs.layer_types
    ]


def test_bfloat16_stays_close(tmp_path):
    """bf16 weights and activations give the fp32 logits up to rounding, and every tensor is bf16."""
    tiny.write(tmp_path)
    low, full = load(tmp_path, torch.bfloat16), load(tmp_path)
    assert all(t.dtype == torch.bfloat16 for t in low.state_dict().values())
    a, b = low(tiny.ids(T)).float().flatten(), full(tiny.ids(T)).flatten()
    assert torch.corrcoef(torch.stack((a, b)))[0, 1] > 0.99


def test_auto_dtype(tmp_path, monkeypatch):
    """dtype "auto" is bf16 on CUDA and where the CPU has bf16 products, else fp32."""
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        m = Transformer.from_pretrained(tiny.write(tmp_path))
        assert m.norm.weight.dtype == (torch.bfloat16 if native else torch.float32)
        assert model_py.auto_dtype("cuda:1") == torch.bfloat16


@pytest.mark.parametrize("bf16, amx, backend", [(True, False, "blocks"), (True, True, "sdpa"), (False, False, "sdpa")])
def test_backend_by_cpu(bf16, amx, backend, monkeypatch):
    """attend_in_blocks() runs where a CPU multiplies bfloat16 without AMX, which makes SDPA the faster one."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert model_py.attention_backend("cpu", torch.bfloat16)[0] == backend


def test_frozen(tmp_path):
    """No parameter takes gradients, neither built nor read, and neither on the meta device."""
    for m in (tiny.build(), load(tiny.write(tmp_path))):
        assert not any(p.requires_grad or p.is_meta for p in [*m.parameters(), *m.buffers()])
        assert not m.training


@pytest.mark.parametrize("rows", [1, 23])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=1, head_dim=12),
        dict(model_type="qwen2"),
        dict(model_type="gemma", head_dim=16),
        dict(attention_bias=True, mlp_bias=True),
    ],
    ids=["grouped", "every head", "one group, head_dim apart", "qwen2", "gemma", "biases"],
)
def test_linear_flops(fields, rows):
    """linear_flops are the matrix products that PyTorch counts in one block but for attention's."""
    m = tiny.build(torch.float32, **fields)
    block, x = m.layers[1], torch.randn(rows, 32)
    nothing = lambda q, *rest: torch.zeros_like(q)
    with FlopCounterMode(display=False) as counter:
        block(x, torch.arange(rows), [rows], attend=nothing)
    assert m.config.linear_flops(rows) == counter.get_total_flops() > 0


# ---------------------------------------------------------------------------- packing and the cache

WINDOWS = {"full": dict(), "window": dict(model_type="mistral", sliding_window=7)}


@pytest.mark.parametrize("fields", WINDOWS.values(), ids=WINDOWS)
def test_packed_prompts(fields):
    """Prompts of different lengths in one call get each their own logits."""
    m, lens = tiny.build(**fields), [1, 17, 40, 2]
    prompts = [tiny.ids(n, seed) for seed, n in enumerate(lens)]
    packed = m(torch.cat(prompts), seqlens=lens).split(lens)
    assert all((a - m(p)).abs().max() < 1e-10 for a, p in zip(packed, prompts))


@pytest.mark.parametrize("fields", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("extra", [0, 3, 50])
def test_cache_equals_recomputation(fields, extra):
    """Decoding and extending by several rows over the cache of ragged sequences equals the whole sequences at once."""
    m, lens = tiny.build(**fields), [11, 3]
    prompts = [tiny.ids(40, seed) for seed in range(2)]
    whole, cache = [m(p) for p in prompts], KVCache(len(m.layers), extra)
    at, steps = [0, 0], [lens, [1, 1], [4, 1], [1, 7], [1, 1], [9, 2], [1, 1]]
    for step in steps:
        ids = torch.cat([p[a : a + n] for p, a, n in zip(prompts, at, step)])
        positions = torch.cat([torch.arange(a, a + n) for a, n in zip(at, step)])
        got = m(ids, positions, step, cache).split(step)
        assert all((g - w[a : a + n]).abs().max() < 1e-10 for g, w, a, n in zip(got, whole, at, step))
        at = [a + n for a, n in zip(at, step)]
        assert cache.seqlens() == [at] * len(m.layers)


def test_cache_bytes():
    """The cache takes the bytes of the alive tokens and `extra` ones, twice, per layer, and grows only beyond them."""
    m, row = (
        tiny.build(torch.bfloat16, num_key_value_heads=2, head_dim=16),
        2 * 16 * 2 * 2,
    )  # k and v of 2 x 16, 2 bytes
    cache = KVCache(3, extra=2)
    assert cache.nbytes() == 0
    m(tiny.ids(5), None, [5], cache)
    assert cache.seqlens() == [[5]] * 3 and cache.nbytes() == 3 * row * (5 + 2)
    m(tiny.ids(3), torch.tensor([5, 6, 7]), [3], cache)
    assert cache.seqlens() == [[8]] * 3 and cache.nbytes() == 3 * row * 8


def test_cache_bytes_of_a_batch():
    """Each sequence has the room of the longest."""
    m, row, cache = tiny.build(torch.bfloat16, num_key_value_heads=2, head_dim=16), 2 * 16 * 2 * 2, KVCache(3, extra=2)
    m(tiny.ids(8), None, [5, 3], cache)
    assert cache.seqlens() == [[5, 3]] * 3 and cache.nbytes() == 3 * row * 2 * (5 + 2)
    m(tiny.ids(4), torch.tensor([5, 6, 3, 4]), [2, 2], cache)
    assert cache.seqlens() == [[7, 5]] * 3 and cache.nbytes() == 3 * row * 2 * 7
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


@tiny.on_cuda
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("lens", [[40], [40, 7, 300]])
def test_attend_cache_on_cuda(lens, window):
    """Decoding on CUDA (FlashAttention where it is installed) gives what it gives in float64 on the CPU."""
    outs = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        parts = [random_qkv(n, n, 2 * n, seed=n, Hq=8, Hkv=2, D=64) for n in lens]
        q, k, v, positions, _ = (torch.cat(p).to(device) for p in zip(*parts))
        q, k, v = (t.bfloat16().to(dtype) for t in (q, k, v))  # rounded before both
        cache, last = model_py.LayerCache(extra=5), torch.tensor(lens, device=device).cumsum(0) - 1
        cache.append(k, v, positions, lens)
        outs.append(model_py.attend_cache(q[last], cache, positions[last], window).cpu().double())
    assert (outs[0] - outs[1]).abs().max() < 2e-2


def test_decoding_is_one_call_per_layer(monkeypatch):
    """A batch decodes by one attend_cache per layer; its padding, however large, has no weight."""
    m, lens, calls, step = tiny.build(), [20, 1, 9], [], model_py.attend_cache
    monkeypatch.setattr(model_py, "attend_cache", lambda q, *rest: calls.append(len(q)) or step(q, *rest))
    cache, prompts = KVCache(len(m.layers), extra=1), [tiny.ids(n + 1, n) for n in lens]
    m(torch.cat([p[:-1] for p in prompts]), None, lens, cache)
    for layer in cache.layers:
        for t, n in zip((*layer.k, *layer.v), 2 * lens):
            t[:, n:] = 1e4
    got = m(torch.stack([p[-1] for p in prompts]), torch.tensor(lens), [1, 1, 1], cache)
    assert calls == [3] * len(m.layers)
    assert all((a - m(p)[-1]).abs().max() < 1e-10 for a, p in zip(got, prompts))


# ---------------------------------------------------------------------------- attention


def loop_weights(q, k, positions, k_positions, window):
    """Softmax weights (Hq, T, K), one dot product at a time."""
    group, weights = q.shape[1] // k.shape[1], torch.zeros(q.shape[1], len(q), len(k), dtype=torch.float64)
    for h in range(q.shape[1]):
        for i, p in enumerate(positions.tolist()):
            seen = [
                j for j, p_j in enumerate(k_positions.tolist()) if p_j <= p and (window is None or p - p_j < window)
            ]
            scores = [math.exp(float(q[i, h] @ k[j, h // group]) / q.shape[-1] ** 0.5) for j in seen]
            for j, score in zip(seen, scores):
                weights[h, i, j] = score / sum(scores)
    return weights


def random_qkv(T, K, N, seed, Hq=4, Hkv=2, D=6):
    """The last T of K tokens as queries, their positions drawn from N: as after pruning."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, h, D, generator=g, dtype=torch.float64) for n, h in ((T, Hq), (K, Hkv), (K, Hkv)))
    k_positions = torch.randperm(N, generator=g)[:K].sort().values
    return q, k, v, k_positions[K - T :], k_positions


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("T, K, N", [(15, 15, 15), (15, 15, 30), (1, 12, 30), (5, 12, 12), (5, 12, 30), (1, 1, 30)])
def test_sdpa_equals_loop(T, K, N, window):
    """sdpa, in whole and in small blocks, and attention_weights equal a float64 loop, with missing positions (N > 2W)."""
    q, k, v, positions, k_positions = random_qkv(T, K, N, seed=T + K + N)
    weights = loop_weights(q, k, positions, k_positions, window)
    expected = torch.einsum("htk,khd->thd", weights, v.repeat_interleave(2, dim=1))
    for block in (1024, 4, 1):
        assert (sdpa(q, k, v, positions, k_positions, window, block) - expected).abs().max() < 1e-12
    assert (attention_weights(q, k, positions, k_positions, window) - weights).abs().max() < 1e-12
    assert torch.equal(visible(positions, k_positions, window), weights[0] > 0)


@pytest.mark.parametrize("D", [64, 80])
@pytest.mark.parametrize("T, K", [(300, 300), (100, 301), (2, 2), (256, 256)])
def test_blocks_as_accurate_as_sdpa(T, K, D):
    """Against float64 blocks() errs about as much as SDPA in bfloat16, for scores up to 30; all heads at once or one by one.

    Its rms error is 0.8 times SDPA's on an AMD EPYC and 1.3 times on an Intel Xeon, whose SDPA is another kernel.
    """
    q, k, v, positions, k_positions = random_qkv(T, K, 2 * K, seed=T + K, Hq=6, Hkv=2, D=D)
    q, k, v = ((t * s).bfloat16() for t, s in ((q, 2), (k, 2), (v, 1)))
    expected = sdpa(q.double(), k.double(), v.double(), positions, k_positions)
    limit = (sdpa(q, k, v, positions, k_positions) - expected).abs()
    before = torch.backends.mkldnn.matmul.fp32_precision
    for block, room in ((192, 2**21), (128, 1), (7, 2**21)):
        out = model_py.attend_in_blocks(q, k, v, block, room)
        error = (out - expected).abs()
        assert out.dtype == torch.bfloat16 and out.shape == q.shape
        assert error.max() <= 1.8 * limit.max() and error.pow(2).mean() <= 2 * limit.pow(2).mean()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_attend_takes_blocks(monkeypatch):
    """attend() runs blocks() per sequence in bfloat16, but not where a gradient is asked for."""
    monkeypatch.setattr(model_py, "fast_blocks", lambda: True)
    parts = [random_qkv(n, n, 2 * n, seed=n, D=64) for n in (70, 1, 200)]
    q, k, v, positions, k_positions = (torch.cat(p) for p in zip(*parts))
    seqlens, calls, blocks = [70, 1, 200], [], model_py.attend_in_blocks
    monkeypatch.setattr(model_py, "attend_in_blocks", lambda *args: calls.append(len(args[0])) or blocks(*args))
    expected = attend(q, k, v, positions, k_positions, seqlens, seqlens)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    got = attend(q, k, v, positions, k_positions, seqlens, seqlens)
    assert calls == [70, 200] and (got - expected).abs().max() < 2e-2
    attend(q.requires_grad_(), k, v, positions, k_positions, seqlens, seqlens).sum().backward()
    assert calls == [70, 200] and q.grad.abs().sum() > 0
    attend(q.detach(), k.requires_grad_(), v, positions, k_positions, seqlens, seqlens).pow(2).sum().backward()
    assert calls == [70, 200] and k.grad.abs().sum() > 0


def test_attend_cache_in_bfloat16(monkeypatch):
    """A batch in bfloat16 decodes each sequence's own rows, no further from float64 than SDPA's padded call."""
    lens, Hkv, D = [300, 7, 120], 3, 64
    parts = [random_qkv(n, n, 2 * n, seed=n, Hq=9, Hkv=Hkv, D=D) for n in lens]
    q, k, v, positions, _ = (torch.cat(p) for p in zip(*parts))
    last = torch.tensor(lens).cumsum(0) - 1
    outs = {}
    for native, dtype in ((True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float64)):
        monkeypatch.setattr(model_py, "fast_blocks", lambda native=native: native)
        cache = model_py.LayerCache(extra=4)
        cache.append(k.bfloat16().to(dtype), v.bfloat16().to(dtype), positions, lens)
        out = model_py.attend_cache(q[last].bfloat16().to(dtype), cache, positions[last])
        assert out.dtype == dtype and out.shape == (3, 9, D)
        outs[native, dtype] = out.double()
    exact = outs[False, torch.float64]
    ours, sdpa = ((outs[native, torch.bfloat16] - exact).pow(2).mean() for native in (True, False))
    assert 0 < ours <= 1.02 * sdpa < 1e-4


@tiny.on_cuda
@pytest.mark.parametrize(
    "seqlens, k_seqlens", [([40, 1, 300], [40, 1, 300]), ([1, 1, 1], [40, 7, 300]), ([3, 1, 50], [40, 7, 300])]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attn_equals_sdpa(seqlens, k_seqlens, dtype):
    """On CUDA attend() runs FlashAttention's varlen kernel, and gives what sdpa gives in float64, sequence by sequence."""
    pytest.importorskip("flash_attn")
    assert model_py.attention_backend("cuda", dtype)[0] == "flash_attn"
    parts = [random_qkv(t, n, 2 * n, seed=n, Hq=8, Hkv=2, D=64) for t, n in zip(seqlens, k_seqlens)]
    q, k, v, positions, k_positions = (torch.cat(p) for p in zip(*parts))
    q, k, v = (t.to(dtype) for t in (q, k, v))  # rounded before both
    expected = attend(*(t.double() for t in (q, k, v)), positions, k_positions, seqlens, k_seqlens)
    got = attend(*(t.cuda() for t in (q, k, v, positions, k_positions)), seqlens, k_seqlens)
    assert got.dtype == dtype and (got.cpu().double() - expected).abs().max() < 2e-2
    windowed = attend(*(t.cuda() for t in (q, k, v, positions, k_positions)), seqlens, k_seqlens, 7)
    expected = attend(*(t.double() for t in (q, k, v)), positions, k_positions, seqlens, k_seqlens, 7)
    assert (windowed.cpu().double() - expected).abs().max() < 2e-2


def test_backend_on_cpu():
    """attention_backend says sdpa where neither FlashAttention nor blocks() can run, whatever is installed."""
    assert model_py.attention_backend("cpu", torch.float32)[0] == "sdpa"
    assert model_py.attention_backend("cpu", torch.bfloat16, window=7)[0] == "sdpa"
    assert model_py.attention_backend("cuda", torch.float32)[0] == "sdpa"


# ---------------------------------------------------------------------------- what is refused


def tensors(change):
    """An edit of a folder: change(dict of its tensors)."""

    def apply(folder):
        state = safetensors.torch.load_file(folder / "model.safetensors")
        change(state)
        safetensors.torch.save_file(state, folder / "model.safetensors")

    return apply


def weight_map(**entries):
    """An edit of a folder: an index of shards, as given."""

    def apply(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))

    return apply


def config(**changes):
    return lambda folder: edit(folder, **changes)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


UP = "model.layers.1.mlp.up_proj.weight"
REFUSED = {
    "no config.json": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    "config.json is not JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors"),
    "truncated": (truncate, ValueError, "model.safetensors"),
    "header cut": (lambda f: (f / "model.safetensors").write_bytes(b"\x10"), ValueError, "model.safetensors"),
    "missing tensor": (tensors(lambda s: s.pop(UP)), ValueError, UP.removeprefix("model.")),
    "extra tensor": (tensors(lambda s: s.update({"model.layers.1.mlp.extra.weight": torch.ones(2)})), ValueError, "mlp.extra.weight"),
    "layer too many": (config(num_hidden_layers=2), ValueError, "model.layers.2."),
    "misshaped tensor": (tensors(lambda s: s.update({UP: s[UP].T.contiguous()})), ValueError, UP),
    "no output": (tensors(lambda s: s.pop("lm_head.weight")), ValueError, "lm_head.weight"),
    "bias not in the file": (config(attention_bias=True), ValueError, "bias"),
    "bias not in the config": (tensors(lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})), ValueError, "q_proj.bias"),
    "unknown model_type": (config(model_type="mamba"), ValueError, "mamba"),
    "no model_type": (config(model_type=None), ValueError, "model_type"),
    "no hidden_size": (config(hidden_size=None), ValueError, "hidden_size"),
    "heads not a multiple": (config(num_key_value_heads=3), ValueError, "num_key_value_heads"),
    "unknown scaling, hub": (config(rope_scaling={"type": "yarn", "factor": 2.0}), ValueError, "yarn"),
    "unknown scaling, transformers 5": (config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), ValueError, "longrope"),
    "linear without factor": (config(rope_scaling={"type": "linear"}), ValueError, "factor"),
    "llama3 without factor": (config(rope_scaling={k: v for k, v in LLAMA3.items() if k != "factor"}), ValueError, "factor"),
    "llama3 without low_freq_factor": (config(rope_scaling={k: v for k, v in LLAMA3.items() if k[:3] != "low"}), ValueError, "low_freq_factor"),
    "llama3 without high_freq_factor": (config(rope_scaling={k: v for k, v in LLAMA3.items() if k[:4] != "high"}), ValueError, "high_freq_factor"),
    "scaling with more than it knows": (config(rope_scaling={**LINEAR, "mscale": 1.0}), ValueError, "mscale"),
    "unknown activation": (config(hidden_act="relu"), ValueError, "relu"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), ValueError, "quantization_config"),
    "layer_types": (config(layer_types=["full_attention"] * 3), ValueError, "layer_types"),
    "window 0": (config(model_type="mistral", sliding_window=0), ValueError, "sliding_window"),
    "index leaves the folder": (weight_map(x="../model.safetensors"), ValueError, "../model.safetensors"),
    "index leaves the folder, absolute": (weight_map(x="/etc/passwd"), ValueError, "/etc/passwd"),
    "index goes down": (weight_map(x="sub/model.safetensors"), ValueError, "sub/model.safetensors"),
    "index names the parent": (weight_map(x=".."), (ValueError, FileNotFoundError), ".."),
    "index names a missing shard": (weight_map(x="model-00002-of-00002.safetensors"), FileNotFoundError, "model-00002-of-00002.safetensors"),
    "index is empty": (weight_map(), ValueError, "weight_map"),
    "index without a map": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'), ValueError, "weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    """What cannot be run or read is refused in one line that names the file, field or tensor."""
    spoil, error, named = REFUSED[case]
    folder = tiny.write(tmp_path / "ckpt")
    spoil(folder)
    with pytest.raises(error) as caught:
        load(folder)
    assert named in str(caught.value) and "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_refused_folder(tmp_path):
    """A folder that does not exist is named."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_refused_qwen2_layer_types():
    """layer_types of the wrong length or kind are refused by name."""
    for types in (["full_attention"], ["full_attention", "chunked_attention", "full_attention"]):
        with pytest.raises(ValueError, match="layer_types"):
            tiny.build(model_type="qwen2", layer_types=types)


def test_repeated_output_is_ignored(tmp_path):
    """A tied checkpoint that repeats its embedding as lm_head, and old rotary buffers, are read all the same."""
    tiny.write(tmp_path, tie_word_embeddings=True)
    expected = load(tmp_path)(tiny.ids(T))
    extra = {"lm_head.weight": torch.ones(61, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors(lambda state: state.update(extra))(tmp_path)
    assert torch.equal(load(tmp_path)(tiny.ids(T)), expected)


def test_prompt_beyond_positions():
    """A prompt of exactly max_position_embeddings runs; one token more is refused, in a packed call too."""
    m = tiny.build()
    assert m(tiny.ids(64)).shape == (64, 61)
    with pytest.raises(ValueError, match="65 tokens .* 64 positions"):
        m(tiny.ids(65))
    with pytest.raises(ValueError, match="65 tokens"):
        m(tiny.ids(70), seqlens=[5, 65])


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the real 260K-parameter Llama in ../shared/data")
def test_stories260k():
    """Real weights with a sentencepiece tokenizer tell the known story."""
    from sdtp import generate
    from tokenizer import Tokenizer

    tokenizer, stories = Tokenizer(STORIES), Transformer.from_pretrained(STORIES, torch.float32)
    ids = tokenizer.encode("Once upon a time")
    story = tokenizer.decode(ids + generate(stories, torch.tensor(ids), 40)[0])
    assert story.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )


@pytest.mark.network
def test_default_checkpoint():
    """The real default checkpoint: argmax of transformers at 1,024 real tokens, and it knows the capital of France."""
    import transformers

    import data
    from download import checkpoint_folder
    from sdtp import generate
    from tokenizer import Tokenizer

    folder = checkpoint_folder()
    tokenizer, ours = Tokenizer(folder), Transformer.from_pretrained(folder, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = data.text_windows("\n".join(data.topics.values()), tokenizer, 1023, 1)[0]
    ids = torch.tensor(text.prompt + text.response)
    with torch.inference_mode():
        same = ours(ids).argmax(-1) == theirs(ids[None]).logits[0].argmax(-1)
    assert same.float().mean() >= 0.999
    answer = generate(ours, torch.tensor(tokenizer.encode("The capital of France is")), 3)[0]
    assert tokenizer.decode(answer).startswith(" Paris.")
