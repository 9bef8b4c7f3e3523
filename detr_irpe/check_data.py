# SPDX-License-Identifier: Apache-2.0
"""``python -m detr_irpe.check_data --coco_path DIR``: what is wrong with a data set, before hours are spent on it.

The same checks, on a few images of each split instead of all, run at every start of training (``quick_check``).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr_irpe.args import get_check_parser
from detr_irpe.classes import same_name
from detr_irpe.data.annotations import Annotations
from detr_irpe.data.coco import CocoDetection, read_image
from detr_irpe.data.image_files import open_images
from detr_irpe.data.panoptic import CocoPanoptic
from irpe_train.distributed import logger, set_up_logging
from irpe_train.errors import RunError
from irpe_train.launch import launch
from irpe_train.pixels import is_turned

TOLERATED = 0.001  # COCO itself has two empty boxes among 860,001; training drops such boxes
SAMPLE = 8  # images of a split that a start of training looks at
ALL = float("inf")
FRACTIONS = 0.9  # of all boxes within one pixel: then they are no pixels


@dataclass
class Problem:
    """One kind of mistake: what it is, how often, and the first few places.

    Attributes:
        fatal: training cannot go on.
        tolerated: the fraction of all objects above which ``check_data`` refuses what is not fatal.
        skipped: training leaves such an image out and goes on, as long as there are few (``--max-bad``).
    """

    what: str
    count: int = 0
    places: list[str] = field(default_factory=list)
    fatal: bool = True
    tolerated: float = TOLERATED
    skipped: bool = False

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < 3:
            self.places.append(place)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.what}: {self.count}" + (f" ({', '.join(self.places)}{more})" if self.places else "")


def annotation_problems(
    annotations: Annotations, num_classes: int | None = None, *, train: bool = True, masks: bool = False
) -> list[Problem]:
    """What can be seen without opening an image.

    Args:
        num_classes: ids from this on have no logit; None does not look.
        train: the set is learned from, and not only evaluated on.
        masks: masks are trained, or scored.
    """
    boxes, labels = annotations.boxes, annotations.labels
    owner = annotations.image_of_object()
    x, y, width, height = boxes.unbind(1)
    image_height, image_width = annotations.sizes[owner].unbind(1)
    sized = image_height > 0
    outside = sized & ((x < -1) | (y < -1) | (x + width > image_width + 1) | (y + height > image_height + 1))

    def boxes_that(what: str, bad: Tensor, **how) -> Problem:
        return Problem(
            what, int(bad.sum()), [annotations.place_of_object(i) for i in bad.nonzero()[:3, 0].tolist()], **how
        )

    lost = sized & ((x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0))
    learnable = (width > 0) & (height > 0) & ~lost & (annotations.iscrowd == 0)
    fractions = len(boxes) > 0 and ((boxes >= 0) & (boxes <= 1)).all(1).float().mean() >= FRACTIONS
    objects = list(zip(owner.tolist(), labels.tolist(), map(tuple, boxes.tolist()), strict=True))
    found = [
        *class_problems(labels, num_classes),
        Problem("boxes that look like fractions of the image; pixels are wanted", len(boxes) if fractions else 0),
        boxes_that("boxes with a negative side, which are dropped", (width < 0) | (height < 0), fatal=False),
        boxes_that("empty boxes, which are dropped", torch.minimum(width, height) == 0, fatal=False),
        boxes_that("boxes that reach outside their image, and are clipped to it", outside, fatal=False),
        repeated("file names", [name.decode() for name in annotations.names]),
        repeated("objects (same image, category and box)", objects, fatal=False),
        nothing_to_learn(int(learnable.sum()), len(annotations), train),
        *(mask_problems(annotations) if masks else ()),
    ]
    return [problem for problem in found if problem.count]


def mask_problems(annotations: Annotations) -> list[Problem]:
    """What masks need, and boxes do without."""
    unsized = annotations.unsized()
    return [
        Problem("objects without a mask, and --masks needs one for each", annotations.without_mask or 0),
        Problem("images without height and width, and --masks needs them", len(unsized), unsized[:3]),
    ]


def panoptic_problems(dataset: CocoPanoptic, num_classes: int | None = None, *, train: bool = True) -> list[Problem]:
    """The same for a panoptic set, whose segments are objects too."""
    known = set() if dataset.annotations is None else set(dataset.annotations.image_ids.tolist())
    unknown = [str(i) for i in dataset.image_ids.tolist() if i not in known] if dataset.annotations is not None else []
    scored_by = dataset.annotations.path.name if dataset.annotations is not None else ""
    found = [
        *class_problems(dataset.labels, num_classes),
        nothing_to_learn(int((dataset.iscrowd == 0).sum()), len(dataset), train),
        Problem(f"images that {scored_by} does not list, and boxes are scored by it", len(unknown), unknown[:3]),
    ]
    return [problem for problem in found if problem.count]


def class_problems(labels: Tensor, num_classes: int | None) -> list[Problem]:
    """Category ids that the class head has no output for."""
    beyond = labels[labels >= (num_classes if num_classes is not None else torch.iinfo(torch.int64).max)]
    ids = [str(i) for i in beyond.unique().tolist()]
    return [Problem(f"category ids out of range (0 to {(num_classes or 0) - 1})", len(beyond), ids[:3])]


def nothing_to_learn(objects: int, images: int, train: bool) -> Problem:
    """A set without one object that is no crowd, and whose box is inside its image."""
    if not images:
        return Problem("no images", 1)
    if train:
        return Problem("images, and not one object to learn: all are crowds or without a box", 0 if objects else images)
    return Problem(
        "images, and not one object to find: AP will be -1", 0 if objects else images, fatal=False, tolerated=ALL
    )


def naming_problems(train: dict[int, str], val: dict[int, str], train_name: str, val_name: str) -> list[Problem]:
    """Categories that the two annotation files call by different names or ids: what is learned is scored wrong."""
    other = Problem("category ids that stand for something else in training and in validation")
    new = Problem(f"categories of {val_name} that {train_name} does not list", fatal=False, tolerated=ALL)
    for i, name in val.items():
        elsewhere = [j for j, other_name in train.items() if same_name(other_name, name)]
        if i in train and not same_name(train[i], name):
            other.add(f"{i} is {train[i]!r} in {train_name} and {name!r} in {val_name}")
        elif i not in train and elsewhere:
            other.add(f"{name!r} is {elsewhere[0]} in {train_name} and {i} in {val_name}")
        elif i not in train:
            new.add(f"{i} {name!r}")
    return [problem for problem in (other, new) if problem.count]


def image_problems(
    annotations: Annotations, images, num_workers: int = 0, *, masks: bool = False, only: Sequence[int] | None = None
) -> list[Problem]:
    """What shows when images are decoded: missing and unreadable files, sizes other than annotated, turned photos.

    Args:
        masks: they are read, and have the annotated size.
        only: the numbers of the images to look at; all by default.
    """
    missing = Problem("missing images", len(images.missing), images.missing[:3])
    unreadable = Problem("unreadable images", skipped=True)
    other_size = Problem("images of another size than annotated", fatal=masks)
    turned = Problem("photos that are read as stored and shown turned (EXIF)", fatal=False, tolerated=ALL)
    absent, only = set(images.missing), range(len(annotations)) if only is None else only
    generator = torch.Generator()  # its own: a check that drew from torch's would change the run that it precedes
    data = _Decoded(annotations, images, only)
    decoded = DataLoader(data, batch_size=None, num_workers=num_workers, generator=generator)
    for index, (height, width, other, error) in zip(only, decoded, strict=True):
        name, wanted = annotations.names[index].decode(), annotations.sizes[index].tolist()
        if name in absent:
            continue
        if error:
            unreadable.add(error)
        elif 0 not in wanted and wanted != [height, width]:
            other_size.add(f"{name} is {height} x {width}, annotated {wanted[0]} x {wanted[1]}")
        elif other:
            turned.add(name)
    return [problem for problem in (missing, unreadable, other_size, turned) if problem.count]


def segment_image_problems(dataset: CocoPanoptic, only: Sequence[int] | None = None) -> list[Problem]:
    """Segment images that cannot be read, or do not fit their image or ``segments_info``."""
    unreadable = Problem("unreadable segment images", skipped=True)
    other_size = Problem("segment images of another size than their image")
    unlisted = Problem("segment images with ids that 'segments_info' does not list")
    for index in range(len(dataset)) if only is None else only:
        name = dataset.segment_images.describe(index)
        try:
            ids, segments = dataset.truth(index)
            image = read_image(dataset.images, index)
        except OSError as error:
            unreadable.add(str(error))
            continue
        if ids.shape != (image.height, image.width):
            other_size.add(f"{name} is {ids.shape[0]} x {ids.shape[1]}, not {image.height} x {image.width}")
        if set(np.unique(ids).tolist()) - {0} - {segment["id"] for segment in segments}:
            unlisted.add(name)
    return [problem for problem in (unreadable, other_size, unlisted) if problem.count]


def quick_check(sets: Sequence[CocoDetection | CocoPanoptic], num_classes: int) -> None:
    """Stop on data that cannot be trained on; warn of the rest.

    Args:
        sets: the validation set, then the training set if there is one.
    Raises: ValueError: what is wrong, how often, and the first places.
    """
    found = []
    for dataset, train in zip(sets, (False, True), strict=False):
        only = np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).astype(int).tolist()
        if isinstance(dataset, CocoPanoptic):
            problems = panoptic_problems(dataset, num_classes, train=train)
            of_files = segment_image_problems(dataset, only)
        else:
            known, masks = dataset.annotations, dataset.return_masks
            problems = annotation_problems(known, num_classes, train=train, masks=masks)
            of_files = image_problems(known, dataset.images, masks=masks, only=only)
        for problem in of_files:
            problem.fatal &= not (train and problem.skipped and problem.count < len(only))
        found += [(dataset.path, problem) for problem in problems + of_files]
    if len(sets) == 2:
        val, train = sets
        named = naming_problems(train.categories, val.categories, train.path.name, val.path.name)
        found += [(train.path, problem) for problem in named]
    for path, problem in found:
        logger.log(40 if problem.fatal else 30, f"{path}: {problem}")
    if fatal := [f"{path}: {problem}" for path, problem in found if problem.fatal]:
        raise ValueError(f"{'; '.join(fatal)}. `python -m detr_irpe.check_data` tells all.")


def check_split(
    root: Path,
    split: str,
    *,
    num_classes: int | None = None,
    masks: bool = False,
    train: bool = True,
    num_workers: int = 0,
) -> tuple[dict[int, str], list[Problem], str]:
    """Everything about one split: its categories, what is wrong, and a line that sums it up."""
    annotations = Annotations(root / "annotations" / f"instances_{split}.json", with_masks=True)
    images = open_images(root, split, [name.decode() for name in annotations.names])
    problems = annotation_problems(annotations, num_classes, train=train, masks=masks)
    problems += image_problems(annotations, images, num_workers, masks=masks)
    objects = len(annotations.boxes)
    for problem in problems:
        problem.fatal |= problem.count > problem.tolerated * objects
    empty = int((torch.bincount(annotations.image_of_object(), minlength=len(annotations)) == 0).sum())
    summary = (
        f"{split}: {len(annotations):,} images ({empty:,} without objects), {objects:,} objects, "
        f"{len(annotations.categories)} categories, largest id {max(annotations.categories)}"
    )
    return annotations.categories, problems, summary


def check_panoptic_split(
    root: Path, panoptic_root: Path, split: str, *, num_classes: int | None = None, train: bool = True
) -> tuple[dict[int, str], list[Problem], str]:
    """The same for a panoptic set."""
    instances = None if train else root / "annotations" / f"instances_{split}.json"
    dataset = CocoPanoptic(root, panoptic_root, split, None, instances=instances)
    problems = panoptic_problems(dataset, num_classes, train=train) + segment_image_problems(dataset)
    summary = f"panoptic {split}: {len(dataset):,} images, {len(dataset.labels):,} segments"
    return dataset.categories, problems, summary


def main(args: argparse.Namespace) -> int:
    """Check both splits; returns the exit status: 0 when training can start."""
    set_up_logging(0)
    root, panoptic_root = Path(args.coco_path), args.coco_panoptic_path and Path(args.coco_panoptic_path)
    failed = False

    def told(problems: list[Problem], file: str) -> None:
        nonlocal failed
        for problem in problems:
            logger.log(40 if problem.fatal else 30, f"{file}: {problem}")
            failed |= problem.fatal

    for kind in ("instances", "panoptic") if panoptic_root else ("instances",):
        seen: dict[str, dict[int, str]] = {}
        for split in args.splits:
            file, train = f"{kind}_{split}.json", split.startswith("train")
            if panoptic_root and kind == "instances" and train and not (root / "annotations" / file).is_file():
                continue  # panoptic training does without it
            options = {"num_classes": args.num_classes, "train": train}
            try:
                if kind == "panoptic":
                    seen[file], problems, summary = check_panoptic_split(root, panoptic_root, split, **options)
                else:
                    options |= {"masks": args.masks, "num_workers": args.num_workers}
                    seen[file], problems, summary = check_split(root, split, **options)
            except (OSError, ValueError, RunError) as error:
                failed = True
                logger.error(str(error))
                continue
            logger.info(summary)
            told(problems, file)
        (first, names), *others = seen.items() or {"": {}}.items()
        for other, other_names in others:
            told(naming_problems(names, other_names, first, other), first)
    logger.info("not ready for training: see the errors above" if failed else "ready for training")
    return int(failed)


class _Decoded(Dataset):
    """Height and width of an image as training reads it, whether people see it turned, or why it cannot be read."""

    def __init__(self, annotations: Annotations, images, only: Sequence[int]) -> None:
        self.annotations, self.images, self.only = annotations, images, only

    def __len__(self) -> int:
        return len(self.only)

    def __getitem__(self, number: int) -> tuple[int, int, bool, str]:
        index = self.only[number]
        try:
            image = read_image(self.images, index, self.annotations.sizes[index].tolist())
        except OSError as error:
            return 0, 0, False, str(error)
        return image.height, image.width, is_turned(image), ""


def repeated(what: str, values: list, *, fatal: bool = True) -> Problem:
    """Values that come more than once."""
    seen, problem = set(), Problem(f"duplicate {what}", fatal=fatal)
    for value in values:
        if value in seen:
            problem.add(str(value))
        seen.add(value)
    return problem


if __name__ == "__main__":
    launch(main, get_check_parser())
