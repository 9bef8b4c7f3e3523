# SPDX-License-Identifier: Apache-2.0
"""``irpe detect check --coco_path DIR``: find mistakes in a data set before training on it.

The same checks run whenever training starts, on a few images of each split (``quick_check``).
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detr_irpe.args import get_check_parser
from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.data.problems import Found, problems_of, split_problems
from irpe_train.errors import RunError
from irpe_train.launch import launch
from irpe_train.logger import logger, set_up_logging

SAMPLE = 8  # images per split to check when training starts


def tell(found: Found) -> list[str]:
    """Log the problems, and return those that stop training."""
    for path, problem in found:
        logger.log(logging.ERROR if problem.stops() else logging.WARNING, f"{path.name}: {problem}")
    return [f"{path}: {problem}" for path, problem in found if problem.stops()]


def quick_check(sets: Sequence[CocoDetection | CocoPanoptic], num_classes: int, max_bad: float = 0.001) -> None:
    """Stop if the data cannot be trained on; warn about other problems.

    Args:
        sets: the validation set, then the training set if there is one.
        num_classes, max_bad: as for ``problems_of``.
    Raises: ValueError: what is wrong, how often, and where first.
    """
    found = []
    for dataset, train in zip(sets, (False, True), strict=False):
        only = np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).astype(int).tolist()
        how = dict(masks=dataset.return_masks, max_bad=max_bad, only=only)
        found += problems_of(dataset, num_classes, train=train, **how)
    if len(sets) == 2:
        val, train = sets
        found += split_problems(train, val)
    if fatal := tell(found):
        raise ValueError(f"{'; '.join(fatal)}. `irpe detect check` shows all, given the same flags (such as --masks).")


def summary_of(dataset: CocoDetection | CocoPanoptic) -> str:
    """One line of counts."""
    if isinstance(dataset, CocoPanoptic):
        empty, objects = "", f"{len(dataset.labels):,} segments"
    else:
        empty = f" ({len(dataset) - len(dataset.annotations.image_of_object().unique()):,} without objects)"
        objects = f"{len(dataset.annotations.labels):,} objects"
    classes = f"{len(dataset.categories)} categories, largest id {max(dataset.categories)}"
    return f"{dataset.path.stem}: {len(dataset):,} images{empty}, {objects}, {classes}"


def main(args: argparse.Namespace) -> int:
    """Check both splits; returns the exit status: 0 if training can start."""
    set_up_logging(0)
    root, panoptic_root = Path(args.coco_path), args.coco_panoptic_path and Path(args.coco_panoptic_path)
    fatal, sets, pictures = [], [], {}
    for split in args.splits:
        train = split.startswith("train")
        try:
            if panoptic_root:
                instances = None if train else root / "annotations" / f"instances_{split}.json"
                dataset = CocoPanoptic(root, panoptic_root, split, None, return_masks=args.masks, instances=instances)
            else:
                dataset = CocoDetection(root, split, None, return_masks=True)  # masks are always checked
        except (OSError, ValueError, RunError) as error:
            fatal.append(str(error))
            logger.error(str(error))
            continue
        logger.info(summary_of(dataset))
        options = dict(train=train, masks=args.masks, max_bad=args.max_bad, num_workers=args.num_workers)
        fatal += tell(problems_of(dataset, args.num_classes, pictures=pictures, **options))
        sets.append(dataset)
    for other in sets[1:]:
        fatal += tell(split_problems(sets[0], other))
    logger.info("not ready for training: see the errors above" if fatal else "ready for training")
    return int(bool(fatal))


if __name__ == "__main__":
    launch(main, get_check_parser())
