# SPDX-License-Identifier: Apache-2.0
"""The flags shared by both trees, with the published defaults of each."""

import argparse
from collections.abc import Callable
from pathlib import Path

LARGEST_SEED = 2**63 - 1  # PyTorch's
LARGEST_COUNT = 2**31 - 1  # C's
SUFFIX = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors"}  # of each export format


def add_runtime_arguments(parser: argparse.ArgumentParser, *, seed: int, num_workers: int, amp: str) -> None:
    """Add the group "run" to ``parser``: where and how to run, resume and log; nothing about what is trained.

    Args: seed, num_workers, amp: the tree's published defaults.
    """
    parser.add_argument("--config", metavar="FILE.yaml", help="flags, one 'name: value' per line; typed flags win")
    parser.add_argument("--print-config", action="store_true", help="print every flag as YAML, and exit")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="", metavar="DIR", help="for checkpoints and logs; empty: nothing is written")
    add("--device", default="cuda", help="cuda (the CPU if there is no GPU), cuda:N or cpu")
    add("--seed", default=seed, type=int, help="random seed")
    add("--deterministic", action="store_true", help="bit-reproducible results, somewhat slower")
    add("--resume", default="", metavar="auto|PATH|URL", help="checkpoint to resume; auto: the newest, or a new run")
    add("--start_epoch", default=0, type=nonnegative_int, metavar="N", help="first epoch of a new run")
    add("--eval", action="store_true", help="evaluate only")
    add("--expect", nargs="?", const="auto", metavar="NAME", help="with --eval: compare with the published row NAME")
    add("--num_workers", default=num_workers, type=number_of_workers, help="data loading workers per process; 0: none")
    add("--amp", default=amp, choices=("bf16", "fp16", "none"), help="number format of the model (mixed precision)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--accumulate", default=1, type=positive_int, metavar="K", help="gradient accumulation: batches per update")
    add("--save-interval", type=save_interval, metavar="N|Nm", help="also save every N steps or N minutes (10m)")
    add("--max-bad", default=0.001, type=fraction, help="fraction of unreadable training images that stops the run")
    add("--tensorboard", default=True, action=argparse.BooleanOptionalAction, help="TensorBoard files, if installed")
    add("--wandb", default="", metavar="PROJECT", help="also log to this project of Weights & Biases")
    add("--world_size", default=1, type=int, help="set by torchrun or SLURM; kept from the published command")
    add("--dist_url", default="env://", help="rendezvous address of the processes")
    add("--dist_timeout", default=600.0, type=positive_float, metavar="SECONDS", help="how long to wait for a rank")


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every prediction command has."""
    add = parser.add_argument
    add("images", nargs="*", metavar="IMG", help="image files, folders of them, or patterns")
    add("--resume", required=True, metavar="FILE|URL", help="checkpoint, ours or published, or an exported .onnx")
    out = Path("predictions")
    add("--out", type=Path, default=out, metavar="DIR", help=f"folder for the results (default {out})")
    add("--tables", action="store_true", help="also draw the learned tables (needs no image)")
    add("--device", default="cuda", help="cuda (the CPU if there is none), cuda:N or cpu")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every export command has."""
    add, suffixes = parser.add_argument, ", ".join(SUFFIX.values())
    add("--resume", required=True, metavar="FILE", help="the checkpoint to export")
    add("--out", required=True, metavar="FILE", help=f"where to write; a format's suffix is added: {suffixes}")
    add("--formats", nargs="+", choices=tuple(SUFFIX), help="which (default: the one of --out's suffix, or onnx)")


def _number(kind: type, name: str, wanted: str, valid: Callable[[float], bool]) -> Callable[[str], float]:
    """The ``type`` of a flag: a number for which ``valid`` is true."""

    def parse(text: str) -> float:
        if not valid(value := kind(text)):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}")
        if kind is int and value > LARGEST_COUNT:
            raise argparse.ArgumentTypeError(f"expected at most {LARGEST_COUNT}, got {text}")
        return value

    parse.__name__ = name  # as argparse calls it
    return parse


positive_int = _number(int, "positive_int", "1 or more", lambda n: n >= 1)
nonnegative_int = _number(int, "nonnegative_int", "0 or more", lambda n: n >= 0)
number_of_workers = _number(int, "number_of_workers", "0 to 1000 processes", lambda n: 0 <= n <= 1000)
# 1e30 is far below fp32's largest number, so products of such values stay finite.
nonnegative_float = _number(float, "nonnegative_float", "a number from 0 to 1e30", lambda x: 0 <= x <= 1e30)
positive_float = _number(float, "positive_float", "a number above 0, at most 1e30", lambda x: 0 < x <= 1e30)
fraction = _number(float, "fraction", "a fraction from 0 to 1", lambda x: 0 <= x <= 1)


def save_interval(text: str) -> str:
    """``text``, checked: as a flag it is saved as it was typed."""
    parse_save_interval(text)
    return text


def parse_save_interval(text: str) -> tuple[int | None, float | None]:
    """``"500"`` is every 500 steps, ``"10m"`` every 10 minutes; returns (steps, seconds), one of them None."""
    try:
        steps, seconds = (None, float(text[:-1]) * 60) if text.endswith("m") else (int(text), None)
        if (steps or seconds) > 0:
            return steps, seconds
    except (ValueError, TypeError):
        pass
    raise argparse.ArgumentTypeError(f"expected a number of steps (500) or minutes (10m), above zero, got {text!r}")
