"""COCO panoptic segmentation, the data set: every pixel belongs to one segment, of a thing or of stuff."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from detr_irpe.data.annotations import read_json
from detr_irpe.data.coco import raise_if_missing, read_image
from detr_irpe.data.image_files import open_images
from detr_irpe.data.packed_strings import PackedStrings
from detr_irpe.data.transforms import drop_empty_boxes
from detr_irpe.models.postprocess import decode_ids


class CocoPanoptic(Dataset):
    """One split of a panoptic set; items are as those of ``CocoDetection``, a box and a mask for every segment.

    Args:
        image_root: holds ``{split}/`` or ``{split}.zip``.
        panoptic_root: holds ``annotations/panoptic_{split}.json`` and the segment images in ``panoptic_{split}/`` or
            ``panoptic_{split}.zip``. A pixel's segment id is red + 256 green + 65536 blue.
        split, transforms, return_masks: as for ``CocoDetection``.
    Raises: FileNotFoundError, ValueError: files are missing, or the annotations have the wrong form.
    """

    def __init__(
        self,
        image_root: str | Path,
        panoptic_root: str | Path,
        split: str,
        transforms: Callable,
        *,
        return_masks: bool = False,
    ) -> None:
        path = Path(panoptic_root) / "annotations" / f"panoptic_{split}.json"
        content = read_json(path)
        try:
            annotations = {entry["image_id"]: entry for entry in content["annotations"]}
            images = sorted(content["images"], key=lambda image: image["id"])
            of_images = [annotations[image["id"]] for image in images]
            self.categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
            self.things = {int(c["id"]) for c in content["categories"] if c["isthing"]}
            self._segments = PackedStrings(json.dumps(entry["segments_info"]).encode() for entry in of_images)
            names = [str(image["file_name"]) for image in images], [str(entry["file_name"]) for entry in of_images]
        except KeyError as error:
            raise ValueError(f"{path}: not a panoptic annotation file ({error} is missing)") from error
        self.image_ids = torch.tensor([image["id"] for image in images], dtype=torch.int64).share_memory_()
        self.images = open_images(Path(image_root), split, names[0])
        self.segment_images = open_images(Path(panoptic_root), f"panoptic_{split}", names[1])
        raise_if_missing(self.images, path)
        raise_if_missing(self.segment_images, path)
        self.transforms, self.return_masks = transforms, return_masks

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = read_image(self.images, index)
        segment_map, segments = self.truth(index)
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
            "iscrowd": torch.tensor([s.get("iscrowd", 0) for s in segments], dtype=torch.int64),
            "orig_size": torch.tensor(canvas),
        }
        if self.return_masks:
            target["masks"] = tv_tensors.Mask(masks.to(torch.uint8))
        return self.transforms(image, drop_empty_boxes(target))

    def truth(self, index: int) -> tuple[np.ndarray, list[dict]]:
        """Segment ids (height, width) int64 of image number ``index``, 0 where nothing is; and what each id is."""
        try:
            ids = decode_ids(self.segment_images.read(index))
        except (OSError, ValueError, SyntaxError) as error:
            raise OSError(f"{self.segment_images.describe(index)}: cannot be read as an image ({error})") from error
        return ids, json.loads(self._segments[index])

    def describe(self, index: int) -> str:
        """Where image number ``index`` lies, for messages."""
        return self.images.describe(index)
