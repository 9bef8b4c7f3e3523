# SPDX-License-Identifier: Apache-2.0
"""Problems in a data set: in its annotations, between its splits, and in its images, masks and segment images."""

import filecmp
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from detr_irpe.classes import plain_name, same_name
from detr_irpe.data.annotations import Annotations
from detr_irpe.data.coco import CocoDetection, read_image
from detr_irpe.data.image_files import FilesInFolder, FilesInZip
from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.data.segmentations import to_rle
from irpe_train.loader import try_all
from irpe_train.pixels import is_turned, pixel_hash

MOST = 0.5  # the fraction of wrong boxes or images that stops training; a few, as in COCO, are dropped
FRACTIONS = 0.9  # if this fraction of all boxes lies within one pixel, the unit is not pixels
OUTSIDE = 0.1  # if this fraction of boxes reaches outside, and all could be in another format, they are


@dataclass
class Problem:
    """One kind of mistake: what it is, how often, and the first few places.

    Attributes: allowed: how often it may occur before it stops training.
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


Found = list[tuple[Path, Problem]]  # each with its file


def annotation_problems(
    annotations: Annotations, num_classes: int | None = None, *, train: bool = True, masks: bool = False
) -> list[Problem]:
    """The problems that can be found without opening an image."""
    boxes, labels = annotations.boxes, annotations.labels
    owner = annotations.image_of_object()
    x, y, width, height = boxes.unbind(1)
    image_height, image_width = annotations.sizes[owner].unbind(1)
    sized = (image_height > 0) & (image_width > 0)
    outside = sized & ((x < -1) | (y < -1) | (x + width > image_width + 1) | (y + height > image_height + 1))
    lost = sized & ((x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0))
    learnable = (width > 0) & (height > 0) & ~lost & (annotations.iscrowd == 0)
    fractions = ((boxes >= 0) & (boxes <= 1)).all(1).float().mean() >= FRACTIONS
    as_corners = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    as_corners &= (width <= image_width + 1) & (height <= image_height + 1)
    as_centres = (x >= width / 2 - 1) & (y >= height / 2 - 1)
    as_centres &= (x + width / 2 <= image_width + 1) & (y + height / 2 <= image_height + 1)
    often_outside = outside.float().mean() >= OUTSIDE
    corners = often_outside and as_corners.all()
    # A few careless boxes in the lower right corner pass for centres, too.
    centres = often_outside and as_centres.all() and not corners and outside.sum() > 3
    quarter = len(boxes) > 3 and (sized & (x + width <= image_width / 2) & (y + height <= image_height / 2)).all()
    rows = np.column_stack([owner, labels, boxes])
    order = np.lexsort(rows.T)  # equal rows are neighbours, in the order of the file
    repeated = torch.zeros(len(rows), dtype=torch.bool)
    repeated[order[1:][(rows[order[1:]] == rows[order[:-1]]).all(1)]] = True
    names = Counter(name.decode() for name in annotations.names)
    twice = [name for name, count in names.items() if count > 1]
    unsized = annotations.unsized() if masks else []
    called = Counter(map(plain_name, annotations.categories.values()))
    shared = [name for name, count in called.items() if count > 1]

    def boxes_that(what: str, bad: Tensor) -> Problem:
        places = [annotations.place_of_object(i) for i in bad.nonzero()[:3, 0].tolist()]
        return Problem(what, int(bad.sum()), places, MOST * len(boxes))

    return [
        *class_problems(labels, num_classes, annotations.categories if train else {}),
        Problem("boxes that look like fractions of the image; expected pixels", len(boxes) if fractions else 0),
        Problem("boxes that look like two corners; expected x, y, width, height", len(boxes) if corners else 0),
        Problem("boxes that look like centre and size; expected x, y, width, height", len(boxes) if centres else 0),
        Problem(
            "boxes all in the top left quarter of their images; expected pixels of these images",
            len(boxes) if quarter else 0,
            allowed=math.inf,
        ),
        Problem("names shared by several categories", len(shared), shared[:3], allowed=math.inf),
        boxes_that("objects with a negative area, which are not scored", annotations.area < 0),
        boxes_that("boxes with a negative side, which are dropped", (width < 0) | (height < 0)),
        boxes_that("empty boxes, which are dropped", torch.minimum(width, height) == 0),
        boxes_that("boxes that reach outside their image, and are clipped to it", outside),
        Problem("duplicate file names", len(annotations) - len(names), twice[:3]),
        boxes_that("duplicate objects (same image, category and box)", repeated),
        nothing_to_learn(int(learnable.sum()), len(annotations), train),
        Problem("objects without a mask; --masks needs one for each", masks and annotations.without_mask or 0),
        Problem("images without height and width; --masks needs them", len(unsized), unsized[:3]),
    ]


def panoptic_problems(dataset: CocoPanoptic, num_classes: int | None = None, *, train: bool = True) -> list[Problem]:
    """The same for a panoptic set, whose segments count as objects."""
    known = dataset.annotations
    listed = set() if known is None else set(known.image_ids.tolist())
    unknown = [] if known is None else [str(i) for i in dataset.image_ids.tolist() if i not in listed]
    unlisted = f"images missing in {known and known.path.name}, which is used to score boxes"
    return [
        *class_problems(dataset.labels, num_classes, dataset.categories if train else {}),
        nothing_to_learn(int((dataset.iscrowd == 0).sum()), len(dataset), train),
        Problem(unlisted, len(unknown), unknown[:3]),
    ]


def class_problems(labels: Tensor, num_classes: int | None, categories: dict[int, str]) -> list[Problem]:
    """Category ids that the class head has no output for; those of ``categories`` that no object has."""
    beyond = labels[labels >= (num_classes if num_classes is not None else torch.iinfo(torch.int64).max)]
    ids = [str(i) for i in beyond.unique().tolist()]
    how = "the largest id plus one, or auto; a checkpoint has its own"
    out = f"--num_classes {num_classes} ({how}) has no output for the ids of some objects"
    used = set(labels.tolist())
    unused = [f"{i} {name!r}" for i, name in categories.items() if i not in used]
    without = Problem("categories without any object", len(unused), unused[:3], allowed=math.inf)
    return [Problem(out, len(beyond), ids[:3]), without]


def nothing_to_learn(objects: int, images: int, train: bool) -> Problem:
    """For a set in which every object is a crowd or has no box inside its image."""
    if not images:
        return Problem("no images", 1)
    if train:
        return Problem("images without any object to learn (all are crowds or have no box)", 0 if objects else images)
    return Problem("images without any object to find: AP will be -1", 0 if objects else images, allowed=math.inf)


def split_problems(train: CocoDetection | CocoPanoptic, val: CocoDetection | CocoPanoptic) -> Found:
    """Problems between two splits: different names, or the same file for both."""
    found = naming_problems(train.categories, val.categories, train.path, val.path)
    if filecmp.cmp(train.path, val.path, shallow=False):
        same = f"the same annotations as {val.path.name}: evaluation is on training images"
        found.insert(0, (train.path, Problem(same, 1, allowed=math.inf)))
    return found


def naming_problems(ours: dict[int, str], theirs: dict[int, str], our_file: Path, their_file: Path) -> Found:
    """Categories with different names or ids in two files: correct detections would be scored as wrong."""
    first, second = our_file.name, their_file.name
    other = Problem(f"category ids that mean something else in {second}")
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
    checked: Sequence[int],
    *,
    masks: bool,
    allowed: float,
    num_workers: int,
    pictures: dict[bytes, Path],
) -> list[Problem]:
    """Problems found by decoding: unreadable files, sizes other than annotated, rotated photos, another split's."""
    unreadable = Problem("unreadable images", allowed=allowed)
    other_size = Problem("images of another size than annotated", allowed=0 if masks else MOST * len(checked))
    turned = Problem("photos that are read as stored but shown rotated (EXIF)", allowed=math.inf)
    again = Problem("images that another split has too, pixel for pixel", allowed=math.inf)
    decoded = try_all(partial(_seen, annotations, images), checked, num_workers)
    for index, (found, error) in zip(checked, decoded, strict=True):
        name, wanted = annotations.names[index].decode(), annotations.sizes[index].tolist()
        if error:
            unreadable.add(error)
        elif 0 not in wanted and wanted != found[:2]:
            other_size.add(f"{name} is {found[0]} x {found[1]}, annotated {wanted[0]} x {wanted[1]}")
        elif found[2]:
            turned.add(name)
        if not error and pictures.setdefault(found[3], annotations.path) != annotations.path:
            again.add(name)
    return [unreadable, other_size, turned, again]


