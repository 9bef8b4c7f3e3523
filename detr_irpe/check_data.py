# SPDX-License-Identifier: Apache-2.0
"""``python -m detr_irpe.check_data --coco_path DIR``: find what is wrong with a data set before training on it.

The same checks, on a few images of each split instead of all, run at every start of training (``quick_check``).
"""

import argparse
import filecmp
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr_irpe.args import get_check_parser
from detr_irpe.classes import plain_name, same_name
from detr_irpe.data.annotations import Annotations
from detr_irpe.data.coco import CocoDetection, read_image
from detr_irpe.data.image_files import FilesInFolder, FilesInZip
from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.data.segmentations import box_of_mask
from irpe_train.distributed import logger, set_up_logging
from irpe_train.errors import RunError
from irpe_train.launch import launch
from irpe_train.pixels import is_turned

MOST = 0.5  # the part of wrong boxes or images that stops training; fewer, which COCO has too, are dropped
SAMPLE = 8  # images of a split that a start of training looks at
FRACTIONS = 0.9  # if this part of all boxes lies within one pixel, the unit is not pixels
CORNERS = 0.1  # if this part of boxes reaches outside, and all could be two corners, they are


@dataclass
class Problem:
    """One kind of mistake: what it is, how often, and the first few places.

    Attributes:
        allowed: how often it may come before training does not start.
    """

    what: str
    count: int = 0
    places: list[str] = field(default_factory=list)
    allowed: float = 0

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < 3:
            self.places.append(place)

    def stops(self) -> bool:
        return self.count > self.allowed

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.what}: {self.count}" + (f" ({', '.join(self.places)}{more})" if self.places else "")


Found = list[tuple[Path, Problem]]  # each with the file that it is in


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
    """What is wrong with a split.

    Args:
        num_classes: ids from this on have no logit; None does not look.
        train: the set is for training, not only for evaluation.
        masks: masks are trained, or scored.
        max_bad: the part of a training set that may be unreadable.
        only: the numbers of the images to look at, a sample of them; all by default.
        num_workers: processes that decode images.
    """
    known, path, looked_at = dataset.annotations, dataset.path, range(len(dataset)) if only is None else only
    unreadable = min(max_bad * len(dataset), MOST * len(looked_at)) if train else 0
    found = []
    if isinstance(dataset, CocoPanoptic):
        found += [(path, problem) for problem in panoptic_problems(dataset, num_classes, train=train)]
        found += [(path, problem) for problem in segment_image_problems(dataset, looked_at, unreadable)]
        if known is not None:
            found += naming_problems(dataset.categories, known.categories, path, known.path)
    else:
        how = dict(masks=masks, allowed=unreadable, num_workers=num_workers)
        found += [(path, problem) for problem in image_problems(known, dataset.images, looked_at, **how)]
        found += [(path, mask_problem(known, looked_at))] if known.without_mask is not None else []  # masks were read
    if known is not None:
        problems = annotation_problems(known, num_classes, train=train, masks=masks)
        found = [(known.path, problem) for problem in problems] + found
    return [(path, problem) for path, problem in found if problem.count]


def annotation_problems(
    annotations: Annotations, num_classes: int | None = None, *, train: bool = True, masks: bool = False
) -> list[Problem]:
    """The problems that show without opening an image."""
    boxes, labels = annotations.boxes, annotations.labels
    owner = annotations.image_of_object()
    x, y, width, height = boxes.unbind(1)
    image_height, image_width = annotations.sizes[owner].unbind(1)
    sized = (image_height > 0) & (image_width > 0)
    outside = sized & ((x < -1) | (y < -1) | (x + width > image_width + 1) | (y + height > image_height + 1))
    lost = sized & ((x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0))
    learnable = (width > 0) & (height > 0) & ~lost & (annotations.iscrowd == 0)
    fractions = len(boxes) > 0 and ((boxes >= 0) & (boxes <= 1)).all(1).float().mean() >= FRACTIONS
    as_corners = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    as_corners &= (width <= image_width + 1) & (height <= image_height + 1)
    corners = len(boxes) > 0 and as_corners.all() and outside.float().mean() >= CORNERS
    rows = np.column_stack([owner, labels, boxes])
    order = np.lexsort(rows.T)  # equal rows are neighbours, in the order of the file
    again = torch.zeros(len(rows), dtype=torch.bool)
    again[order[1:][(rows[order[1:]] == rows[order[:-1]]).all(1)]] = True
    names = Counter(name.decode() for name in annotations.names)
    twice = [name for name, count in names.items() if count > 1]
    unsized = annotations.unsized() if masks else []
    called = Counter(map(plain_name, annotations.categories.values()))
    shared = [name for name, count in called.items() if count > 1]

    def boxes_that(what: str, bad: Tensor) -> Problem:
        places = [annotations.place_of_object(i) for i in bad.nonzero()[:3, 0].tolist()]
        return Problem(what, int(bad.sum()), places, MOST * len(boxes))

    return [
        *class_problems(labels, num_classes),
        Problem("boxes that look like fractions of the image; pixels are wanted", len(boxes) if fractions else 0),
        Problem("boxes that look like two corners; x, y, width, height are wanted", len(boxes) if corners else 0),
        Problem("names that several categories have", len(shared), shared[:3], allowed=math.inf),
        boxes_that("objects with a negative area, which are not scored", annotations.area < 0),
        boxes_that("boxes with a negative side, which are dropped", (width < 0) | (height < 0)),
        boxes_that("empty boxes, which are dropped", torch.minimum(width, height) == 0),
        boxes_that("boxes that reach outside their image, and are clipped to it", outside),
        Problem("duplicate file names", len(annotations) - len(names), twice[:3]),
        boxes_that("duplicate objects (same image, category and box)", again),
        nothing_to_learn(int(learnable.sum()), len(annotations), train),
        Problem("objects without a mask, and --masks needs one for each", masks and annotations.without_mask or 0),
        Problem("images without height and width, and --masks needs them", len(unsized), unsized[:3]),
    ]


