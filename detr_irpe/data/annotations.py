"""COCO's instance annotations as flat arrays that worker processes share."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detr_irpe.data.packed_strings import PackedStrings


def read_json(path: Path) -> dict:
    """The content of a COCO JSON file. Raises FileNotFoundError, ValueError: it is missing, or is not such a file."""
    if not path.is_file():
        raise FileNotFoundError(f'no annotation file {path}. See README, "Data", for the layout that is expected.')
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{path}: not a COCO annotation file (no list 'images' in it)")
    return content


class Annotations:
    """Images in the order of their ids, and the objects of each in the order of the file.

    Attributes:
        image_ids: (images,) int64. ``names``: their file names, as bytes.
        sizes: (images, 2) int64, height and width, 0 where the file does not say.
        boxes: (objects, 4) float32, x, y, width, height in pixels, as the file has them.
        labels, ids: (objects,) int64, category and annotation ids. ``area``: float32. ``iscrowd``: int64.
        categories: category id to name, in the order of the file.
        unplaced: how many annotations name an image that is not in the file.

    Args:
        path: ``instances_*.json``.
        with_masks: keep the segmentations too (several times the memory of all the rest).
    Raises:
        ValueError: a field is missing or has the wrong form; the message names the entry.
    """

    def __init__(self, path: Path, *, with_masks: bool = False) -> None:
        self.path = path
        content = read_json(path)
        images = sorted(content["images"], key=lambda image: _field(image, "id", "image", path))
        objects = content.get("annotations", [])
        self.categories = {
            int(_field(c, "id", "category", path)): str(c.get("name", c["id"])) for c in content.get("categories", [])
        }
        if not self.categories:
            raise ValueError(f"{path}: no 'categories'; without them the classes have neither ids nor names")

        self.image_ids = _shared([image["id"] for image in images], np.int64, path, "image id")
        self.names = PackedStrings(str(_field(image, "file_name", "image", path)).encode() for image in images)
        sizes = [(image.get("height", 0), image.get("width", 0)) for image in images]
        self.sizes = _shared(sizes, np.int64, path, "image height and width", columns=2)

        owner = np.array([_field(o, "image_id", "annotation", path) for o in objects], dtype=np.int64)
        order = np.argsort(owner, kind="stable")  # objects of an image stay in the order of the file
        order = order[np.isin(owner[order], self.image_ids.numpy())]
        self.unplaced = len(objects) - len(order)
        objects, owner = [objects[i] for i in order], owner[order]
        first = np.searchsorted(owner, self.image_ids.numpy(), side="left")
        past = np.searchsorted(owner, self.image_ids.numpy(), side="right")
        self._ranges = torch.from_numpy(np.stack([first, past], 1).astype(np.int64).reshape(-1, 2)).share_memory_()

        boxes = [_field(o, "bbox", "annotation", path) for o in objects]
        self.boxes = _shared(boxes, np.float32, path, "bbox (x, y, width, height)", columns=4)
        labels = [_field(o, "category_id", "annotation", path) for o in objects]
        self.labels = _shared(labels, np.int64, path, "category_id")
        self.ids = _shared([o.get("id", i + 1) for i, o in enumerate(objects)], np.int64, path, "annotation id")
        self.iscrowd = _shared([o.get("iscrowd", 0) for o in objects], np.int64, path, "iscrowd")
        area = [o.get("area", box[2] * box[3]) for o, box in zip(objects, boxes, strict=True)]
        self.area = _shared(area, np.float32, path, "area")
        self._segmentations = None
        if with_masks:
            self._segmentations = PackedStrings(
                json.dumps(_field(o, "segmentation", "annotation", path), separators=(",", ":")).encode()
                for o in objects
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_of_object(self) -> Tensor:
        """(objects,) int64: the number, from 0, of the image that each object is in."""
        counts = self._ranges[:, 1] - self._ranges[:, 0]
        return torch.repeat_interleave(torch.arange(len(self)), counts)

    def of_image(self, index: int) -> dict[str, Tensor]:
        """Boxes, labels, ids, area and iscrowd of image number ``index``; copies, free to change."""
        start, end = self._ranges[index].tolist()
        fields = ("boxes", "labels", "ids", "area", "iscrowd")
        return {field: getattr(self, field)[start:end].clone() for field in fields}

    def segmentations_of_image(self, index: int) -> list:
        """Polygons, or run lengths, of every object of image number ``index``, as the file has them."""
        start, end = self._ranges[index].tolist()
        return [json.loads(self._segmentations[i]) for i in range(start, end)]


_PLURAL = {"image": "images", "annotation": "annotations", "category": "categories"}


def _field(entry: dict, name: str, kind: str, path: Path):
    if not isinstance(entry, dict) or name not in entry:
        raise ValueError(f"{path}: an entry of its {_PLURAL[kind]} lacks {name!r}: {json.dumps(entry)[:80]}")
    return entry[name]


def _shared(values: list, dtype: type, path: Path, what: str, columns: int | None = None) -> Tensor:
    try:
        array = np.array(values, dtype=dtype)
        if columns is not None:
            array = array.reshape(len(values), columns)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: some {what} is not of that form ({error})") from error
    return torch.from_numpy(array).share_memory_()
