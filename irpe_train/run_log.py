# SPDX-License-Identifier: Apache-2.0
"""What a run writes besides checkpoints: log.txt, TensorBoard, its flags, versions and machine."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch

from irpe_train.config import as_yaml
from irpe_train.distributed import is_main, world_size
from irpe_train.errors import RunError, import_optional, in_one_line
from irpe_train.logger import logger
from irpe_train.state import plain
from irpe_train.text_files import naming, plain_file, read_text, write_text

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pycocotools", "scipy", "rpe_ops_cuda")


class RunLog:
    """``OUTPUT_DIR/log.txt``: one JSON object per epoch, each epoch once; and the same in TensorBoard, if installed.

    Create it after ``Checkpoints.open``. Only the main rank writes; nothing is written without an ``output_dir``.

    Args:
        epoch: where this run continues; resumed: whether the folder's log is its own. Lines from there on then belong
            to an interrupted attempt and are dropped. A log of another run is moved to ``log.1.txt``.
        wandb: project of Weights & Biases that gets the same figures; a resumed run continues there too.
    Raises: ImportError: ``wandb`` is requested but not installed; RunError: it refuses, or there is no ``output_dir``.
    """

    def __init__(self, output_dir: str | Path, *, epoch: int, resumed: bool, tensorboard: bool = True, wandb: str = ""):
        self.path = Path(output_dir) / "log.txt" if str(output_dir) and is_main() else None
        self._board = self._wandb = None
        if wandb and not str(output_dir):
            raise RunError(f"--wandb {wandb} keeps the run's identity in --output_dir: give one")
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(epoch, resumed)
        if tensorboard:
            try:
                self._board = _summary_writer(self.path.parent / "tensorboard", epoch)
            except (OSError, ValueError) as error:  # a ValueError: the folder's name is not UTF-8
                self._drop_tensorboard(error)
        if wandb:
            self._wandb = _wandb_run(wandb, self.path.parent, resumed)

    def write(self, stats: dict) -> None:
        """Append one epoch; ``stats`` has ``epoch`` and, as published, ``train_*``, ``test_*``, ``n_parameters``."""
        if self.path is None:
            return
        with naming(self.path), open(plain_file(self.path), "a") as file:
            file.write(json.dumps(stats) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._board is not None:
            try:
                for name, value in _scalars(stats):
                    self._board.add_scalar(name, value, stats["epoch"])
                self._board.flush()
            except OSError as error:
                self._drop_tensorboard(error)
        if self._wandb is not None:
            self._wandb.log(dict(_scalars(stats)), step=stats["epoch"])

    def _drop_tensorboard(self, error: Exception) -> None:
        self._board = None
        logger.warning(f"TensorBoard: cannot write to {self.path.parent / 'tensorboard'} ({error}); continuing without")

    def _make_room(self, epoch: int, resumed: bool) -> None:
        if not self.path.exists():
            return
        if not resumed:
            keep_aside(self.path)
            return
        kept = [line for line in read_text(self.path).splitlines() if _epoch_of(line) < epoch]
        write_text(self.path, "".join(line + "\n" for line in kept))


def keep_aside(path: Path) -> None:
    """Rename a file that was there before this run's own: ``log.txt`` to ``log.1.txt``."""
    number = 1
    while os.path.lexists(old := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    os.replace(path, old)
    logger.info(f"{path} was not from this run: it is now {old.name}")


def _epoch_of(line: str) -> float:
    """The epoch of a log line; infinity for a line that a kill cut short."""
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


def _scalars(stats: dict) -> Iterator[tuple[str, float]]:
    """The figures of an epoch to plot; of COCO's twelve only the first, AP."""
    for name, value in stats.items():
        if isinstance(value, (int, float)) and name != "epoch":
            yield name, value
        elif name.startswith("test_coco_eval") and value:
            yield f"{name}_AP", value[0]


def _wandb_run(project: str, folder: Path, resumed: bool):
    wandb = import_optional("wandb", f"--wandb {project} needs Weights & Biases")
    file = folder / "wandb_id.txt"  # a resumed run continues the same one there
    if not (resumed and file.exists()):
        write_text(file, uuid.uuid4().hex[:8])
    try:
        return wandb.init(project=project, dir=str(folder), name=folder.name, id=read_text(file), resume="allow")
    except Exception as error:  # no login, no network, another project: of many kinds
        raise RunError(f"--wandb {project}: {in_one_line(error)}") from error


def _summary_writer(folder: Path, epoch: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    show = threading.excepthook

    def show_others(failed):  # its thread hands its error on to us, and would also print it
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            show(failed)

    threading.excepthook = show_others
    return SummaryWriter(str(folder), purge_step=epoch)


def record_start(parser: argparse.ArgumentParser, args: argparse.Namespace, stats: dict[str, float]) -> None:
    """Write the resolved flags to ``config.yaml``, the model in numbers to ``model.json``, and a line on versions,
    machine and git state to ``starts.jsonl``.

    ``config.yaml`` is a ``--config`` file: it repeats the run. One from before the folder's first run is renamed.
    The main rank writes, if there is an output folder.
    """
    if not is_main() or not args.output_dir:
        return
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    flags, model, starts = (folder / name for name in ("config.yaml", "model.json", "starts.jsonl"))
    if not starts.exists():
        for path in filter(Path.is_file, (flags, model)):
            keep_aside(path)
    write_text(flags, as_yaml(parser, args))
    write_text(model, json.dumps(stats) + "\n")
    with naming(starts), open(plain_file(starts), "a") as file:
        file.write(json.dumps(surroundings()) + "\n")


def surroundings() -> dict:
    """Versions, machine, command and git state, as plain values."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": sys.argv,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("IRPE_")},  # plugins, ...
        "world_size": world_size(),
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "git": git_state(),
    }


def processor_name() -> str:
    """The CPU's model, with its numbers: a virtual machine may hide the rest of its name."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", cpuinfo, re.MULTILINE))
    name = fields.get("model name", platform.processor() or platform.machine())
    return f"{name} family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else name


def git_state() -> str:
    """The checked-out commit of this source tree, and whether files differ from it; ``unknown`` without git."""
    ask = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with local changes"]
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(ask, cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def banner(title: str, rows: dict) -> None:
    """Print a small table, as at the start of a run; a value may have several lines."""
    width = max((len(name) for name in rows), default=0)
    values = {name: str(value).replace("\n", "\n" + " " * (width + 4)) for name, value in rows.items()}
    logger.info("\n".join([title] + [f"  {name:<{width}}  {value}" for name, value in values.items()]))


def changed_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, ignore: tuple[str, ...] = (), stored: dict | None = None
) -> list[str]:
    """``name=value (default: other)`` for each flag that differs from its default, or from ``stored``
    of a checkpoint (then ``stored: value``).
    """
    changed = []
    for action in parser._actions:
        here = getattr(args, action.dest, action.default)
        other = action.default if stored is None else stored.get(action.dest, here)
        numbers = isinstance(here, (int, float)) and isinstance(other, (int, float))
        same = numbers and here == other or str(plain(here)) == str(plain(other))  # 5 is 5.0; stored may be tensors
        if action.dest not in ignore and not same:
            was = " ".join(str(other).split())[:80] or "none"
            changed.append(f"{action.dest}={here} ({'default' if stored is None else 'stored'}: {was})")
    return list(dict.fromkeys(changed))
