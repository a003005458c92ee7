"""What every script shares: flags from a dataclass, one line for a user's mistake, rows with their origin."""

import argparse
import ctypes
import inspect
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap

from download import checkpoint_folder
from model import Extras, Transformer, attention_backend, read_json
from sdtp import PruneHead, load_heads, write_atomic


def comments(config_class):
    """{field: the comment beside its default}: the flag's help is written once, where the field is."""
    lines = inspect.getsource(config_class).splitlines()
    return {
        line.split(":")[0].strip(): line.split("  # ")[1]
        for line in lines
        if ":" in line and "  # " in line
    }


def parse(config_class, doc, argv=None):
    """The dataclass, filled from the command line: one flag per field, its default and type from the field.

    Its attribute `given` holds the names of the flags on the command line, which a recipe (--paper) leaves alone.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    helps = comments(config_class)
    for field in fields(config_class):
        note = f"{helps.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=note)
        else:
            parser.add_argument(f"--{field.name}", type=type(field.default), help=note, metavar="")
    given = vars(parser.parse_args(argv))
    config = config_class(**given)
    config.given = given.keys()
    note_origin()
    print(" ".join(f"{name}={value!r}" for name, value in asdict(config).items()), flush=True)
    return config


def run(main):
    """Call main; a user's mistake ends in one line and exit status 1 (SDTP_TRACEBACK=1 shows where it arose)."""
    keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"{Path(sys.argv[0]).name}: out of memory on the device ({str(error).splitlines()[0]}): shorter prompts, or smaller batches"
        )
    except (ValueError, OSError) as error:
        if os.environ.get("SDTP_TRACEBACK"):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")


def run_logged(script, flags, log):
    """Run another script with these flags, its output appended to the file `log`; what went wrong in one line, or None."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *flags]
    with open(log, "ab") as file:
        before = file.tell()
        status = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    if status:
        last = Path(log).read_bytes()[before:].decode(errors="replace").strip().splitlines()[-1:]
        return f"failed with status {status}, see {log}: {' '.join(last)}"


def keep_freed_memory():
    """Let glibc keep the pages of freed tensors: it hands large ones back at once, and faulting them in again for the
    next operator costs a prefill of 1,024 tokens an eighth of its time (results/LOG.md, session 3)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    # M_MMAP_THRESHOLD (older ones: at most 32 MiB): what is smaller comes from the heap,
    mallopt(-3, 2**30) or mallopt(-3, 2**25)
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which shrinks when that much is free at its end


def clock(model):
    """Seconds, after all queued work is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def one_of(config, **choices):
    """ValueError for a flag whose value is not among its choices."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"--{name} {getattr(config, name)}: choose {', '.join(known)}")


def at_least(minimum, config, *names):
    """ValueError for a flag below its minimum."""
    for name in names:
        if getattr(config, name) < minimum:
            raise ValueError(f"--{name} {getattr(config, name)}: at least {minimum} is needed")


def numbers(flag, text, kind, fits):
    """The comma list of a flag, as `kind`; ValueError for one that is not, or that does not fit."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = [None]
    if not all(v is not None and fits(v) for v in values):
        what = "whole numbers above 0" if kind is int else "numbers above 0 and at most 1"
        raise ValueError(f"--{flag} {text}: {what} with commas between them are needed")
    return values


def load_model(config):
    """(Transformer, checkpoint folder) for a script's --ckpt, --dtype and --device; resolves config.device."""
    dtype = device_and_dtype(config)
    folder = checkpoint_folder(config.ckpt)
    model = Transformer.from_pretrained(folder, dtype, config.device)
    describe(model, Path(config.ckpt).name, folder)
    return model, folder


def device_and_dtype(config):
    """The torch.dtype, or "auto", of a script's --dtype; resolves config.device."""
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    devices = (
        ["cpu"]
        + ["cuda"] * torch.cuda.is_available()
        + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    )
    if config.device not in devices:
        raise ValueError(f"--device {config.device}: choose auto, {', '.join(devices)}")
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(
            config.device
        )  # clocks, random state and peak memory are the current device's
    dtypes = {"auto": "auto", "bfloat16": torch.bfloat16, "float32": torch.float32}
    if config.dtype not in dtypes:
        raise ValueError(f"--dtype {config.dtype}: choose {', '.join(dtypes)}")
    return dtypes[config.dtype]


