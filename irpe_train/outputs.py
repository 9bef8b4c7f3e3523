# SPDX-License-Identifier: Apache-2.0
"""Results never overwrite other files, and an unwritable folder is refused before any work."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from irpe_train.errors import RunError
from irpe_train.text_files import complete, naming, plain_file, read_text

LIST = ".written_by_predict"


def writable_folder(folder: Path, flag: str = "--out") -> None:
    """Create ``folder`` if needed; call it before any work. Raises RunError: it cannot be written; names ``flag``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "no permission")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{flag} {folder}: cannot write there ({reason}); expected a folder") from error


def refuse_existing(file: Path, flag: str = "--out") -> None:
    """Call it before any work. Raises RunError: ``file`` exists already, or cannot be written."""
    if os.path.lexists(file):
        raise RunError(f"{flag} {file}: already there; give another name, or remove it")
    writable_folder(file.parent, flag)


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


class OutputFolder:
    """A folder that predictions are written to; it remembers, in a hidden list, what it wrote.

    A file that existed before, or was changed since, is the user's: a photograph, or the JSON of a labelling tool.

    Args: names: of the results for each image, see ``result_names``; ``NAME.png`` is one of them.
    """

    def __init__(self, folder: Path, names: Mapping[Path, str] | None = None):
        self.folder, self.written, self._image_of = folder, {}, {}
        self._images = {f"{name}.png": os.path.abspath(image) for image, name in (names or {}).items()}
        for line in read_text(folder / LIST).splitlines() if os.path.exists(folder / LIST) else ():
            with contextlib.suppress(ValueError, TypeError):  # a line that a kill cut short
                name, state, image = json.loads(line)
                self.written[str(name)], self._image_of[str(name)] = state, image

    def refuse_to_replace(self, names: Iterable[str]) -> None:
        """Call it before any work.

        Raises: RunError: a file cannot be written, appears twice, has too long a name, or exists and belongs to another
            image or program.
        """
        names = list(names)
        counts = Counter(name.casefold() for name in names)
        if twice := [name for name in names if counts[name.casefold()] > 1]:
            raise RunError(f"two results would be called {twice[0]}: predict one of the images into another --out")
        if long := [name for name in names if len(os.fsencode(Path(name).name)) > 255]:
            raise RunError(f"a result would be called {long[0]}, and no file name has over 255 bytes: rename the image")
        for folder in {(self.folder / name).parent for name in [LIST, *names]}:
            writable_folder(folder)
        others = [name for name in names if self._state(name) not in (None, self.written.get(name))]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            remedy = "nothing was written. Give another --out, or move the file away."
            raise RunError(f"{self.folder / others[0]}{more}: already there, and not a result of predict; {remedy}")
        for name, image in self._images.items():
            if self._state(name) and self._image_of[name] != image:
                raise RunError(f"{self.folder / name}: already there, from {self._image_of[name]}; give another --out")

    def results(self) -> list[str]:
        """The files in it that were written by ``predict``, and not changed since."""
        return [name for name, state in self.written.items() if self._state(name) == state]

    def wrote(self, *names: str) -> None:
        """Note that these files are written: a later prediction may replace them."""
        path = plain_file(self.folder / LIST)
        with naming(path), open(path, "a") as file:  # another process may write here too
            file.writelines(f"\n{json.dumps([name, self._state(name), self._images.get(name)])}" for name in names)

    @contextlib.contextmanager
    def writing(self, *names: str) -> Iterator[list[Path]]:
        """Hidden paths to write to. They get these names, and are listed, once all are complete."""
        with complete(*(self.folder / name for name in names)) as parts:
            yield parts
        self.wrote(*names)

    def _state(self, name: str) -> str | None:
        try:
            found = (self.folder / name).lstat()  # a symlink is the user's
        except FileNotFoundError:
            return None
        return f"{found.st_size} {found.st_mtime_ns}"