def panoptic_problems(dataset: CocoPanoptic, num_classes: int | None = None, *, train: bool = True) -> list[Problem]:
    """The same for a panoptic set, whose segments are objects too."""
    known = dataset.annotations
    listed = set() if known is None else set(known.image_ids.tolist())
    unknown = [] if known is None else [str(i) for i in dataset.image_ids.tolist() if i not in listed]
    return [
        *class_problems(dataset.labels, num_classes),
        nothing_to_learn(int((dataset.iscrowd == 0).sum()), len(dataset), train),
        Problem(
            f"images that {known and known.path.name} does not list, and boxes are scored by it",
            len(unknown),
            unknown[:3],
        ),
    ]


def class_problems(labels: Tensor, num_classes: int | None) -> list[Problem]:
    """Category ids that the class head has no output for."""
    beyond = labels[labels >= (num_classes if num_classes is not None else torch.iinfo(torch.int64).max)]
    ids = [str(i) for i in beyond.unique().tolist()]
    return [Problem(f"category ids out of range (0 to {(num_classes or 0) - 1})", len(beyond), ids[:3])]


def nothing_to_learn(objects: int, images: int, train: bool) -> Problem:
    """A set in which every object is a crowd or has no box inside its image."""
    if not images:
        return Problem("no images", 1)
    if train:
        return Problem("images without one object to learn (all are crowds or have no box)", 0 if objects else images)
    return Problem("images without one object to find: AP will be -1", 0 if objects else images, allowed=math.inf)


def split_problems(train: CocoDetection | CocoPanoptic, val: CocoDetection | CocoPanoptic) -> Found:
    """What is wrong between two splits: other names, or one file for both."""
    same = Problem(f"the very annotations of {val.path.name}: figures on images that are trained on", allowed=math.inf)
    same.count = int(filecmp.cmp(train.path, val.path, shallow=False))
    found = naming_problems(train.categories, val.categories, train.path, val.path)
    return [(train.path, same)] * same.count + found


def naming_problems(ours: dict[int, str], theirs: dict[int, str], our_file: Path, their_file: Path) -> Found:
    """Categories with different names or ids in two files: right answers would be scored as wrong."""
    first, second = our_file.name, their_file.name
    other = Problem(f"category ids that stand for something else in {second}")
    new = Problem(f"categories of {second} that {first} does not list", allowed=math.inf)
    for i, name in theirs.items():
        elsewhere = [j for j, other_name in ours.items() if same_name(other_name, name)]
        if i in ours and not same_name(ours[i], name):
            other.add(f"{i} is {ours[i]!r} in {first} and {name!r} in {second}")
        elif i not in ours and elsewhere:
            other.add(f"{name!r} is {elsewhere[0]} in {first} and {i} in {second}")
        elif i not in ours:
            new.add(f"{i} {name!r}")
    return [(our_file, problem) for problem in (other, new) if problem.count]


