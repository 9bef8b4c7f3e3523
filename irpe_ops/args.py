# SPDX-License-Identifier: Apache-2.0
"""The flags of ``irpe info`` and ``irpe visualize``, and how both end; read before PyTorch is imported.

``kind`` is the parser class: the command has its own.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path


def _parser(kind: type, module: str, what: str) -> argparse.ArgumentParser:
    front_door = sys.argv[0] if sys.argv[0].startswith("irpe ") else ""
    return kind(front_door or f"python -m irpe_ops.{module}", description=what)


def end_with(main: Callable[[], int | None]) -> None:
    """Run a module's ``main`` and exit; neither Ctrl-C nor a closed or full console gives a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # escape what the console lacks, such as letters of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            status = main()
        except SystemExit as error:  # of --help, for instance
            status = error.code
        print(end="", flush=True)
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python flushes as it exits
        status = 1 if isinstance(error, BrokenPipeError) else f"{sys.argv[0]}: {error}"  # `| head -1`
    sys.exit(status)


def get_info_parser(kind: type = argparse.ArgumentParser) -> argparse.ArgumentParser:
    what = "List the backends available here and why others are missing, check their results, and time them."
    parser = _parser(kind, "info", what)
    parser.add_argument("--check", action="store_true", help="run each backend against an fp64 reference, then time it")
    parser.add_argument("--benchmark", type=_path, metavar="DIR", help="time full batches and write a CSV")
    return parser


def get_visualize_parser(kind: type = argparse.ArgumentParser) -> argparse.ArgumentParser:
    what = (
        "Draw an encoding's buckets, as PNG, PDF or SVG. Trained tables: irpe classify predict --tables --resume FILE."
    )
    parser = _parser(kind, "visualize", what)
    add = parser.add_argument
    add("spec", nargs="?", help="such as rpe-1.9-product-ctx-1-k (default: an overview of all methods)")
    add("--grid", type=_pair("x", "HxW"), metavar="HxW", help="patches (default 14x14)")
    add("--query", type=_pair(",", "ROW,COL"), metavar="ROW,COL", help="the query patch (default: middle)")
    add("-o", "--output", type=_path, default=Path("encoding.png"), metavar="FILE", help="default: encoding.png")
    return parser


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # ~ after --flag=, where no shell does it


def _pair(separator: str, wanted: str):
    def parse(text: str) -> tuple[int, int]:
        try:
            first, second = map(int, text.split(separator))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {wanted} in patches, got {text!r}") from None
        return first, second

    return parse
