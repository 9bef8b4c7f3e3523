# SPDX-License-Identifier: Apache-2.0
"""One run of an ablation: a folder with its command, console output and outcome; and pools that work through many.

    FOLDER/flags.yaml    its flags, a --config file
    FOLDER/job.json      the command and the evaluations after it; after the first try also the seconds of all tries
    FOLDER/detail.log    its console output
    FOLDER/done.json     how it ended, written at the end
    FOLDER/eval_*.log    the console output of each evaluation after it
    FOLDER/log.txt, ...  the files of the run itself

Each folder has its own worker process, which holds ``FOLDER/lock``, as the run itself does. So killing the ablation
runner neither loses a run nor starts it twice: the next runner's worker waits for the lock.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from irpe_lab.console_log import last_words
from irpe_lab.figures import LARGEST
from irpe_train.config import parse_yaml
from irpe_train.errors import Preempted, RunError, blamed_on, import_optional, reported_by
from irpe_train.outputs import writable_folder
from irpe_train.text_files import plain_file, read_text, write_text

FOLDER = "<folder>"  # in a command: the run's own folder


def prepare(
    folder: Path, command: list[str], flags: str, then: dict[str, list[str]] | None = None, *, keep: bool = False
) -> None:
    """Write ``flags.yaml`` and ``job.json``.

    Args:
        command: without the interpreter; `FOLDER` stands for the folder, which may be moved between two tries.
        then: evaluations by name, to be run after ``command``. If they have changed, or the output of one is gone, a
            finished run starts again: it resumes at its end, and evaluates.
        keep: a finished run stays finished.
    Raises: RunError: the folder has results of another run.
    """
    job, written = folder / "job.json", folder / "flags.yaml"
    known, wanted = read_json(job), {"command": command, "then": then or {}}
    old = known.get("command")
    if old == command and written.is_file() and same_flags(written, flags):
        there = all(evaluation_log(folder, name).exists() for name in wanted["then"])
        if not (there and known.get("then") == wanted["then"] or keep and finished(folder)):
            (folder / "done.json").unlink(missing_ok=True)
            write_text(job, json.dumps(known | wanted, indent=1) + "\n")
        return
    if done(folder) or (folder / "log.txt").exists():
        shown = " ".join(map(str, old)) if isinstance(old, list) else old
        other = "other flags (see its flags.yaml)" if old == command else f"another command ({shown})"
        raise RunError(f"{folder} holds the results of {other}. Choose another folder (-o), or delete this one.")
    writable_folder(folder, "-o")
    write_text(written, flags)
    write_text(job, json.dumps(wanted, indent=1) + "\n")


def same_flags(written: Path, flags: str) -> bool:
    """Whether a run's ``flags.yaml`` says the same, however its numbers are written."""
    text = read_text(written)
    return text == flags or parse_yaml(text, str(written)) == parse_yaml(flags, "flags")


def in_folder(command: list[str], folder: Path) -> list[str]:
    """``command`` with the folder in place of `FOLDER`."""
    return [word.replace(FOLDER, str(folder)) for word in command]


def done(folder: Path) -> dict | None:
    """The outcome: ``rc``, ``seconds`` of all tries, ``reason`` (None after success); None if there is none yet."""
    outcome = read_json(folder / "done.json")
    counted = type(outcome.get("seconds")) in (int, float) and 0 <= outcome["seconds"] < LARGEST
    return outcome if counted and type(outcome.get("rc")) is int and "reason" in outcome else None


def finished(folder: Path) -> bool:
    outcome = done(folder)
    return outcome is not None and outcome["rc"] == 0


