"""What scripts share: flags from a dataclass, one line for a user's mistake, tables and figures."""

import argparse
import ctypes
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap

import parallel
import tensor_parallel
from checkpoint import read_json
from download import checkpoint_folder, find
from model import Transformer
from sdtp import PruneHead, load_heads, paper_schedule, write_atomic

ORIGIN = {}  # where figures come from, noted at a run's start: the working tree may move on


def run(main):
    """Call main; a user's mistake ends in one line and status 1."""
    keep_freed_memory()
    script = Path(sys.argv[0]).name
    try:
        parallel.wait()
        main()
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{script}: out of memory ({str(error).splitlines()[0]}): give shorter prompts")
    except (ValueError, OSError) as error:
        sys.exit(f"{script}: {' '.join(str(error).split())}")


def keep_freed_memory():
    """Let glibc keep freed pages: faulting them in again takes an eighth of a prefill's time."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, and what older ones allow
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def parse(config_class, doc, argv=None):
    """The dataclass, filled from the command line: one flag per field, with its type and default.

    Its attribute `given` holds the names of the flags that were on the command line.
    """
    parser = argparse.ArgumentParser(None, "%(prog)s [--FLAG VALUE ...]", doc, allow_abbrev=False)
    parser.argument_default = argparse.SUPPRESS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    helps = comments(config_class)
    for field in fields(config_class):
        note = helps.get(field.name, "") + f" (default: {field.default!r})" * (field.default != "")
        kind, switch = type(field.default), argparse.BooleanOptionalAction
        how = {"action": switch} if kind is bool else {"type": kind}
        parser.add_argument(f"--{field.name}", help=note.replace("%", "%%"), **how)
    config = config_class(**(given := vars(parser.parse_args(argv))))
    config.given = given.keys()
    if hasattr(config, "resume"):
        resume_flags(config)
    note_origin()
    print(" ".join(f"{name}={value!r}" for name, value in asdict(config).items()), flush=True)
    return config


def comments(config_class):
    """{field: the comment beside its default}, the flag's help."""
    source = "".join(map(inspect.getsource, config_class.__mro__[-2::-1]))  # a child's come last
    return dict(re.findall(r"^ +(\w+):.*?  # (.*)$", source, re.MULTILINE))


def resume_flags(config):
    """Refuse an --out_dir in use or, with --resume, fill in the flags of the run that is there.

    The attribute `saved` then holds its config.json.
    """
    out = Path(config.out_dir)
    if (out / "eval.json").is_file():
        raise ValueError(f"{out} holds a finished run: give another --out_dir")
    if not config.resume:
        for name in ("config.json", "heads", "log.jsonl", "checkpoint.safetensors"):
            if (out / name).exists():
                raise ValueError(f"{out} holds a run ({name}): --resume, or another --out_dir")
        return
    config.saved = saved = read_json(out / "config.json")
    for name in sorted(asdict(config).keys() - {"out_dir", "resume"}):
        if name not in saved:
            raise ValueError(f"{out}/config.json: begun by another version, without --{name}")
        if name in config.given and getattr(config, name) != saved[name]:
            raise ValueError(f"--resume: the run in {out} has --{name} {saved[name]!r}")
        setattr(config, name, saved[name])


def one_of(config, **choices):
    """ValueError for a flag whose value is not among its choices."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"--{name} {getattr(config, name)}: choose {', '.join(known)}")


def at_least(minimum, config, *names):
    """ValueError for a flag below its minimum, infinite or NaN."""
    for name in names:
        if not minimum <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name} {getattr(config, name)}: at least {minimum} is needed")


def numbers(flag, text, kind, fits):
    """The comma list of a flag, as `kind`; ValueError for what is not finite or does not fit."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) and fits(value) for value in values):
        what = "whole numbers above 0" if kind is int else "numbers above 0 and at most 1"
        raise ValueError(f"--{flag} {text}: {what} with commas between them are needed")
    return values


def load_model(config):
    """(Transformer, checkpoint folder) for a script's --ckpt, --dtype and --device."""
    dtype = device_and_dtype(config)
    folder = parallel.first(lambda: checkpoint_folder(config.ckpt))
    part = tensor_parallel if parallel.DIVIDED else None
    model = Transformer.from_pretrained(folder, dtype, config.device, part)
    config.dtype = str(model.dtype).removeprefix("torch.")
    describe(model, Path(config.ckpt).name, folder)
    return model, folder


def device_and_dtype(config):
    """The torch.dtype, or "auto", of a script's --dtype; resolves config.device."""
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count()
    one_of(config, device=["cpu", *["cuda"] * (gpus > 0), *(f"cuda:{i}" for i in range(gpus))])
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)  # of clocks, random state and peak memory
    dtypes = {"auto": "auto", "bfloat16": torch.bfloat16, "float32": torch.float32}
    one_of(config, dtype=dtypes)
    return dtypes[config.dtype]


