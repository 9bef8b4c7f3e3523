# SPDX-License-Identifier: Apache-2.0
"""The data set of COCO panoptic segmentation: every pixel belongs to one segment, of a thing or of stuff."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from detr_irpe.data.annotations import Annotations, read_categories, refuse_repeated, refuse_unknown
from detr_irpe.data.coco import read_image, transformed
from detr_irpe.data.image_files import open_images
from detr_irpe.data.json_columns import FLAG, JsonList, read_json, without_garbage_collection
from detr_irpe.data.packed_strings import PackedStrings, shared
from detr_irpe.segment_ids import ids_of_colours
from irpe_train.pixels import decode_image

SEGMENT_IDS = range(1, 2**24)  # what three bytes of colour can hold; 0 is "nothing"


class CocoPanoptic(Dataset):
    """One split of a panoptic set; items as in ``CocoDetection``, with a box and a mask for every segment.

    Args:
        image_root: holds ``{split}/`` or ``{split}.zip``.
        panoptic_root: holds ``annotations/panoptic_{split}.json`` and the segment images in ``panoptic_{split}/`` or
            ``panoptic_{split}.zip``. A pixel's segment id is red + 256 green + 65536 blue.
        split, transforms, return_masks: as for ``CocoDetection``.
        instances: ``instances_{split}.json`` of the same images, for scoring boxes (and masks).
    Raises: FileNotFoundError, ValueError: files are missing, or the annotations have the wrong format.
    """

    @without_garbage_collection()
    def __init__(
        self,
        image_root: str | Path,
        panoptic_root: str | Path,
        split: str,
        transforms: Callable,
        *,
        return_masks: bool = False,
        instances: Path | None = None,
    ) -> None:
        self.path = path = Path(panoptic_root) / "annotations" / f"panoptic_{split}.json"
        content = read_json(path)
        categories = JsonList(path, "categories", content.get("categories"))
        self.categories = read_categories(categories)
        counted = categories.integers("isthing", valid=FLAG)
        self.things = {i for i, thing in zip(self.categories, counted.tolist(), strict=True) if thing}

        images = JsonList(path, "images", content["images"])
        entries = JsonList(path, "annotations", content.get("annotations"))
        ids, owners = images.integers("id"), entries.integers("image_id")
        refuse_repeated(path, "image ids", ids)
        refuse_repeated(path, "annotations of images", owners)
        if other := sorted(set(ids.tolist()) ^ set(owners.tolist())):
            raise ValueError(f"{path}: images and annotations do not pair up: image id {other[0]} has only one of them")
        image_order, entry_order = np.argsort(ids), np.argsort(owners)
        names, maps = images.paths("file_name"), entries.paths("file_name")
        names, maps = [names[i] for i in image_order], [maps[i] for i in entry_order]
        segments = self._read_segments([entries.entries[i] for i in entry_order])
        self.labels = torch.tensor([s["category_id"] for of_image in segments for s in of_image], dtype=torch.int64)
        self.iscrowd = torch.tensor([s["iscrowd"] for of_image in segments for s in of_image], dtype=torch.int64)
        self._segments = PackedStrings(json.dumps(of_image).encode() for of_image in segments)
        self.image_ids = shared(ids[image_order])

        self.images = open_images(Path(image_root), split, names, path)
        where = (Path(panoptic_root), f"panoptic_{split}", maps, path)
        self.segment_images = open_images(*where, flag="--coco_panoptic_path")
        self.transforms, self.return_masks = transforms, return_masks
        self.annotations = Annotations(instances, with_masks=return_masks) if instances is not None else None

    def _read_segments(self, entries: list[dict]) -> list[list[dict]]:
        """``id``, ``category_id`` and ``iscrowd`` of every segment of each entry."""
        lists = [entry.get("segments_info") for entry in entries]
        for entry, given in zip(entries, lists, strict=True):
            if not isinstance(given, list):
                raise ValueError(f"{self.path}: segments_info of image {entry['image_id']}: not a list: {given!r:.40}")
        owners = np.repeat(np.arange(len(lists)), [len(given) for given in lists])
        segments = JsonList(
            self.path,
            "segments_info",
            [segment for given in lists for segment in given],
            name_of=lambda index: f"segments_info of image {entries[owners[index]]['image_id']}",
        )
        ids, labels = segments.integers("id", valid=SEGMENT_IDS), segments.integers("category_id")
        crowds = segments.integers("iscrowd", default=0, valid=FLAG)
        refuse_repeated(self.path, "segment ids in one image (numbered image * 2^24 + id)", owners * 2**24 + ids)
        refuse_unknown(self.path, "segments of categories", labels, np.array(list(self.categories)))
        read: list[list[dict]] = [[] for _ in lists]
        for owner, segment_id, label, crowd in zip(*(c.tolist() for c in (owners, ids, labels, crowds)), strict=True):
            read[owner].append({"id": segment_id, "category_id": label, "iscrowd": crowd})
        return read

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        segment_map, segments = self.truth(index)
        image = read_image(self.images, index, segment_map.shape)
        if segment_map.shape != (image.height, image.width):
            raise OSError(f"{self.segment_images.name(index)}: {segment_map.shape}, its image {image.size[::-1]}")
        masks = torch.from_numpy(segment_map == np.array([s["id"] for s in segments], np.int64)[:, None, None])
        kept = masks.flatten(1).any(1)  # a segment without a pixel has no box
        segments = [s for s, keep in zip(segments, kept.tolist(), strict=True) if keep]
        masks = masks[kept]
        canvas = (image.height, image.width)
        target = {
            "image_id": self.image_ids[index : index + 1].clone(),
            "labels": torch.tensor([s["category_id"] for s in segments], dtype=torch.int64),
            "boxes": tv_tensors.BoundingBoxes(masks_to_boxes(masks).reshape(-1, 4), format="XYXY", canvas_size=canvas),
            "area": masks.flatten(1).sum(1).float(),
            "iscrowd": torch.tensor([s["iscrowd"] for s in segments], dtype=torch.int64),
            "orig_size": torch.tensor(canvas),
        }
        if self.return_masks:
            target["masks"] = tv_tensors.Mask(masks.to(torch.uint8))
        return transformed(self.transforms, image, target, self.name(index))

    def truth(self, index: int) -> tuple[np.ndarray, list[dict]]:
        """Segment ids (height, width) int64 of image number ``index``, 0 where unlabelled; and the segments."""
        png = self.segment_images.read(index)
        ids = ids_of_colours(decode_image(png, self.segment_images.name(index)))
        return ids, json.loads(self._segments[index])

    def name(self, index: int) -> str:
        """The path of image number ``index``, for messages."""
        return self.images.name(index)
