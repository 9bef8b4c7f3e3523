# SPDX-License-Identifier: Apache-2.0
"""The confusion matrix, as tables and as a picture: ``--eval`` writes them to ``--output_dir``."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from irpe_ops.visualize import plain_text, save
from irpe_train.run_log import keep_aside
from irpe_train.text_files import read_text, write_text

MOST_CONFUSED = 5000  # classes; a larger table would take a gigabyte
CORNER = "true \\ predicted"  # the first cell of the matrix; marks the file as ours
MOST_NAMES, MOST_NUMBERS = 60, 15  # with more classes, names and counts do not fit in the picture


def write_confusion(counts: Tensor, classes: list[str], folder: Path) -> list[Path]:
    """Write ``eval_confusion.csv``, ``eval_classes.csv`` and ``eval_confusion.png``.

    Args:
        folder: an existing one. Files of these names that another program wrote are renamed.
        counts: ``(C, C)`` integers: images of the row's class predicted as the column's class.
    Returns: the files.
    """
    files = matrix, table, picture = [
        folder / f"eval_{name}" for name in ("confusion.csv", "classes.csv", "confusion.png")
    ]
    if not (matrix.is_file() and read_text(matrix).startswith(CORNER)):
        for file in filter(os.path.lexists, files):
            keep_aside(file)
    rows = ([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
    _write_table(matrix, [[CORNER, *classes], *rows])
    header = "class", "images", "correct", "recall", "predicted", "precision"
    _write_table(table, [header, *class_rows(counts, classes)])
    save(draw_confusion(counts, classes), picture, dpi=300)
    return files


def _write_table(file: Path, rows: Iterable[Sequence]) -> None:
    csv.writer(text := io.StringIO(newline="")).writerows(rows)
    write_text(file, text.getvalue(), errors="surrogateescape")


def class_rows(counts: Tensor, classes: list[str]) -> list[tuple]:
    """For each class: images, correct ones, recall in percent; how often it was predicted, and precision in percent.

    Percentages of zero images are empty.
    """
    rows = []
    for index, name in enumerate(classes):
        images, right, predicted = int(counts[index].sum()), int(counts[index, index]), int(counts[:, index].sum())
        rows.append((name, images, right, _percent(right, images), predicted, _percent(right, predicted)))
    return rows


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else ""


def draw_confusion(counts: Tensor, classes: list[str]):
    """The share of each true class (row) predicted as each class (column); a class without images is blank."""
    from matplotlib.figure import Figure

    shares = counts.double() / counts.sum(1, keepdim=True)  # NaN in the row of a class without images
    side = min(max(0.28 * len(classes), 3), 20)
    figure = Figure(figsize=(side + 1.5, side + 1), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares.numpy(), cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xlabel="predicted", ylabel="true class", title="share of the true class")
    if len(classes) <= MOST_NAMES:
        names = [plain_text(name[:30]) for name in classes]
        axis.set_xticks(range(len(classes)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(classes)), names, fontsize=7)
    if len(classes) <= MOST_NUMBERS:
        for row, column in counts.nonzero().tolist():
            colour = "black" if shares[row, column] > 0.6 else "white"
            axis.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, shrink=0.8)
    return figure