def describe(model, ckpt, place):
    """Print what runs, and note it in ORIGIN."""
    dtype = str(model.dtype).removeprefix("torch.")
    ORIGIN.update(ckpt=ckpt, device=str(model.device), dtype=dtype)
    count = sum(p.numel() * (32 / 17 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    size = f"{count / 1e6:.1f}M parameters"  # MXFP4: 32 in 17 bytes
    size += f", one of {parallel.WORLD} parts" * parallel.DIVIDED
    print(f"{place}: {size} | {dtype} | {model.device}", flush=True)


def clock(model):
    """Seconds, after all queued work is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def given_heads(config, model, folder=""):
    """(heads, schedule, span) of a folder, by default --heads, else heads/CKPT, as load_heads()."""
    folder = find(folder or config.heads or Path("heads") / Path(config.ckpt).name)
    Head = PruneHead
    if read_json(folder / "heads.json").get("head") == "QuestionHead":
        from beyond import QuestionHead as Head  # here, as it imports this module
    return load_heads(folder, model, Head)[:3]


def given_stages(config, model, methods):
    """{suffix of names: (heads, schedule, span)}, at which the methods of a table run.

    methods: names, as "sdtp" or "dense+h2o". --heads FOLDER, or heads/CKPT where it exists, has the
    suffix "", each of --heads A,B ":NAME", the last part of its path, or all of it where alike.
    Without heads: the paper's stages with heads None, said so in a line; dense alone: no stages.
    ValueError for sdtp without heads, --heads that nothing uses, and a model too shallow.
    """
    bases = {name.split("+")[0] for name in methods}
    if bases == {"dense"}:
        if config.heads:
            raise ValueError(f"--heads {config.heads}: dense uses no heads")
        return {"": (None, {}, 1)}
    default = Path("heads") / Path(config.ckpt).name
    if not config.heads and not find(default).exists():
        schedule = paper_schedule(model.config.num_hidden_layers)
        if "sdtp" in bases:
            raise ValueError(f"no {default}: give --heads FOLDER or train some with train.py")
        print(f"no {default}: the paper's stages, at layers {list(schedule)}", flush=True)
        return {"": (None, schedule, 1)}
    if "," not in config.heads:
        return {"": given_heads(config, model)}
    folders = config.heads.split(",")
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = [folder.strip("/").replace("/", "-") for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"--heads {config.heads}: a folder is given twice")
    return {f":{name}": given_heads(config, model, f) for name, f in zip(names, folders)}


def note_origin():
    """Fill ORIGIN: commit (dirty where a tracked file differs), command, versions, machine."""

    def git(*words):
        place = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
        return subprocess.run([*place, *words], capture_output=True, text=True).stdout.strip()

    try:  # a repository that does not hold this file is another project's
        commit = git("ls-files", "cli.py") and git("rev-parse", "--short=12", "HEAD")
        if commit and git("status", "--porcelain", "-uno", "--", ".", ":!results"):  # of runs
            commit += "-dirty"
    except OSError:  # no git on this machine
        commit = ""
    torchrun = ["torchrun", "--nproc_per_node", str(parallel.WORLD)]
    starter = torchrun if parallel.WORLD > 1 else ["python"]
    starter += ["tensor_parallel.py"] * parallel.DIVIDED
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    ORIGIN.update(
        commit=commit or "unknown",
        command=shlex.join([*starter, Path(sys.argv[0]).name, *sys.argv[1:]]),
        versions=f"python {platform.python_version()}, torch {torch.__version__}",
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}",
    )


def write_rows(path, rows, **more):
    """Write a list of flat rows as JSON, each with its origin; does nothing without a path."""
    if path and not parallel.RANK:
        rows = [{**row, **more, **ORIGIN} for row in rows]
        write_atomic(path, (json.dumps(rows, indent=1) + "\n").encode())


class Results(dict):
    """{key: result}, each appended to a .jsonl file (none without a path): a killed run goes on.

    A torn last line, of a run that was killed, is cut off; ValueError names any other bad line.
    """

    def __init__(self, path=""):
        super().__init__()
        self.path = path
        if not path:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
        *lines, torn = Path(path).read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                self[result["key"]] = result
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}: not a result") from None
        if torn:
            os.truncate(path, sum(len(line) + 1 for line in lines))
        parallel.wait()  # now the file may grow

    def add(self, result):
        self[result["key"]] = result
        if self.path and not (parallel.DIVIDED and parallel.RANK):
            with open(self.path, "a") as file:
                file.write(json.dumps(result) + "\n")


def paired_interval(found, base, counts=None, difference=lambda d: d):
    """(value, low, high): difference() of two methods' means, 95 % interval by paired bootstrap.

    found, base: a number for each of the same prompts; counts: units (tokens) in each (default 1):
    means are sums over sums of counts. difference: np.expm1 for perplexities from nats.
    """

    def statistic(a, b, count, axis=-1):
        return difference((a.sum(axis) - b.sum(axis)) / count.sum(axis))

    samples = [np.array(x, dtype=float) for x in (found, base, counts or [1] * len(found))]
    value = low = high = float(statistic(*samples))
    if len(found) > 1 and list(found) != list(base):
        how = dict(paired=True, n_resamples=2000, method="percentile", rng=0)
        low, high = map(float, bootstrap(samples, statistic, **how).confidence_interval)
    return value, low, high


def print_table(rows, columns):
    """Print dicts as aligned rows, missing keys as empty cells; columns: {"ppl": "{ppl:.2f}"}."""
    table = [list(columns)]
    for row in rows:
        cells = []
        for form in columns.values():
            try:
                cells.append(form.format_map(row))
            except KeyError:
                cells.append("")
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *rest in table:
        rest = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        print(first.ljust(widths[0]), *rest, sep="  ", flush=True)


def draw_lines(lines, path, **axis_settings):
    """A figure of {label: [(x, y, low, high)]}, lines with bands; axis_settings: xlabel, ..."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    styles, colors = plt.cycler(linestyle=["-", "--"]), plt.get_cmap("tab10").colors
    axis.set_prop_cycle(styles * plt.cycler(color=colors))
    for label, points in lines.items():
        x, y, low, high = zip(*sorted(points))
        (line,) = axis.plot(x, y, marker="o", markersize=3, label=label)
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.1, linewidth=0)
    axis.set(**axis_settings)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_figure(figure, path)


def save_figure(figure, path):
    """Write a matplotlib figure as .png, in a folder that need not be there, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    write_atomic(path, buffer.getvalue())
    plt.close(figure)
