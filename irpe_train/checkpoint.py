# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: read without executing anything in them, written so that a kill leaves the last good one."""

import argparse
import contextlib
import json
import os
import pathlib
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from irpe_train.download import local_file
from irpe_train.errors import BadCheckpoint, RunError, first_line, some
from irpe_train.sealed_archive import USE_ANOTHER, check_archive, save_sealed

# The published checkpoints hold a Namespace, with a path in it if submitit ran. Python 3.13 moved path classes.
# All become pure paths, which cannot touch a disk and exist on every system.
SAFE_GLOBALS = [argparse.Namespace] + [
    (pure, f"{module}.{name}")
    for module in ("pathlib", "pathlib._local")
    for pure in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    for name in (pure.__name__, pure.__name__.removeprefix("Pure"))
]
ORDINARY = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
}
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|\b_orig_mod\.")
TIMM_KEYS = {"model": "state_dict", "model_ema": "state_dict_ema"}  # timm's names; Lightning uses the first too


class Checkpoint(NamedTuple):
    """A checkpoint that was read: its path or address, for messages, and its contents."""

    source: str
    contents: dict

    @classmethod
    def read(cls, source: str | Path) -> "Checkpoint":
        return cls(str(source), read_checkpoint(source))

    def weights(self, key: str = "model") -> dict[str, torch.Tensor]:
        """Its state dict; see ``model_weights``."""
        return model_weights(self.contents, source=self.source, key=key)


def read_checkpoint(path: str | Path) -> dict:
    """The contents of a checkpoint, on the CPU; only tensors, numbers, text, paths and ``argparse.Namespace``.

    Args: path: a file, or an ``https://`` address, as in the published evaluation commands (kept in torch's cache).
    Raises: BadCheckpoint: missing, empty, truncated, failing its checksum, claiming more than the file holds, or
        containing anything that could run, or tensors that are not plain numbers.
    """
    path = local_file(path)
    if not path.is_file():
        kind = "a folder; give the file in it" if path.is_dir() else "not a plain file"
        raise BadCheckpoint(f"checkpoint {path}: " + (kind if path.exists() else "no such file"))
    size = path.stat().st_size
    if size == 0:
        raise BadCheckpoint(f"checkpoint {path}: the file is empty; use an earlier one")
    check_archive(path, size)
    try:
        if path.suffix.lower() == ".safetensors":
            contents = _read_safetensors(path)
        else:
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                contents = torch.load(path, map_location="cpu", weights_only=True)
    except (KeyError, pickle.UnpicklingError) as error:  # a KeyError: a text file
        raise BadCheckpoint(f"checkpoint {path}: {_why_refused(error, path)}") from error
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise BadCheckpoint(f"checkpoint {path}: damaged or truncated ({why}){USE_ANOTHER}") from error
    if not isinstance(contents, dict):
        raise BadCheckpoint(f"checkpoint {path}: expected a dict with a 'model', got {type(contents).__name__}")
    _refuse_odd_contents(contents, path, size)
    flags = contents.get("args")
    if isinstance(flags, dict) and all(isinstance(name, str) for name in flags):  # as other programs store them
        contents["args"] = argparse.Namespace(**flags)
    return contents


def _read_safetensors(path: Path) -> dict:
    """The weights, and what our export wrote beside them: classes or categories, and flags."""
    from safetensors.torch import load

    data, metadata = path.read_bytes(), {}  # not by its name, which need not be UTF-8
    weights, header = load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for name, text in header.get("__metadata__", {}).items():
        try:
            metadata[name] = json.loads(text)
        except ValueError:  # keep the text
            metadata[name] = text
    known = {name: metadata.pop(name) for name in ("classes", "categories") if name in metadata}
    if isinstance(known.get("categories"), dict):
        known["categories"] = {int(number): name for number, name in known["categories"].items()}
    return {"model": weights} | (known | {"args": metadata} if known else {})


def _refuse_odd_contents(contents: dict, path: Path, size: int) -> None:
    """Raises BadCheckpoint unless every tensor is dense, of an ordinary dtype and stored whole, and the file has room
    for all values: a few lists that contain each other can expand to any number of values, or without end.
    """
    waiting, count = [("", contents)], 0
    while waiting:
        name, value = waiting.pop()
        count += 1
        if count > size:
            raise BadCheckpoint(f"checkpoint {path}: refused: it names more values than the {size:,} bytes of the file")
        if isinstance(value, torch.Tensor):
            dense = not value.is_nested and value.layout == torch.strided and value.device.type == "cpu"
            if not dense or value.dtype not in ORDINARY:
                layout = "nested" if value.is_nested else value.layout
                kind = f"{layout}, {value.dtype}, on {value.device}".replace("torch.", "")
                wanted = "a dense tensor of fp64, fp32, fp16, bf16, integers or bool"
                raise BadCheckpoint(f"checkpoint {path}: {name} is {kind}; expected {wanted}")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise BadCheckpoint(
                    f"checkpoint {path}: {name} has {value.numel():,} elements, and the file stores "
                    f"{value.untyped_storage().nbytes():,} bytes of it; save a contiguous copy"
                )
        elif isinstance(value, (dict, list, tuple, argparse.Namespace)):
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}".lstrip(".")[-100:], item) for key, item in items]


