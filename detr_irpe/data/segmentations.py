# SPDX-License-Identifier: Apache-2.0
"""The masks of COCO annotations: polygons or RLE (compressed or not), checked and decoded."""

import math

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torchvision import tv_tensors

MOST_PIXELS = 2**29  # per image; a run length has at most six letters, see _runs_of_text


def problem_of(segmentation, height: int, width: int) -> str | None:
    """The problem of an object's mask in an image of this size; None if there is none.

    pycocotools checks nothing: a wrong run length makes it write past the end of its memory.
    """
    if not segmentation:
        return None  # no mask; the caller decides whether one is needed
    if isinstance(segmentation, list):
        return next((wrong for polygon in segmentation if (wrong := _wrong_polygon(polygon, height, width))), None)
    if not isinstance(segmentation, dict):
        return "neither polygons nor run lengths"
    size = segmentation.get("size")
    if size != [height, width] or set(map(type, size)) != {int}:
        return f"run lengths of size {str(size):.40}, the image is {[height, width]}"
    counts = segmentation.get("counts")
    runs = _runs_of_text(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return "run lengths that are not counts of pixels"
    return None if sum(runs) == height * width else f"run lengths of {sum(runs)} pixels, the image has {height * width}"


def to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """A checked segmentation as compressed RLE; an empty one is an empty mask."""
    if not segmentation:
        return rle.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def decode_masks(segmentations: list, height: int, width: int) -> tv_tensors.Mask:
    """Checked segmentations of n objects -> (n, height, width) uint8, 1 on the object."""
    masks = np.zeros((len(segmentations), height, width), dtype=np.uint8)
    for mask, shape in zip(masks, segmentations, strict=True):
        mask[:] = np.asarray(rle.decode([to_rle(shape, height, width)]))[:, :, 0]
    return tv_tensors.Mask(torch.from_numpy(masks))


def encode_masks(masks: Tensor) -> list[dict]:
    """Masks (n, height, width), bool or probabilities (above 0.5 counts), as compressed RLE."""
    binary = (masks if masks.dtype == torch.bool else masks > 0.5).cpu().numpy().astype(np.uint8)
    return [rle.encode(np.asfortranarray(mask)) for mask in binary]


def _wrong_polygon(polygon, height: int, width: int) -> str | None:
    if not isinstance(polygon, list) or set(map(type, polygon)) - {int, float}:
        return "a polygon that is not a list of numbers; expected [[x, y, x, y, x, y, ...], ...]"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"a polygon of {len(polygon)} numbers; expected x and y of three points or more"
    xs, ys = polygon[0::2], polygon[1::2]
    inside = -width <= min(xs) and max(xs) <= 2 * width and -height <= min(ys) and max(ys) <= 2 * height
    inside = inside and not math.isnan(sum(polygon))  # NaN compares with nothing
    return None if inside else "a polygon far outside its image"


def _runs_of_text(counts: str) -> list[int] | None:
    """Run lengths from COCO's text: five bits per letter, lowest first; from the fourth run on, the difference from
    the run two before.

    Source: pycocotools, common/maskApi.c, ``rleFrString``.
    """
    runs, value, shift = [], 0, 0
    for letter in counts.encode(errors="surrogatepass"):
        bits = letter - 48
        if not 0 <= bits < 64 or shift > 25:  # a seventh letter would overflow pycocotools' 32-bit shifts
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last of this number
            value -= bits >> 4 << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if runs and not shift else None
