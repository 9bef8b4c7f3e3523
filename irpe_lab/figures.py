# SPDX-License-Identifier: Apache-2.0
"""The figures of each task: the only table keyed by task, for grids, reports, plots and console logs.

A new task is a row of ``TASKS`` and, if it logs its own figures, a row of ``PANELS``.
"""

import argparse
import importlib
import math
import re
from dataclasses import dataclass

NUMBER = r"\d{1,15}(?:\.\d{1,15})?"  # as printed in console logs
LARGEST = 1e300  # whole numbers in JSON may be larger than any float


@dataclass(frozen=True)
class Figure:
    """One figure of a task.

    Args:
        name: in the model zoo and on reproduction cards.
        title: of a column or an axis.
        key, place: its key in ``log.txt``, and its place in the list there (None: a number). No key: not logged.
    """

    name: str
    title: str
    key: str | None = None
    place: int | None = None

    def of(self, epoch: dict) -> float | None:
        """Its value in a line of ``log.txt``; None if it was not logged."""
        value = epoch.get(self.key) if self.key else None
        if isinstance(value, list):
            place = self.place or 0
            value = value[place] if place < len(value) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if abs(value) < LARGEST or value != value:  # NaN is kept
            return value
        return math.inf if value > 0 else -math.inf

    def text(self, value: float) -> str:
        """Percentages with two decimals, fractions with three, counts as integers."""
        return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if self.place is not None else f"{value:.2f}"


@dataclass(frozen=True)
class Task:
    """A package that trains.

    Args:
        title: of its published table.
        figures: the columns of its published table; the first is the one that ablations compare.
        evaluation: finds an evaluation in a console log; its groups are keys of ``log.txt``.
    """

    package: str
    title: str
    figures: tuple[Figure, ...]
    evaluation: re.Pattern

    @property
    def figure(self) -> Figure:
        """The figure that ablations compare."""
        return self.figures[0]

    def parser(self) -> argparse.ArgumentParser:
        """The parser of its training command."""
        return importlib.import_module(f"{self.package}.args").get_args_parser()


BY_SIZE = ("AP_small", "AP_medium", "AP_large")
COCO = ("AP", "AP50", "AP75", *BY_SIZE)
DETAILS = (*BY_SIZE, "macs_M", "buckets")  # not in the README's tables
TASKS = {
    task.package: task
    for task in (
        Task(
            package="deit_irpe",
            title="ImageNet-1K, 224 x 224, 300 epochs",
            figures=(
                Figure("acc1", "top-1 (%)", "test_acc1"),
                Figure("acc5", "top-5 (%)", "test_acc5"),
                Figure("params_M", "parameters (M)"),
                Figure("macs_M", "MACs (M)"),
                Figure("buckets", "buckets"),
            ),
            evaluation=re.compile(
                rf"\* Acc@1 (?P<test_acc1>{NUMBER}) Acc@5 (?P<test_acc5>{NUMBER})(?: loss (?P<test_loss>{NUMBER}))?"
            ),
        ),
        Task(
            package="detr_irpe",
            title="COCO 2017 val, boxes",
            figures=(
                *(Figure(name, name.replace("_", " "), "test_coco_eval_bbox", at) for at, name in enumerate(COCO)),
                Figure("n_parameters", "parameters"),
                Figure("buckets", "buckets"),
            ),
            evaluation=re.compile(
                r"Average Precision +\(AP\) @\[ IoU=0\.50:0\.95 \| area= +all \| maxDets=100 \] = "
                rf"(?P<test_coco_eval_bbox>-?{NUMBER})"
            ),
        ),
    )
}

# Curves: a panel's title, and its log keys for training and test. A panel without data is left out.
PANELS = (
    ("loss", "train_loss", "test_loss"),
    ("top-1 accuracy (%)", None, "test_acc1"),
    ("box AP", None, "test_coco_eval_bbox"),
    ("mask AP", None, "test_coco_eval_masks"),
    ("class error (%)", "train_class_error", "test_class_error"),
    ("box L1 loss", "train_loss_bbox", "test_loss_bbox"),
    ("GIoU loss", "train_loss_giou", "test_loss_giou"),
    ("learning rate", "train_lr", None),
)
