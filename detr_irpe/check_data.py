# SPDX-License-Identifier: Apache-2.0
"""``python -m detr_irpe.check_data --coco_path DIR``: find mistakes in a data set before training on it.

The same checks run whenever training starts, on a few images of each split (``quick_check``).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detr_irpe.args import get_check_parser
from detr_irpe.data.annotation_problems import (
    MOST,
    Found,
    annotation_problems,
    naming_problems,
    panoptic_problems,
    split_problems,
)
from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.image_problems import image_problems, mask_problem, segment_image_problems
from detr_irpe.data.panoptic import CocoPanoptic
from irpe_train.errors import RunError
from irpe_train.launch import launch
from irpe_train.logger import logger, set_up_logging

SAMPLE = 8  # images per split to check when training starts


def problems_of(
    dataset: CocoDetection | CocoPanoptic,
    num_classes: int | None = None,
    *,
    train: bool,
    masks: bool = False,
    max_bad: float = 0.001,
    only: Sequence[int] | None = None,
    num_workers: int = 0,
) -> Found:
    """The problems of a split.

    Args:
        num_classes: ids from this on have no logit; None skips this check.
        train: the set is for training, not only for evaluation.
        masks: masks are trained, or scored.
        max_bad: the fraction of a training set that may be unreadable.
        only: the indices of the images to check, as a sample; default: all.
        num_workers: processes that decode images.
    """
    known, path, checked = dataset.annotations, dataset.path, range(len(dataset)) if only is None else only
    unreadable = min(max_bad * len(dataset), MOST * len(checked)) if train else 0
    found = []
    if isinstance(dataset, CocoPanoptic):
        found += [(path, problem) for problem in panoptic_problems(dataset, num_classes, train=train)]
        found += [(path, problem) for problem in segment_image_problems(dataset, checked, unreadable)]
        if known is not None:
            found += naming_problems(dataset.categories, known.categories, path, known.path)
    else:
        how = dict(masks=masks, allowed=unreadable, num_workers=num_workers)
        found += [(path, problem) for problem in image_problems(known, dataset.images, checked, **how)]
        found += [(path, mask_problem(known, checked))] if known.without_mask is not None else []  # masks were read
    if known is not None:
        problems = annotation_problems(known, num_classes, train=train, masks=masks)
        found = [(known.path, problem) for problem in problems] + found
    return [(path, problem) for path, problem in found if problem.count]


def tell(found: Found) -> list[str]:
    """Log the problems, and return those that stop training."""
    for path, problem in found:
        logger.log(40 if problem.stops() else 30, f"{path.name}: {problem}")
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
        raise ValueError(f"{'; '.join(fatal)}. `python -m detr_irpe.check_data` shows everything.")


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
    fatal, sets = [], []
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
        fatal += tell(problems_of(dataset, args.num_classes, **options))
        sets.append(dataset)
    for other in sets[1:]:
        fatal += tell(split_problems(sets[0], other))
    logger.info("not ready for training: see the errors above" if fatal else "ready for training")
    return int(bool(fatal))


if __name__ == "__main__":
    launch(main, get_check_parser())
