# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all: a kill or a full disk leaves the old one."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden path to write to, renamed to ``path`` at the end; an OSError inside names ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part_", dir=path.parent, ignore_cleanup_errors=True) as hidden:
            yield (part := Path(hidden, path.name))
            os.replace(part, path)
    except OSError as error:
        error.filename = str(path)
        raise