def _seen(annotations: Annotations, images: FilesInFolder | FilesInZip, index: int) -> list:
    """Height and width of an image as training reads it, whether viewers show it rotated, and a hash of its pixels."""
    image = read_image(images, index, annotations.sizes[index].tolist())
    return [image.height, image.width, is_turned(image), pixel_hash(image)]


def mask_problem(annotations: Annotations, checked: Sequence[int]) -> Problem:
    """Masks mostly outside their object's box: of another format, scale or object, or empty."""
    beside = Problem("masks less than half inside their object's box", allowed=1)
    for index in checked:
        size, objects = annotations.sizes[index].tolist(), annotations.of_image(index)
        shapes = annotations.segmentations_of_image(index)
        for box, number, shape in zip(objects["boxes"].tolist(), objects["ids"].tolist(), shapes, strict=True):
            if shape:
                beside.allowed += MOST
                mask = rle.toBbox(to_rle(shape, *size))  # x, y, width, height
                low = [max(mask[axis], box[axis]) for axis in (0, 1)]
                high = [min(mask[axis] + mask[axis + 2], box[axis] + box[axis + 2]) for axis in (0, 1)]
                inside = max(high[0] - low[0], 0) * max(high[1] - low[1], 0)
                if inside <= mask[2] * mask[3] / 2:
                    beside.add(f"annotation {number} of {annotations.names[index].decode()}")
    return beside


