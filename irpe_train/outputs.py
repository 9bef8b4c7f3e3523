# SPDX-License-Identifier: Apache-2.0
"""Results never replace what somebody else put in their place."""

from collections.abc import Iterable
from pathlib import Path

from irpe_train.errors import RunError

LIST = ".written_by_predict"


class OutputFolder:
    """A folder that predictions are written to; it remembers, in a hidden list, what it wrote.

    A file that was there before, or was changed since, is somebody's: a photograph, or the JSON of a labelling tool.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            lines = (folder / LIST).read_text().splitlines()
        except (OSError, ValueError):
            lines = []
        self._written = dict(line.rsplit("\t", 1) for line in lines if "\t" in line)

    def refuse_to_replace(self, names: Iterable[str]) -> None:
        """To be called before any work. Raises RunError: one of the files exists and was not written by ``predict``."""
        others = [
            name for name in names if (self.folder / name).exists() and self._written.get(name) != self._state(name)
        ]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise RunError(
                f"{self.folder / others[0]}{more}: already there, and not a result of predict; nothing was written. "
                "Give another --out, or move the file away."
            )

    def path(self, name: str) -> Path:
        """Where the file ``name`` goes; the folder is made if need be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def wrote(self, *names: str) -> None:
        """These files are written, and may be replaced by a later prediction."""
        self._written |= {name: self._state(name) for name in names}
        lines = "".join(f"{name}\t{state}\n" for name, state in sorted(self._written.items()) if "\n" not in name)
        (self.folder / LIST).write_text(lines)

    def _state(self, name: str) -> str:
        found = (self.folder / name).stat()
        return f"{found.st_size} {found.st_mtime_ns}"
