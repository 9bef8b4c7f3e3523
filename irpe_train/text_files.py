# SPDX-License-Identifier: Apache-2.0
"""Files of runs and reports: written whole or not at all; text is UTF-8, with or without a byte-order mark."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from irpe_train.errors import RunError


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an OSError inside name ``path``: a full disk's names no file, others a temporary one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def complete(*ends: Path) -> Iterator[list[Path]]:
    """Hidden paths to write to, renamed to ``ends`` (in one folder) once all are complete, else removed."""
    how = dict(prefix=".part_", dir=ends[0].parent, ignore_cleanup_errors=True)  # some network file systems are late
    with naming(ends[0]), tempfile.TemporaryDirectory(**how) as hidden:
        parts = [Path(hidden, end.name) for end in ends]  # an archive may keep its file's name
        yield parts
        for part, end in zip(parts, ends, strict=True):
            os.replace(part, end)


def plain_file(path: Path) -> Path:
    """``path``, to be opened. Raises RunError: a pipe, which may never end, a device or a folder has this name."""
    if path.exists() and not path.is_file():
        raise RunError(f"{path}: expected a plain file, not a folder, a pipe or a device; move it away")
    return path


def read_text(path: Path, *, errors: str = "replace") -> str:
    """The text of a file without its byte-order mark; ``errors`` says what to do with bytes that are not UTF-8."""
    return plain_file(path).read_text(encoding="utf-8-sig", errors=errors)


def write_text(path: Path, text: str, *, errors: str = "replace") -> None:
    """Replace ``path`` atomically: a kill or a full disk leaves the old file. Text that UTF-8 cannot encode becomes
    ``?``, or as ``errors`` says.
    """
    with complete(plain_file(path)) as (part,):
        part.write_text(text, encoding="utf-8", errors=errors, newline="")
