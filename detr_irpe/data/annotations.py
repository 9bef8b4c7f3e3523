# SPDX-License-Identifier: Apache-2.0
"""COCO's instance annotations, read once: typed, checked, and in flat arrays that worker processes share."""

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detr_irpe.data.json_columns import FLAG, JsonList, read_json, without_garbage_collection
from detr_irpe.data.packed_strings import PackedStrings, shared
from detr_irpe.data.segmentations import MOST_PIXELS, problem_of
from irpe_train.errors import some

LARGEST_CATEGORY_ID = 20_000  # the model has an output for each id up to the largest; no published set has more
SIDES = range(2**20)  # pixels of an image


class Annotations:
    """Images in the order of their ids, and the objects of each in the order of the file.

    Data set, check, scoring and prediction all use this form of the file.

    Attributes:
        image_ids: (images,) int64. ``names``: their file names, as bytes.
        sizes: (images, 2) int64, height and width, 0 if the file does not say.
        boxes: (objects, 4) float64, x, y, width, height in pixels, as in the file.
        labels, ids: (objects,) int64, category and annotation ids. ``area``: float64. ``iscrowd``: int64.
        categories: category id to name, in the order of the file.
        without_mask: number of objects without segmentation; None if segmentations were not read.

    Args:
        path: ``instances_*.json``. Ids and sizes are integers (also as text), boxes and areas finite numbers. Height,
            width, area, iscrowd, id, segmentation and a category's name may be missing or null.
        with_masks: keep the segmentations too (several times the memory of everything else).
        categories: used if the file has no 'categories'; by default it must have them.
    Raises: FileNotFoundError, ValueError: the file is missing or has another format, an id is repeated, an object has a
        category or image that the file does not list, or its mask does not fit its image; the message names the
        entries.
    """

    @without_garbage_collection()
    def __init__(self, path: Path, *, with_masks: bool = False, categories: dict[int, str] | None = None) -> None:
        self.path = path
        content = read_json(path)
        images = JsonList(path, "images", content["images"])
        objects = JsonList(path, "annotations", content.get("annotations"))
        listed = JsonList(path, "categories", content.get("categories"))
        self.categories = categories if categories and not len(listed) else read_categories(listed)

        ids = images.integers("id")
        order = np.argsort(ids, kind="stable")
        self.image_ids = shared(ids[order])
        names = images.paths("file_name")
        self.names = PackedStrings(names[i].encode() for i in order)
        sizes = np.stack([images.integers(side, default=0, valid=SIDES) for side in ("height", "width")], axis=1)
        self.sizes = shared(sizes[order])
        refuse_repeated(path, "image ids", ids)

        owner, labels = objects.integers("image_id"), objects.integers("category_id")
        refuse_unknown(path, "annotations of images", owner, self.image_ids.numpy())
        refuse_unknown(path, "annotations of categories", labels, np.array(list(self.categories)))
        order = np.argsort(owner, kind="stable")  # objects of an image stay in the order of the file
        edges = [np.searchsorted(owner[order], self.image_ids.numpy(), side=side) for side in ("left", "right")]
        self._ranges = shared(np.stack(edges, 1).astype(np.int64))
        boxes = objects.boxes("bbox")
        area = objects.numbers("area", default=(boxes[:, 2] * boxes[:, 3]).tolist())
        object_ids = objects.integers("id", default=range(1, len(objects) + 1))
        refuse_repeated(path, "annotation ids", object_ids)
        self.boxes, self.labels = shared(boxes[order]), shared(labels[order])
        self.ids, self.area = shared(object_ids[order]), shared(area[order])
        self.iscrowd = shared(objects.integers("iscrowd", default=0, valid=FLAG)[order])

        self.without_mask, self._masks = None, None
        if with_masks:
            shapes = [objects.entries[i].get("segmentation") or [] for i in order]
            self.without_mask = sum(not shape for shape in shapes)
            self._masks = PackedStrings(pickle.dumps(shape) for shape in self._checked_masks(shapes))

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_of_object(self) -> Tensor:
        """(objects,) int64: the index of each object's image."""
        counts = self._ranges[:, 1] - self._ranges[:, 0]
        return torch.repeat_interleave(torch.arange(len(self)), counts)

    def of_image(self, index: int) -> dict[str, Tensor]:
        """Boxes and area in float32, labels, ids and iscrowd of image number ``index``; copies, yours to modify."""
        start, end = self._ranges[index].tolist()
        fields = {name: getattr(self, name)[start:end] for name in ("boxes", "labels", "ids", "area", "iscrowd")}
        return {name: v.float() if v.is_floating_point() else v.clone() for name, v in fields.items()}

    def segmentations_of_image(self, index: int) -> list:
        """Polygons or RLE of every object of image number ``index``; [] for none, or if the image size is missing."""
        return [pickle.loads(self._masks[i]) for i in range(*self._ranges[index].tolist())]

    def place_of_object(self, index: int) -> str:
        """The file's entry of object number ``index``, for messages."""
        image = int(self.image_ids[self.image_of_object()[index]])
        box = [round(side, 2) for side in self.boxes[index].tolist()]
        return f"annotation {int(self.ids[index])} of image {image}: bbox {box}, category {int(self.labels[index])}"

    def unsized(self) -> list[str]:
        """Images whose height and width are missing or absurd, so that they cannot have masks."""
        return [self.names[i].decode() for i in (~self._sized()).nonzero()[:, 0].tolist()]

    def _sized(self) -> Tensor:
        pixels = self.sizes.prod(1)
        return (pixels > 0) & (pixels < MOST_PIXELS)

    def _checked_masks(self, shapes: list) -> list:
        """``shapes``, empty in images without a size."""
        owners, sizes, sized = self.image_of_object().tolist(), self.sizes.tolist(), self._sized().tolist()
        for index, (shape, owner) in enumerate(zip(shapes, owners, strict=True)):
            if sized[owner] and (wrong := problem_of(shape, *sizes[owner])):
                raise ValueError(f"{self.path}: segmentation of {self.place_of_object(index)}: {wrong}")
        return [shape if sized[owner] else [] for shape, owner in zip(shapes, owners, strict=True)]