def image_problems(
    annotations: Annotations,
    images: FilesInFolder | FilesInZip,
    looked_at: Sequence[int],
    *,
    masks: bool,
    allowed: float,
    num_workers: int,
) -> list[Problem]:
    """The problems that show when images are decoded: unreadable files, other sizes than annotated, turned photos."""
    unreadable = Problem("unreadable images", allowed=allowed)
    other_size = Problem("images of another size than annotated", allowed=0 if masks else MOST * len(looked_at))
    turned = Problem("photos that are read as stored and shown turned (EXIF)", allowed=math.inf)
    generator = torch.Generator()  # its own, so that the check does not change the run that follows
    data = _Decoded(annotations, images, looked_at)
    decoded = DataLoader(data, batch_size=None, num_workers=num_workers, generator=generator)
    for index, (height, width, other, error) in zip(looked_at, decoded, strict=True):
        name, wanted = annotations.names[index].decode(), annotations.sizes[index].tolist()
        if error:
            unreadable.add(error)
        elif 0 not in wanted and wanted != [height, width]:
            other_size.add(f"{name} is {height} x {width}, annotated {wanted[0]} x {wanted[1]}")
        elif other:
            turned.add(name)
    return [unreadable, other_size, turned]


def mask_problem(annotations: Annotations, looked_at: Sequence[int]) -> Problem:
    """Masks beside the box of their object: in fractions, of another scale, of another object, or empty."""
    beside = Problem("masks that do not meet the box of their object", allowed=1)
    for index in looked_at:
        size, objects = annotations.sizes[index].tolist(), annotations.of_image(index)
        shapes = annotations.segmentations_of_image(index)
        for box, number, shape in zip(objects["boxes"].tolist(), objects["ids"].tolist(), shapes, strict=True):
            if shape:
                beside.allowed += MOST
                mask = box_of_mask(shape, *size)
                low, high = (
                    [max(mask[i], box[i]) for i in (0, 1)],
                    [min(b[i] + b[i + 2] for b in (mask, box)) for i in (0, 1)],
                )
                if low[0] >= high[0] or low[1] >= high[1]:
                    beside.add(f"annotation {number} of {annotations.names[index].decode()}")
    return beside


def segment_image_problems(dataset: CocoPanoptic, looked_at: Sequence[int], allowed: float) -> list[Problem]:
    """Segment images that cannot be read, or do not fit their image or ``segments_info``."""
    unreadable = Problem("unreadable segment images", allowed=allowed)
    other_size = Problem("segment images of another size than their image")
    unlisted = Problem("segment images with ids that 'segments_info' does not list")
    absent = Problem("segments that 'segments_info' lists and no pixel has")
    for index in looked_at:
        name = dataset.segment_images.name(index)
        try:
            ids, segments = dataset.truth(index)
            image = read_image(dataset.images, index)
        except OSError as error:
            unreadable.add(str(error))
            continue
        if ids.shape != (image.height, image.width):
            other_size.add(f"{name} is {ids.shape[0]} x {ids.shape[1]}, not {image.height} x {image.width}")
        seen, listed = set(np.unique(ids).tolist()) - {0}, {segment["id"] for segment in segments}
        absent.allowed += MOST * len(listed)
        for segment_id in sorted(listed - seen):
            absent.add(f"{segment_id} of {name}")
        if seen - listed:
            unlisted.add(name)
    return [unreadable, other_size, unlisted, absent]


def tell(found: Found) -> list[str]:
    """Log what was found, and return what stops training."""
    for path, problem in found:
        logger.log(40 if problem.stops() else 30, f"{path.name}: {problem}")
    return [f"{path}: {problem}" for path, problem in found if problem.stops()]


def quick_check(sets: Sequence[CocoDetection | CocoPanoptic], num_classes: int, max_bad: float = 0.001) -> None:
    """Stop on data that cannot be trained on; warn of the rest.

    Args:
        sets: the validation set, then the training set if there is one.
        num_classes, max_bad: as for ``problems_of``.
    Raises: ValueError: what is wrong, how often, and the first places.
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
    """One line of numbers."""
    if isinstance(dataset, CocoPanoptic):
        empty, objects = "", f"{len(dataset.labels):,} segments"
    else:
        empty = f" ({len(dataset) - len(dataset.annotations.image_of_object().unique()):,} without objects)"
        objects = f"{len(dataset.annotations.labels):,} objects"
    classes = f"{len(dataset.categories)} categories, largest id {max(dataset.categories)}"
    return f"{dataset.path.stem}: {len(dataset):,} images{empty}, {objects}, {classes}"


def main(args: argparse.Namespace) -> int:
    """Check both splits; returns the exit status: 0 when training can start."""
    set_up_logging(0)
    root, panoptic_root = Path(args.coco_path), args.coco_panoptic_path and Path(args.coco_panoptic_path)
    fatal, sets = [], []
    for split in args.splits:
        train = split.startswith("train")
        try:
            if panoptic_root:
                instances = None if train else root / "annotations" / f"instances_{split}.json"
                how = dict(return_masks=args.masks, instances=instances)
                dataset = CocoPanoptic(root, panoptic_root, split, None, **how)
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


class _Decoded(Dataset):
    """Height and width of an image as training reads it, whether viewers show it turned, or why it cannot be read."""

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


if __name__ == "__main__":
    launch(main, get_check_parser())
