# SPDX-License-Identifier: Apache-2.0
"""A run's folder: locks it for one run, and writes and finds its checkpoints."""

import errno
import fcntl
import os
import re
import socket
import weakref
from pathlib import Path
from typing import TextIO

from irpe_train.checkpoint import Checkpoint, link, write_checkpoint
from irpe_train.distributed import from_main, is_main
from irpe_train.errors import BadCheckpoint, RunError
from irpe_train.logger import log_details, logger
from irpe_train.outputs import writable_folder
from irpe_train.preemption import STOP
from irpe_train.state import TrainState, progress_of
from irpe_train.text_files import naming, plain_file

LOCK = ".lock"


class Checkpoints:
    """The checkpoints in a run's folder: ``checkpoint.pth``, and the previous one as ``checkpoint_previous.pth``.

    Args:
        output_dir: "" for a run that writes nothing.
        keys: the published keys, in the published order.

    Attributes: own: whether this run continues the one in the folder.
    """

    NAME, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_previous.pth", "best.pth"

    def __init__(self, output_dir: str | Path, keys: tuple[str, ...]):
        self.folder = Path(output_dir) if str(output_dir) else None
        self.keys, self.own = keys, False

    def save(self, state: TrainState, also: tuple[str, ...] = ()) -> None:
        """Write the state; call it on every rank; only rank 0 writes.

        Args: also: further names in the same folder, for instance ``best.pth``.
        """
        if self.folder is None:
            return
        contents = state.to_dict(self.keys)
        contents["progress"]["also"] = list(also)  # in case of a kill before the naming: see _restore_names
        if is_main():
            with STOP.writing():
                names = tuple(self.folder / name for name in also)
                write_checkpoint(contents, self.folder / self.NAME, previous=self.folder / self.PREVIOUS, also=names)

    def open(self, where: str, *, evaluate: bool = False) -> Checkpoint | None:
        """The checkpoint that ``--resume`` names; call it on every rank. For training, it claims the folder.

        Args:
            where: a path or address; ``auto`` for this folder's newest good checkpoint, if it has any; "" for none.
            evaluate: no training in this folder, and ``auto`` must find a checkpoint.
        Raises:
            BadCheckpoint: it cannot be used; for ``auto``, nor can the previous one.
            RunError: another process trains in the folder, or it holds the checkpoints of another run.
        """
        found, problem = None, None
        if is_main():  # one rank chooses, so that all take the same file
            try:
                if self.folder is not None and not evaluate:
                    self._claim(where)
                if where:
                    found = self._newest_good() if where == "auto" else _checked(where)
                if where == "auto" and found is None and (evaluate or self.there()):
                    others = f", but {', '.join(self.there())}: name one" if self.there() else ""
                    raise BadCheckpoint(f"--resume auto: no {self.NAME} in {self.folder}{others}")
                if self.folder is not None and evaluate:
                    writable_folder(self.folder, "--output_dir")
                if found is not None and self.own and (where == "auto" or Path(where).name == self.NAME):
                    self._restore_names(found)
            except RunError as error:
                problem = error
        source, problem = from_main((found and found.source, problem))
        if problem is not None:
            raise problem
        if source is None:
            if where:
                logger.info(f"--resume auto: no checkpoint in {self.folder}, a new run")
            return None
        return found or Checkpoint.read(source)

    def there(self) -> list[str]:
        """The checkpoint names in the folder, including ``checkpoint0099.pth``, which detection keeps."""
        names = [path.name for path in self.folder.glob("*.pth")] if self.folder else []
        return sorted(name for name in names if re.fullmatch(r"best\.pth|checkpoint(\d+|_previous)?\.pth", name))

    def _claim(self, where: str) -> None:
        """Lock the folder as long as this object lives, and start its detail log.

        A folder is refused if another run's checkpoints would be replaced.
        """
        weakref.finalize(self, lock(self.folder).close)
        self.own = where == "auto" or (where and Path(where).resolve().parent == self.folder.resolve())
        if (old := self.there()) and not self.own:
            last = "auto" if {self.NAME, self.PREVIOUS} & {*old} else self.folder / old[-1]
            remedy = f"Continue it with --resume {last}, or choose another folder."
            raise RunError(f"--output_dir {self.folder} holds {', '.join(old)} of another run. {remedy}")
        log_details(self.folder)

    def _restore_names(self, found: Checkpoint) -> None:
        """Give the checkpoint its further names, such as ``best.pth``, if the run died before naming it.

        After a fallback the previous checkpoint replaces the damaged one; else the next save would do the opposite.
        """
        names = found.contents.get("progress", {}).get("also", [])
        for name in [self.NAME, *(names if isinstance(names, list) else [])]:
            path = self.folder / str(name)
            inside = path.parent == self.folder and path.suffix == ".pth"
            if inside and not (path.exists() and path.samefile(found.source)):
                link(Path(found.source), path)

    def _newest_good(self) -> Checkpoint | None:
        if self.folder is None:
            raise BadCheckpoint("--resume auto looks in --output_dir: give one")
        problems = []
        for path in (self.folder / self.NAME, self.folder / self.PREVIOUS):
            if not os.path.lexists(path):
                continue
            try:
                found = _checked(path)
                progress_of(found)
            except BadCheckpoint as error:
                problems.append(str(error))
                continue
            for problem in problems:
                logger.warning(f"{problem}. Falling back to {path}")
            return found
        if problems:
            raise BadCheckpoint("--resume auto: no usable checkpoint. " + " ".join(problems))
        return None


def _checked(path: str | Path) -> Checkpoint:
    """A checkpoint whose weights exist and are finite."""
    found = Checkpoint.read(path)
    found.weights()
    return found


def lock(folder: Path) -> TextIO:
    """Create ``folder`` if needed, and keep other runs out of it while the returned file is open.

    Raises: RunError: it cannot be written, or another process holds it (named).
    """
    try:
        writable_folder(folder, "--output_dir")
        file = open(plain_file(folder / LOCK), "a+")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"--output_dir {folder}: cannot write there ({error.strerror})") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process; not inherited by children
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise RunError(
                f"--output_dir {folder}: another run is writing there ({file.read()[:200].strip()}). "
                "Wait until it ends, or choose another folder."
            ) from error
        logger.warning(f"--output_dir {folder} cannot be locked ({error.strerror}): do not start a second run there")
    with naming(folder / LOCK):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
