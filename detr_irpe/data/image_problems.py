# SPDX-License-Identifier: Apache-2.0
"""Problems in a data set's images, masks and segment images."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from pycocotools import mask as rle

from detr_irpe.data.annotation_problems import MOST, Problem
from detr_irpe.data.annotations import Annotations
from detr_irpe.data.coco import read_image
from detr_irpe.data.image_files import FilesInFolder, FilesInZip
from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.data.segmentations import to_rle
from irpe_train.loader import try_all
from irpe_train.pixels import is_turned


def image_problems(
    annotations: Annotations,
    images: FilesInFolder | FilesInZip,
    checked: Sequence[int],
    *,
    masks: bool,
    allowed: float,
    num_workers: int,
) -> list[Problem]:
    """Problems found by decoding: unreadable files, sizes other than annotated, rotated photos."""
    unreadable = Problem("unreadable images", allowed=allowed)
    other_size = Problem("images of another size than annotated", allowed=0 if masks else MOST * len(checked))
    turned = Problem("photos that are read as stored but shown rotated (EXIF)", allowed=math.inf)
    decoded = try_all(partial(_seen, annotations, images), checked, num_workers)
    for index, (found, error) in zip(checked, decoded, strict=True):
        name, wanted = annotations.names[index].decode(), annotations.sizes[index].tolist()
        if error:
            unreadable.add(error)
        elif 0 not in wanted and wanted != found[:2]:
            other_size.add(f"{name} is {found[0]} x {found[1]}, annotated {wanted[0]} x {wanted[1]}")
        elif found[2]:
            turned.add(name)
    return [unreadable, other_size, turned]


def _seen(annotations: Annotations, images: FilesInFolder | FilesInZip, index: int) -> list[int]:
    """Height and width of an image as training reads it, and whether viewers show it rotated."""
    image = read_image(images, index, annotations.sizes[index].tolist())
    return [image.height, image.width, is_turned(image)]


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
