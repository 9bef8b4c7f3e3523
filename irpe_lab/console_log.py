# SPDX-License-Identifier: Apache-2.0
"""Reads the logs of a run, ours or published: ``log.txt``, and the console output in ``detail_<name>.log``."""

import json
import re
import statistics
from pathlib import Path

from irpe_lab.figures import NUMBER, TASKS
from irpe_train.errors import BadData
from irpe_train.text_files import read_text

EPOCH = re.compile(r"Epoch: +\[(\d{1,9})\]")
PARAMETERS = re.compile(r"number of params(?:eters)?: *(\d[\d,]{,20})")
METRIC = re.compile(r"IoU metric: (\w+)")
SPEED = re.compile(rf"({NUMBER}) img/s")
MEMORY = re.compile(r"max mem: (\d{1,9})\b")


def read_log(run: str | Path) -> list[dict]:
    """The epochs of a run, in order; if one occurs twice, the last counts, as in ``read_detail``.

    Args: run: a ``log.txt``, or the folder that has one.
    Raises: BadData: no such file, no epochs, or a line (named by number) that is not a JSON object with ``epoch``.
    """
    path = Path(run)
    path = path / "log.txt" if path.is_dir() else path
    if not path.is_file():
        raise BadData(f"{path}: no such log; give a run's folder or its log.txt")
    epochs: dict[int, dict] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            epoch = json.loads(line)
            whole = isinstance(epoch["epoch"], int) and abs(epoch["epoch"]) < 2**53
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadData(f"{path}: line {number} is not a JSON object with 'epoch'") from error
        if not whole:
            raise BadData(f"{path}: line {number}: 'epoch' is {epoch['epoch']!r:.80}, not a whole number")
        epochs[epoch["epoch"]] = epoch
    if not epochs:
        raise BadData(f"{path}: no epoch logged yet")
    return [epochs[number] for number in sorted(epochs)]


def read_detail(path: str | Path) -> list[dict]:
    """The evaluations of a console log, under the keys of ``log.txt``: ``epoch``, ``test_acc1``, ``test_acc5``,
    ``test_loss``, or ``test_coco_eval_bbox`` (only its first figure), and ``n_parameters`` if it was printed.

    An evaluation belongs to the epoch announced before it; if an epoch was run twice, the last one counts.
    """
    epochs: dict[int, dict] = {}
    epoch, parameters, of_masks = 0, None, False
    for line in _lines(path):
        if found := EPOCH.search(line):
            epoch = int(found[1])
        elif found := METRIC.search(line):
            of_masks = found[1] != "bbox"
        elif found := PARAMETERS.search(line):
            parameters = int(found[1].replace(",", ""))
        elif not of_masks:  # their AP is printed in the same words
            for task in TASKS.values():
                if found := task.evaluation.search(line):
                    values = {key: float(value) for key, value in found.groupdict().items() if value}
                    in_list = task.figure.place is not None
                    epochs[epoch] = {key: [value] if in_list else value for key, value in values.items()}
    counted = {"n_parameters": parameters} if parameters else {}
    return [entry | {"epoch": epoch} | counted for epoch, entry in sorted(epochs.items())]


def images_per_second(path: str | Path) -> float | None:
    """The median training speed that the run printed; None if it printed none (the published logs)."""
    speeds = [float(found[1]) for line in _lines(path) if EPOCH.search(line) and (found := SPEED.search(line))]
    return statistics.median(speeds) if speeds else None


def peak_memory(path: str | Path) -> int | None:
    """The highest memory that the run printed, in MiB: of the GPU, or of the process on a CPU."""
    return max((int(found[1]) for line in _lines(path) if (found := MEMORY.search(line))), default=None)


def last_words(path: str | Path) -> str:
    """The last non-empty line: why a run failed."""
    return next((line.strip() for line in reversed(_lines(path)) if line.strip()), "it printed nothing")


def _lines(path: str | Path) -> list[str]:
    path = Path(path)
    return read_text(path).splitlines() if path.is_file() else []