def _why_refused(error: BaseException, path: Path) -> str:
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        read = "Nothing was run. Only tensors, numbers, text and argparse.Namespace are read: save a state_dict alone."
        return f"refused: it holds a reference to {found[1]}, which could run code. {read}"
    if path.suffix.lower() == ".onnx":
        return "an exported ONNX model, which only predict runs; give the checkpoint it was made from"
    with open(path, "rb") as file:
        return f"damaged, or not a file that torch.save wrote (it begins with {file.read(20)!r}); nothing was run"


def model_weights(checkpoint: dict, *, source: str | Path, key: str = "model") -> dict[str, torch.Tensor]:
    """The state dict in ``checkpoint[key]``, without the prefixes of DistributedDataParallel (``module.``) and
    ``torch.compile`` (``_orig_mod.``, also of single blocks). Also read: timm's names, and unless ``model_ema`` is
    wanted, a bare state dict.

    Raises: BadCheckpoint: there is none, or a weight (named) is NaN or infinite, or two have the same name.
    """
    weights = checkpoint.get(key if key in checkpoint else TIMM_KEYS.get(key))
    if weights is None:
        if key == "model_ema" or not _is_state_dict(checkpoint):
            raise BadCheckpoint(f"checkpoint {source}: no {key!r} in it; it has: {some(checkpoint)}")
        weights = checkpoint
    if not _is_state_dict(weights):
        raise BadCheckpoint(f"checkpoint {source}: {key!r} is not a dict of tensors by name")
    stored, weights = weights, {WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}
    if len(weights) < len(stored):
        twice = next(name for name in stored if WRAPPERS.sub("", name) != name)
        raise BadCheckpoint(f"checkpoint {source}: {key!r} holds a weight twice, as {twice} and without the prefix")
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise BadCheckpoint(f"checkpoint {source}: {name} has values that are NaN or infinite; use an earlier one")
    return weights


def _is_state_dict(value) -> bool:
    named = value.items() if isinstance(value, dict) else ()
    return len(named) > 0 and all(isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in named)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint file; see ``read_checkpoint`` and ``model_weights``."""
    return Checkpoint.read(path).weights()


def load_matching(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    *,
    source: str | Path,
    may_start_fresh: Callable[[str], bool] = lambda key: False,
) -> dict[str, str]:
    """Load ``weights`` into ``model``, and account for every key of both.

    Args:
        weights: a state dict; unchanged.
        source: where it is from, for messages.
        may_start_fresh: whether a key may be missing, unexpected or of another shape; the model keeps its own value.
    Returns: a note on each key that was not copied, such as ``{"head.bias": "starts fresh: (4,) there, (9,) here"}``.
    Raises: BadCheckpoint: any other key does not fit (named); nothing is loaded.
    """
    own = model.state_dict()
    # Batch norm counters: published backbones have frozen batch norm and no counters; other checkpoints may have them.
    weights = {key: value for key, value in weights.items() if key in own or not key.endswith("num_batches_tracked")}
    odd = {key: ("missing", key, "starts fresh: not in the checkpoint") for key in own if key not in weights}
    for key, value in weights.items():
        if key not in own:
            odd[key] = "unexpected", key, "is not used"
        elif own[key].is_floating_point() and not value.is_floating_point():  # in unknown units
            raise BadCheckpoint(f"checkpoint {source}: {key} holds {value.dtype}; quantised weights are not read")
        elif value.shape != own[key].shape:
            there, here = tuple(value.shape), tuple(own[key].shape)
            odd[key] = "other shapes", f"{key} {there}, not {here}", f"starts fresh: {there} there, {here} here"
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "other shapes": []}
    for key, (kind, text, _) in odd.items():
        if not may_start_fresh(key):
            problems[kind].append(text)
    if any(problems.values()):
        detail = "; ".join(f"{kind}: {some(texts)}" for kind, texts in problems.items() if texts)
        size = ", --input-size too" if any("pos_embed" in text for text in problems["other shapes"]) else ""
        detail += f". Build the model with the flags it was trained with{size}: a run has them in config.yaml."
        pairs = ((name, key) for name in weights for key in own if name.endswith(f".{key}"))
        if not own.keys() & weights.keys() and (pair := next(pairs, None)):
            detail += f" Its names begin with {pair[0].removesuffix(pair[1])!r}: cut that off (docs/reproduce.md)."
        raise BadCheckpoint(f"checkpoint {source} does not fit this {type(model).__name__}; {detail}")
    model.load_state_dict(own | {key: value for key, value in weights.items() if key not in odd})
    return {key: note for key, (_, _, note) in odd.items()}


def write_checkpoint(contents: dict, path: Path, *, previous: Path | None = None, also: tuple[Path, ...] = ()) -> None:
    """Write ``contents`` to ``path``; a kill or a full disk at any moment leaves the last good file.

    Args:
        previous: where the replaced file goes.
        also: further names for the same contents (hard links, if the file system has them).
    Raises: RunError: the disk is full or the folder cannot be written; the old file is kept.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # whatever it is: never write through a symlink
        with open(temporary, "wb") as file:
            save_sealed(contents, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        for copy in also:
            link(path, copy)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = previous if previous is not None and not path.exists() else path
        reason = error if isinstance(error, OSError) else error.__context__ or error  # PyTorch's says "enforce fail"
        last = f"; the last good checkpoint is kept: {kept}" if kept.exists() else ""
        remedy = f"Free some space or choose another folder{last}"
        raise RunError(f"cannot write {path}: {first_line(reason)}. {remedy}") from error


def link(path: Path, copy: Path) -> None:
    """Give a file a second name: a hard link, or a copy if the file system has none."""
    temporary = copy.with_name(f".{copy.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)  # replace does nothing if both names were already one file


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system allows it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
