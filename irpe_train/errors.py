# SPDX-License-Identifier: Apache-2.0
"""The ways a run ends early, and their words. ``reported_by`` prints these without a traceback; they say what to do."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable
from types import ModuleType


class RunError(RuntimeError):
    """A run that cannot go on, with a message for the user."""


class BadFlags(RunError, ValueError):
    """Flag values that a library refuses."""


def stop_printing() -> None:
    """The console was closed, or its disk is full: print nothing more, instead of failing at every line."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def shown(text: object) -> str:
    """Text that may contain a file's name, for the console: line breaks and control characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def some(names: Iterable[object]) -> str:
    """The first five of ``names``, escaped where they cannot be printed, and how many more there are."""
    texts = list(map(str, names))
    first = [text if text.isprintable() and len(text) < 100 else ascii(text)[:60] for text in texts[:5]]
    return ", ".join(first) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


@contextlib.contextmanager
def reported_by(program: str):
    """Around a command: an error that the user can fix ends it with one message, which begins with ``program``.

    Ctrl-C ends it without a message, with exit status 130; a closed console, as in ``irpe zoo | head -1``, with 1.
    ``IRPE_TRACEBACK=1`` shows where a message comes from; unexpected errors keep their traceback.
    """
    try:
        try:
            yield
        except SystemExit:  # of --help, for instance
            print(end="", flush=True)
            raise
        print(end="", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RunError, ValueError, OSError, ImportError) as error:
        if os.environ.get("IRPE_TRACEBACK"):
            raise
        try:  # what is buffered, and a line to see whether it is the console whose pipe broke
            print(end="\n" if isinstance(error, BrokenPipeError) else "", flush=True)
        except OSError:
            stop_printing()
            if isinstance(error, BrokenPipeError):
                sys.exit(1)
        if isinstance(error, FileNotFoundError) and error.errno and error.filename is None:  # of os.getcwd
            error.strerror += ": is the working folder gone? cd to one that exists"
        message = f"{program}: {type(error).__name__}: {shown(error)}"
        # The loader's cleanup would raise it again, with a traceback; gloo's threads may abort Python's own end.
        if isinstance(error, (WorkerLost, RankLost)):
            import multiprocessing

            print(message, file=sys.stderr, flush=True)
            for child in multiprocessing.active_children():  # workers would hold the console open for 5 seconds more
                child.kill()
            os._exit(1)
        sys.exit(message)


def in_one_line(error: BaseException) -> str:
    """An error's message without line breaks; its type if it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without torch.load's advice; its type if it has no message."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(". In PyTorch")[0][:300]  # the rest advises weights_only=False


@contextlib.contextmanager
def blamed_on(flags: str):
    """Turns a library's error about values that the user typed into ``BadFlags``, which names the ``flags``."""
    try:
        yield
    except RunError:
        raise
    except (ArithmeticError, AssertionError, LookupError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise BadFlags(f"{flags}: {in_one_line(error)}") from error


def import_optional(package: str, what_for: str) -> ModuleType:
    """A package that not every user needs.

    Raises: ImportError: it is not installed, or broken (the message says how); begins with ``what_for``.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        broken = "" if isinstance(error, ModuleNotFoundError) and error.name == package else f" ({in_one_line(error)})"
        raise ImportError(f"{what_for}{broken}: pip install {package.replace('_', '-')}") from error


class BadCheckpoint(RunError, ValueError):
    """A checkpoint that is damaged, hostile, or from another model; the message names file and reason."""


class BadData(RunError):
    """Unreadable images: one in evaluation, more than ``--max-bad`` in training."""


class NonFiniteLoss(RunError):
    """The loss of some rank is NaN or infinite; raised on every rank before the weights change."""


class RankLost(RunError):
    """Another process died, or never arrived."""


class WorkerLost(RunError):
    """A data loading worker was killed, usually by the kernel because memory ran out."""


class Preempted(SystemExit):
    """The run was asked to stop and its state is on disk; leaves the process with ``EXIT_CODE``."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again

    def __init__(self):
        super().__init__(self.EXIT_CODE)
