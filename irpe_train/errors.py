# SPDX-License-Identifier: Apache-2.0
"""The ways a run ends early. ``launch`` prints these without a traceback; the message says what to do."""

import contextlib
import sys


class RunError(RuntimeError):
    """A run that cannot go on, with a message for the user."""


class BadFlags(RunError, ValueError):
    """Flag values that a library refuses."""


@contextlib.contextmanager
def ending_quietly():
    """Around a command: Ctrl-C ends it with exit status 130, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)


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