def describe(model, ckpt, place):
    """Print what runs, and note it in ORIGIN."""
    dtype, window = model.norm.weight.dtype, model.config.sliding_window
    name, reason = attention_backend(model.device, dtype, Extras(window))
    ORIGIN.update(
        ckpt=ckpt,
        device=str(model.device),
        dtype=str(dtype).removeprefix("torch."),
        attention_backend=name,
    )
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{place}: {count / 1e6:.1f}M parameters | {dtype} | attention: {name} ({reason})",
        flush=True,
    )


ORIGIN = {}  # where this run's figures come from: filled at its start, as the working tree may move on during it


def note_origin():
    """Fill ORIGIN: commit (dirty where a tracked file differs, but for those in results/, where runs write), command, versions, machine."""

    def git(*words):
        place = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
        return subprocess.run([*place, *words], capture_output=True, text=True).stdout.strip()

    try:
        commit = git("ls-files", "cli.py") and git(
            "rev-parse", "--short=12", "HEAD"
        )  # not another repository's
        if commit and git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"):
            commit += "-dirty"
    except OSError:  # no git on this machine
        commit = ""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    ORIGIN.update(
        commit=commit or "unknown",
        command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        versions=f"python {platform.python_version()}, torch {version('torch')}",
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}",
    )


def write_rows(path, rows, **more):
    """Write a list of flat rows as JSON, each with its origin; does nothing without a path."""
    if path:
        write_atomic(
            path,
            (json.dumps([{**row, **more, **ORIGIN} for row in rows], indent=1) + "\n").encode(),
        )


def save_figure(figure, path):
    """Write a matplotlib figure as .png, in a folder that need not be there, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    write_atomic(path, buffer.getvalue())
    plt.close(figure)


def given_heads(config, model, folder=""):
    """(heads, schedule, span) of a folder (default: --heads, else heads/CKPT), of the class that heads.json names.

    A folder is looked for where the command was given, then beside this file.
    """
    folder = find(folder or config.heads or Path("heads") / Path(config.ckpt).name)
    return load_heads(
        folder, model, HEADS.get(read_json(folder / "heads.json").get("head"), PruneHead)
    )[:3]


HEADS = {"PruneHead": PruneHead}  # the name in heads.json -> its class


def find(path):
    """A path as it is given, or beside this file where there is none."""
    beside = Path(__file__).parent / path
    return beside if not Path(path).exists() and beside.exists() else Path(path)


# ---------------------------------------------------------------------------- tables, intervals, figures


class Results(dict):
    """{key: result}, each appended to a .jsonl file (none without a path) as it comes: a killed run goes on.

    A torn last line, of a run that was killed, is cut off. ValueError names another line that is no result.
    """

    def __init__(self, path=""):
        super().__init__()
        self.path = path
        if not path:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if not Path(path).exists():
            return
        *lines, torn = Path(path).read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                self[result["key"]] = result
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}: not a result") from None
        if torn:
            os.truncate(path, sum(len(line) + 1 for line in lines))

    def add(self, result):
        self[result["key"]] = result
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(result) + "\n")


def paired_interval(found, base, counts=None, difference=lambda d: d):
    """(value, low, high): difference() of two methods' means, with its 95 % paired bootstrap interval.

    found, base: a number per prompt, of the same prompts, drawn together; counts: of the units (tokens) in each,
    default 1: means are sums over sums of counts. difference: np.expm1 for perplexities from nats.
    """

    def statistic(a, b, count, axis=-1):
        return difference((a.sum(axis) - b.sum(axis)) / count.sum(axis))

    columns = [found, base, counts or [1] * len(found)]
    samples = [np.array(column, dtype=float) for column in columns]
    value = low = high = float(statistic(*samples))
    if len(found) > 1 and list(found) != list(base):
        drawn = bootstrap(
            samples, statistic, paired=True, n_resamples=2000, method="percentile", rng=0
        )
        low, high = map(float, drawn.confidence_interval)
    return value, low, high


def print_table(rows, columns):
    """Print rows, dicts, aligned; columns: {header: format of a cell}, as in {"ppl": "{ppl:.2f}"}.

    A cell whose key is missing is empty. The first column is aligned left.
    """
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
        print(
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(rest, widths[1:])),
            sep="  ",
            flush=True,
        )


def draw_lines(lines, path, **axis_settings):
    """A figure of lines with bands, {label: [(x, y, low, high), ...]}; axis_settings: title, xlabel, ylabel, ..."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    axis.set_prop_cycle(
        plt.cycler(linestyle=["-", "--"]) * plt.cycler(color=plt.get_cmap("tab10").colors)
    )
    for label, points in lines.items():
        x, y, low, high = zip(*sorted(points))
        (line,) = axis.plot(x, y, marker="o", markersize=3, label=label)
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.1, linewidth=0)
    axis.set(**axis_settings)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_figure(figure, path)
