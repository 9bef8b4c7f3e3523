# SPDX-License-Identifier: Apache-2.0
"""The logger of all programs: what it prints, and what it writes to a run's detail log."""

import logging
import sys
from pathlib import Path

from irpe_train.errors import shown, stop_printing
from irpe_train.text_files import plain_file

logger = logging.getLogger("irpe")


class _Console(logging.StreamHandler):
    """Writes to the current ``sys.stdout``, so that redirecting works. File names need not be encodable there."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stdout

    def handleError(self, record):
        if isinstance(sys.exc_info()[1], OSError):
            stop_printing()
        else:
            super().handleError(record)

    def format(self, record):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)


def set_up_logging(my_rank: int) -> None:
    """Rank 0 prints everything; the others print only warnings, prefixed with their rank.

    A record with ``extra={"only": "file"}`` is not printed; one with ``"console"`` does not go to the file.
    """
    logger.handlers = [_Console()]
    logger.propagate = False
    logger.setLevel(logging.INFO if my_rank == 0 else logging.WARNING)
    prefix = "" if my_rank == 0 else f"[rank {my_rank}] "
    logger.handlers[0].setFormatter(_Plain(prefix))
    logger.handlers[0].addFilter(lambda record: getattr(record, "only", "console") == "console")


def log_details(folder: Path) -> None:
    """From now on, also write console output to ``folder/detail_NAME.log``, there with all terms of each step."""
    path = plain_file(folder / f"detail_{folder.resolve().name}.log")
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Plain(""))
    handler.addFilter(lambda record: getattr(record, "only", "file") == "file")
    handler.handleError = lambda record: None  # a full disk: not worth stopping or a traceback
    logger.addHandler(handler)


class _Plain(logging.Formatter):
    """``message`` for information; ``warning: message`` and so on, in one line, for the rest."""

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix = prefix

    def formatMessage(self, record):
        if record.levelno <= logging.INFO:
            return f"{self.prefix}{record.message}"
        return f"{self.prefix}{record.levelname.lower()}: {shown(record.message)}"
