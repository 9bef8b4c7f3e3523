# SPDX-License-Identifier: Apache-2.0
"""Results never overwrite other files, and an unwritable folder is refused before any work."""

import contextlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from irpe_train.errors import RunError
from irpe_train.text_files import naming

MARK = ".written_by_predict"  # in each folder of results


def writable_folder(folder: Path, flag: str = "--out") -> Path:
    """``folder``, created if needed; call it before any work. Raises RunError: it cannot be written; names ``flag``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "no permission")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{flag} {folder}: cannot write there ({reason}); expected a folder") from error
    return folder


def refuse_existing(file: Path, flag: str = "--out") -> None:
    """Call it before any work. Raises RunError: ``file`` exists already, or cannot be written."""
    if os.path.lexists(file):
        raise RunError(f"{flag} {file}: already there; give another name, or remove it")
    writable_folder(file.parent, flag)


@contextlib.contextmanager
def complete(*ends: Path) -> Iterator[list[Path]]:
    """Hidden paths to write to, which get the names ``ends`` (of one folder) once all are complete, or are removed."""
    with naming(ends[0]), tempfile.TemporaryDirectory(prefix=".part_", dir=ends[0].parent) as hidden:
        parts = [Path(hidden, end.name) for end in ends]  # an archive may keep its file's name
        yield parts
        for part, end in zip(parts, ends, strict=True):
            os.replace(part, end)


def result_names(files: Sequence[Path]) -> dict[Path, str]:
    """The name of each image's results: its own, with folders and suffix if names would clash."""
    whole = [Path(os.path.abspath(file)) for file in files]
    common = os.path.commonpath([file.parent for file in whole]) if files else ""
    within = [file.relative_to(common) for file in whole]
    for name_of in (lambda path: path.stem, lambda path: str(path.with_suffix("")), str):
        names = [name_of(path) for path in within]
        if len({name.casefold() for name in names}) == len(names):  # some file systems ignore case
            break
    return dict(zip(files, names, strict=True))


def results_folder(wanted: Path, results: Sequence[str]) -> Path:
    """The folder for the ``results`` of predict: ``wanted``, or if that has files the first of ``wanted_2``,
    ``wanted_3``, ... without any. It is marked, by a hidden file, so that pictures in it are not read as photographs.

    Raises: RunError: it cannot be written, or two results have the same name, or one a name too long for a file.
    """
    counts = Counter(name.casefold() for name in results)  # some file systems ignore case
    if twice := [name for name in results if counts[name.casefold()] > 1]:
        raise RunError(f"two results would be called {twice[0]}: predict one of the images by itself")
    if long := [name for name in results if len(os.fsencode(Path(name).name)) > 255]:
        raise RunError(f"a result would be called {long[0]}, and no file name has over 255 bytes: rename the image")
    wanted = os.path.abspath(wanted)
    for number in itertools.count(1):
        folder = Path(wanted if number == 1 else f"{wanted}_{number}")
        if not os.listdir(writable_folder(folder)):
            with naming(folder / MARK), contextlib.suppress(FileExistsError):  # another process was faster
                (folder / MARK).touch(exist_ok=False)
                break
    for below in {(folder / name).parent for name in results}:
        writable_folder(below)
    return folder
