# SPDX-License-Identifier: Apache-2.0
"""The masks of COCO annotations: polygons or RLE (compressed or not), checked and decoded."""

import json
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torchvision import tv_tensors

from detr_irpe.data.packed_strings import PackedStrings, shared

MOST_PIXELS = 2**30  # per image; run lengths are 32-bit numbers in pycocotools


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


class PackedMasks:
    """The segmentations of many objects, in flat arrays that worker processes share: polygons as numbers, RLE as JSON.

    Args: shapes: of every object; lists of polygons and RLE may be mixed.
    Raises: TypeError, OverflowError: some are neither, or a polygon is not a list of numbers.
    """

    def __init__(self, shapes: Sequence[list | dict]) -> None:
        if set(map(type, shapes)) - {list, dict}:
            raise TypeError("neither polygons nor run lengths")
        lists = [shape if isinstance(shape, list) else [] for shape in shapes]
        polygons = list(chain.from_iterable(lists))
        if set(map(type, polygons)) - {list} or set(map(type, chain.from_iterable(polygons))) - {int, float}:
            raise TypeError("a polygon that is not a list of numbers")
        self._first = _edges(lists)  # polygon of every object
        self._edges = _edges(polygons)  # first number of every polygon
        self._numbers = shared(np.fromiter(chain.from_iterable(polygons), np.float64, int(self._edges[-1])))
        self._runs = PackedStrings(json.dumps(s).encode() if isinstance(s, dict) else b"" for s in shapes)

    def __getitem__(self, index: int) -> list | dict:
        if runs := self._runs[index]:
            return json.loads(runs)
        first, last = self._first[index : index + 2].tolist()
        edges = self._edges[first : last + 1].tolist()
        return [self._numbers[start:end].tolist() for start, end in zip(edges[:-1], edges[1:], strict=True)]

    def polygons_fit(self, sizes: Tensor) -> bool:
        """Whether ``problem_of`` finds nothing in any polygon; ``sizes`` (objects, 2) are heights and widths."""
        edges, numbers = self._edges.numpy(), self._numbers.numpy()
        lengths = np.diff(edges)
        if (lengths < 6).any() or (lengths % 2).any():
            return False
        of_polygon = sizes.repeat_interleave(self._first.diff(), 0).numpy()
        return all(
            (np.minimum.reduceat(values, edges[:-1] // 2) >= -side).all()  # false for NaN
            and (np.maximum.reduceat(values, edges[:-1] // 2) <= 2 * side).all()
            for values, side in ((numbers[0::2], of_polygon[:, 1]), (numbers[1::2], of_polygon[:, 0]))
        )


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


def _edges(lists: Sequence[list]) -> Tensor:
    """(lists + 1,) int64: where each list begins in their concatenation, and the end."""
    return shared(np.cumsum([0, *map(len, lists)], dtype=np.int64))


def _wrong_polygon(polygon, height: int, width: int) -> str | None:
    if not isinstance(polygon, list) or set(map(type, polygon)) - {int, float}:
        return "a polygon that is not a list of numbers; expected [[x, y, x, y, x, y, ...], ...]"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"a polygon of {len(polygon)} numbers; expected x and y of three points or more"
    inside = all(-width <= x <= 2 * width for x in polygon[0::2])  # false for NaN
    inside &= all(-height <= y <= 2 * height for y in polygon[1::2])
    return None if inside else "a polygon far outside its image"


def _runs_of_text(counts: str) -> list[int] | None:
    """Run lengths from COCO's text: five bits per letter, lowest first; from the fourth run on, the difference from
    the run two before.

    Source: pycocotools, common/maskApi.c, ``rleFrString``.
    """
    letters = np.frombuffer(counts.encode(errors="surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    if len(letters) == 0 or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        return None
    last = np.flatnonzero((letters & 32) == 0)  # letter of each number
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() > 6:  # more than 35 bits: beyond any image, and beyond pycocotools' own numbers
        return None
    place = np.arange(len(letters)) - np.repeat(first, last - first + 1)
    runs = np.add.reduceat((letters & 31) << (5 * place), first)
    runs -= np.where(letters[last] & 16, 1 << (5 * (last - first + 1)), 0)  # the sign
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs.tolist()
