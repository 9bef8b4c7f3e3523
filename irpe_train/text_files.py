# SPDX-License-Identifier: Apache-2.0
"""Text files that a run or a report reads and writes: UTF-8, with or without a byte-order mark, never half written."""

import os
from pathlib import Path


def read_text(path: Path, *, errors: str = "replace") -> str:
    """The text of a file without its byte-order mark; bytes that are no UTF-8 are replaced, or as ``errors`` says."""
    return path.read_text(encoding="utf-8-sig", errors=errors)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` as a whole: a kill or a full disk leaves the old file. What is no UTF-8 becomes ``?``."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # whatever it is: a file is not written through a link
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