def segment_image_problems(dataset: CocoPanoptic, checked: Sequence[int], allowed: float) -> list[Problem]:
    """Segment images that are unreadable, or do not fit their image or ``segments_info``."""
    unreadable = Problem("unreadable segment images", allowed=allowed)
    other_size = Problem("segment images of another size than their image")
    unlisted = Problem("segment images with ids that 'segments_info' does not list")
    absent = Problem("segments in 'segments_info' without a pixel")
    known, sizes = dataset.annotations, {}
    if known is not None:
        sizes = dict(zip(known.image_ids.tolist(), known.sizes.tolist(), strict=True))
    scored_size = Problem(f"images of another size in {known and known.path.name}, which is used to score boxes")
    for index in checked:
        name = dataset.segment_images.name(index)
        try:
            ids, segments = dataset.truth(index)
            image = read_image(dataset.images, index, ids.shape)
        except OSError as error:
            unreadable.add(str(error))
            continue
        if ids.shape != (image.height, image.width):
            other_size.add(f"{name} is {ids.shape[0]} x {ids.shape[1]}, not {image.height} x {image.width}")
        scored = sizes.get(int(dataset.image_ids[index]), [0, 0])
        if 0 not in scored and scored != list(ids.shape):
            scored_size.add(f"{name} is {ids.shape[0]} x {ids.shape[1]}, annotated {scored[0]} x {scored[1]} there")
        seen, listed = set(np.unique(ids).tolist()) - {0}, {segment["id"] for segment in segments}
        absent.allowed += MOST * len(listed)
        for segment_id in sorted(listed - seen):
            absent.add(f"{segment_id} of {name}")
        if seen - listed:
            unlisted.add(name)
    return [unreadable, other_size, scored_size, unlisted, absent]


def problems_of(
    dataset: CocoDetection | CocoPanoptic,
    num_classes: int | None = None,
    *,
    train: bool,
    masks: bool = False,
    max_bad: float = 0.001,
    only: Sequence[int] | None = None,
    num_workers: int = 0,
    pictures: dict[bytes, Path] | None = None,
) -> Found:
    """The problems of a split.

    Args:
        num_classes: ids from this on have no logit; None skips this check.
        train: the set is for training, not only for evaluation.
        masks: masks are trained, or scored.
        max_bad: the fraction of a training set that may be unreadable.
        only: the indices of the images to check, as a sample; default: all.
        num_workers: processes that decode images.
        pictures: the first split with each picture, by the hash of its pixels; gets those of this one.
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
        how["pictures"] = {} if pictures is None else pictures
        found += [(path, problem) for problem in image_problems(known, dataset.images, checked, **how)]
        found += [(path, mask_problem(known, checked))] if known.without_mask is not None else []  # masks were read
    if known is not None:
        problems = annotation_problems(known, num_classes, train=train, masks=masks)
        found = [(known.path, problem) for problem in problems] + found
    return [(path, problem) for path, problem in found if problem.count]