def read_categories(entries: JsonList) -> dict[int, str]:
    """Category id to name, in the order of the file; a category without a name is named by its id."""
    if len(entries) == 0:
        raise ValueError(f"{entries.path}: no 'categories'; without them the classes have neither ids nor names")
    ids = entries.integers("id")
    wrong = ids[(ids < 0) | (ids > LARGEST_CATEGORY_ID)]
    if len(wrong):
        raise ValueError(
            f"{entries.path}: category ids {some(wrong)}: expected 0 to {LARGEST_CATEGORY_ID}: the model "
            "has an output for each id up to the largest. Number the categories from 1."
        )
    refuse_repeated(entries.path, "category ids", ids)
    for entry in entries.entries:  # a number may be a name too
        entry["name"] = str(entry["id"] if entry.get("name") is None else entry["name"])
    return dict(zip(ids.tolist(), entries.texts("name"), strict=True))


def refuse_repeated(path: Path, what: str, ids: np.ndarray) -> None:
    """Raise ValueError if any of ``ids`` is repeated."""
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        twice = values[counts > 1]
        raise ValueError(f"{path}: duplicate {what}: {len(twice)} ({some(twice)}); each must occur once")


def refuse_unknown(path: Path, what: str, used: np.ndarray, listed: np.ndarray) -> None:
    """Raise ValueError if any of the ids ``used`` is not ``listed``."""
    unknown = np.unique(used[~np.isin(used, listed)])
    if len(unknown):
        number = int(np.isin(used, unknown).sum())
        raise ValueError(f"{path}: {number} {what} that the file does not list (ids {some(unknown)})")