def busy(folder: Path) -> bool:
    """Whether a worker of this runner or of a killed one is running it."""
    with locked(folder) as lock:
        return lock is None


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[TextIO | None]:
    """Lock ``folder/lock``, which is free once all its holders have ended.

    Yields the file; without ``wait``, None if the lock is taken. A file system without locks never has one taken.
    """
    with open(plain_file(folder / "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        except OSError as error:  # not every file system has locks
            if wait:
                print(f"{folder} cannot be locked ({error.strerror}): do not start a second runner there")
        yield lock


def work(folder: Path) -> int:
    """Run the command of ``folder/job.json`` unless it has finished; SIGTERM reaches it, so that it can save.

    Waits for another worker that runs it. Returns: its exit status. A stopped run has no outcome yet: it resumes later.
    """
    with locked(folder, wait=True) as lock:
        if finished(folder):
            return 0
        (folder / "done.json").unlink(missing_ok=True)
        job, began = read_json(folder / "job.json"), time.monotonic()
        status, stopped = _run(in_folder(job["command"], folder), folder / "detail.log", lock)
        reason = None if status == 0 else last_words(folder / "detail.log")
        for name, command in job.get("then", {}).items():
            if status == 0 and not stopped:
                console = evaluation_log(folder, name)
                console.unlink(missing_ok=True)
                status, stopped = _run(in_folder(command, folder), console, lock)
                reason = None if status == 0 else f"{name}: {last_words(console)}"
        job["seconds"] = job.get("seconds", 0) + time.monotonic() - began
        write_text(folder / "job.json", json.dumps(job, indent=1) + "\n")
        if status == Preempted.EXIT_CODE or stopped:
            return status or Preempted.EXIT_CODE
        outcome = {"rc": status, "seconds": job["seconds"], "reason": reason}
        write_text(folder / "done.json", json.dumps(outcome, indent=1) + "\n")
        return status


def evaluation_log(folder: Path, name: str) -> Path:
    """Where the console output of the evaluation ``name`` goes."""
    return folder / f"eval_{slug(name)}.log"


def slug(name: str) -> str:
    """``name`` as a valid file name."""
    return re.sub(r"[^\w.=+-]+", "_", name).strip("_")


def _run(command: list[str], log: Path, lock: TextIO) -> tuple[int, bool]:
    """Run it, appending its output to ``log``. Returns: its exit status; whether it was told to stop."""
    with open(plain_file(log), "a") as console:
        # Unbuffered (-u): otherwise earlier output may be written after an error, and look like the reason.
        options = dict(stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, pass_fds=(lock.fileno(),))
        child, stopped = subprocess.Popen([sys.executable, "-u", *command], **options), []

        def pass_on(number: int, frame) -> None:
            stopped.append(number)
            child.terminate()

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            return child.wait(), bool(stopped)
        finally:
            signal.signal(signal.SIGTERM, before)


class LocalPool:
    """Processes on this machine: each slot takes one run at a time.

    Args: slots: what each slot adds to the environment, e.g. ``{"CUDA_VISIBLE_DEVICES": "3"}``.
    """

    poll_seconds = 1.0

    def __init__(self, slots: list[dict[str, str]]):
        self.slots = slots
        self._workers: dict[int, tuple[subprocess.Popen, Path]] = {}

    def free(self) -> bool:
        return len(self.working()) < len(self.slots)

    def start(self, folder: Path) -> None:
        slot = next(number for number in range(len(self.slots)) if number not in self._workers)
        command = [sys.executable, "-m", "irpe_lab.jobs", str(folder)]
        # Else torchrun looks this machine up by its name, and waits long if nobody knows it.
        env = {"PET_LOCAL_ADDR": "127.0.0.1", **os.environ, **self.slots[slot]}
        worker = subprocess.Popen(command, start_new_session=True, env=env)
        self._workers[slot] = worker, folder

    def working(self) -> set[Path]:
        """The folders being worked on."""
        self._workers = {slot: entry for slot, entry in self._workers.items() if entry[0].poll() is None}
        return {folder for _, folder in self._workers.values()}

    def stop(self) -> None:
        """Ask all runs to save and exit, and wait for them."""
        for worker, _ in self._workers.values():
            worker.terminate()
        for worker, _ in self._workers.values():
            worker.wait()


class SlurmPool:
    """SLURM jobs through submitit, one per run; they continue after this runner ends, and are found again by job id.

    Args: options: submitit's parameters, and ``cluster``. Raises: BadFlags: submitit refuses one.
    """

    poll_seconds = 20.0

    def __init__(self, folder: Path, options: dict):
        self._submitit, self._folder = import_optional("submitit", "SLURM jobs go through submitit"), folder
        with blamed_on("--slurm, --slurm-option"):
            self._executor = self._submitit.AutoExecutor(folder=folder, cluster=options.pop("cluster", "slurm"))
            self._executor.update_parameters(**options)
        self._jobs: dict[Path, object] = {}

    def free(self) -> bool:
        return True

    def start(self, folder: Path) -> None:
        ticket = folder / "slurm.json"
        if (number := read_json(ticket).get("job_id")) and self._executor.cluster == "slurm":
            job = self._submitit.SlurmJob(folder=self._folder, job_id=number)
            if not job.done():
                self._jobs[folder] = job
                return
        self._jobs[folder] = self._executor.submit(work, folder)
        write_text(ticket, json.dumps({"job_id": self._jobs[folder].job_id}) + "\n")

    def working(self) -> set[Path]:
        self._jobs = {folder: job for folder, job in self._jobs.items() if not job.done()}
        return set(self._jobs)

    def stop(self) -> None:
        """Does nothing: the queue keeps the jobs."""


def read_json(path: Path) -> dict:
    """The object in a file; empty if the file is missing or unreadable (its writer was killed)."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    with reported_by(sys.argv[1]):
        sys.exit(work(Path(sys.argv[1])))
