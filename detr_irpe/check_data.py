"""``python -m detr_irpe.check_data --coco_path DIR``: what is wrong with a data set, before hours are spent on it.

A quick version, which reads no image, runs at every start of training.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr_irpe.data.annotations import Annotations
from detr_irpe.data.coco import read_image
from detr_irpe.data.image_files import open_images
from detr_irpe.data.panoptic import CocoPanoptic
from irpe_train.arguments import nonnegative_int, positive_int
from irpe_train.distributed import logger, set_up_logging

TOLERATED_BOXES = 0.001  # COCO itself has two empty boxes among 860,001; training drops such boxes


@dataclass
class Problem:
    """One kind of mistake: what it is, how often, and the first few places. ``fatal``: training cannot go on."""

    what: str
    count: int
    places: list[str]
    fatal: bool = True

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.what}: {self.count} ({', '.join(self.places)}{more})"


def annotation_problems(annotations: Annotations, num_classes: int | None = None) -> list[Problem]:
    """What can be seen without opening an image.

    Args:
        num_classes: ids from this on have no logit; None does not look.
    """
    boxes, labels, ids = annotations.boxes, annotations.labels, annotations.ids
    owner = annotations.image_of_object()
    x, y, width, height = boxes.unbind(1)
    image_height, image_width = annotations.sizes[owner].float().unbind(1)
    sized = image_height > 0
    known = torch.isin(labels, torch.tensor(list(annotations.categories)))
    beyond = (labels < 0) | (labels >= (num_classes if num_classes is not None else torch.iinfo(torch.int64).max))
    outside = sized & ((x < -1) | (y < -1) | (x + width > image_width + 1) | (y + height > image_height + 1))
    finite = boxes.isfinite().all(1)

    def at(bad: Tensor) -> list[str]:
        return [
            f"annotation {int(ids[i])} of image {int(annotations.image_ids[owner[i]])}: "
            f"bbox {[round(v, 2) for v in boxes[i].tolist()]}, category {int(labels[i])}"
            for i in bad.nonzero().flatten()[:3].tolist()
        ]

    found = [
        Problem("boxes that are not finite", int((~finite).sum()), at(~finite)),
        Problem("category ids that 'categories' does not list", int((~known).sum()), at(~known)),
        Problem(f"category ids out of range (0 to {(num_classes or 0) - 1})", int(beyond.sum()), at(beyond)),
        *(
            Problem(what, int(bad.sum()), at(bad), fatal=False)
            for what, bad in (
                ("boxes with a negative side", finite & ((width < 0) | (height < 0))),
                ("empty boxes", finite & (torch.minimum(width, height) == 0)),
                ("boxes that reach outside their image", finite & outside),
            )
        ),
        _repeated("image ids", annotations.image_ids.tolist()),
        _repeated("file names", [name.decode() for name in annotations.names]),
        _repeated("annotation ids", ids.tolist()),
        Problem("annotations of images that the file does not list", annotations.unplaced, []),
    ]
    twice = _repeated(
        "objects (same image, category and box)",
        list(zip(owner.tolist(), labels.tolist(), map(tuple, boxes.tolist()), strict=True)),
    )
    twice.fatal = False
    return [problem for problem in [*found, twice] if problem.count]


def quick_check(dataset, num_classes: int) -> None:
    """Stop on annotations that cannot be trained on; warn of boxes that will be dropped or clipped.

    Raises: ValueError: what is wrong, how often, and the first places.
    """
    if not hasattr(dataset, "annotations"):
        return
    problems = annotation_problems(dataset.annotations, num_classes)
    path = dataset.annotations.path
    for problem in problems:
        if not problem.fatal:
            logger.warning(f"{path}: {problem}; such boxes are clipped to the image, and dropped when empty")
    if fatal := [str(problem) for problem in problems if problem.fatal]:
        raise ValueError(f"{path}: {'; '.join(fatal)}. `python -m detr_irpe.check_data` tells all.")


def image_problems(annotations: Annotations, images, num_workers: int = 0) -> list[Problem]:
    """What shows when every image is decoded: files that are missing or unreadable, sizes other than annotated."""
    missing = Problem("missing images", len(images.missing), images.missing[:3])
    unreadable = Problem("unreadable images", 0, [])
    other_size = Problem("images of another size than annotated", 0, [])
    absent = set(images.missing)
    for index, (height, width, error) in enumerate(_decoded(images, len(annotations), num_workers)):
        name = annotations.names[index].decode()
        if name in absent:
            continue
        wanted = annotations.sizes[index].tolist()
        if error:
            _add(unreadable, error)
        elif 0 not in wanted and wanted != [height, width]:
            _add(other_size, f"{name} is {height} x {width}, annotated {wanted[0]} x {wanted[1]}")
    return [problem for problem in (missing, unreadable, other_size) if problem.count]


def check_split(root: Path, split: str, num_classes: int | None, num_workers: int) -> tuple[list[Problem], str]:
    """Everything about one split, and a line that sums it up."""
    annotations = Annotations(root / "annotations" / f"instances_{split}.json")
    images = open_images(root, split, [name.decode() for name in annotations.names])
    problems = annotation_problems(annotations, num_classes) + image_problems(annotations, images, num_workers)
    limit = TOLERATED_BOXES * len(annotations.boxes)
    for problem in problems:
        problem.fatal |= problem.count > limit
    empty = int((torch.bincount(annotations.image_of_object(), minlength=len(annotations)) == 0).sum())
    return problems, (
        f"{split}: {len(annotations):,} images ({empty:,} without objects), {len(annotations.boxes):,} "
        f"objects, {len(annotations.categories)} categories, largest id {max(annotations.categories)}"
    )


def panoptic_problems(dataset: CocoPanoptic) -> list[Problem]:
    """Segments of the annotation file and of its images that do not fit each other; reads every segment image."""
    unreadable, other_size, unknown = (
        Problem(what, 0, [])
        for what in (
            "unreadable segment images",
            "segment images of another size than their image",
            "categories of segments that 'categories' does not list",
        )
    )
    unlisted = Problem("segment images with ids that 'segments_info' does not list", 0, [])
    for index in range(len(dataset)):
        name = dataset.segment_images.describe(index)
        try:
            ids, segments = dataset.truth(index)
            image = read_image(dataset.images, index)
        except OSError as error:
            _add(unreadable, str(error))
            continue
        if ids.shape != (image.height, image.width):
            _add(other_size, f"{name} is {ids.shape[0]} x {ids.shape[1]}, not {image.height} x {image.width}")
        if set(np.unique(ids).tolist()) - {0} - {segment["id"] for segment in segments}:
            _add(unlisted, name)
        for segment in segments:
            if segment["category_id"] not in dataset.categories:
                _add(unknown, f"{name}: {segment['category_id']}")
    return [problem for problem in (unreadable, other_size, unlisted, unknown) if problem.count]


def main(argv: list[str] | None = None) -> int:
    """Check both splits; returns the exit status: 0 when training can start."""
    parser = argparse.ArgumentParser("python -m detr_irpe.check_data", description=__doc__.partition("\n")[0])
    parser.add_argument("--coco_path", required=True, metavar="DIR", help="as for training")
    parser.add_argument("--coco_panoptic_path", metavar="DIR", help="check the panoptic annotations there too")
    parser.add_argument("--splits", nargs="+", default=["train2017", "val2017"], help="which to check")
    parser.add_argument("--num_classes", default=None, type=positive_int, help="as for training, if given there")
    parser.add_argument("--num_workers", default=2, type=nonnegative_int, help="processes that decode images")
    args = parser.parse_args(argv)
    set_up_logging(0)
    failed = False
    for split in args.splits:
        try:
            problems, summary = check_split(Path(args.coco_path), split, args.num_classes, args.num_workers)
            if args.coco_panoptic_path:
                problems += panoptic_problems(CocoPanoptic(args.coco_path, args.coco_panoptic_path, split, None))
        except (OSError, ValueError, RuntimeError) as error:
            failed = True
            logger.error(str(error))
            continue
        logger.info(summary)
        for problem in problems:
            logger.log(40 if problem.fatal else 30, str(problem))
        failed |= any(problem.fatal for problem in problems)
    logger.info("not ready for training: see the errors above" if failed else "ready for training")
    return int(failed)


class _Sizes(Dataset):
    def __init__(self, images, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, int, str]:
        try:
            image = read_image(self.images, index)
        except OSError as error:
            return 0, 0, str(error)
        return image.height, image.width, ""


def _decoded(images, count: int, num_workers: int) -> Iterator[tuple[int, int, str]]:
    return iter(DataLoader(_Sizes(images, count), batch_size=None, num_workers=num_workers))


def _add(problem: Problem, place: str) -> None:
    problem.count += 1
    if len(problem.places) < 3:
        problem.places.append(place)


def _repeated(what: str, values: list) -> Problem:
    seen, problem = set(), Problem(f"duplicate {what}", 0, [])
    for value in values:
        if value in seen:
            _add(problem, str(value))
        seen.add(value)
    return problem


if __name__ == "__main__":
    sys.exit(main())
