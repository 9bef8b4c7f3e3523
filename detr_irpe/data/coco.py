"""COCO detection as DETR trains on it: images from a folder or an archive, targets as tensors."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from detr_irpe.data.annotations import Annotations
from detr_irpe.data.image_files import open_images
from detr_irpe.data.transforms import drop_empty_boxes


class CocoDetection(Dataset):
    """One split of a COCO-layout data set.

    ``dataset[i]`` is ``(image, target)`` as ``transforms`` leaves them. The target has ``boxes`` (n, 4), ``labels``
    (n,) with the category ids as they are, ``masks`` (n, h, w) bool if asked for, ``image_id`` (1,), ``area`` and
    ``iscrowd`` (n,), ``orig_size`` and ``size`` (2,) as height, width. Crowds are left out: regions, not objects.

    Args:
        root: holds ``annotations/instances_{split}.json`` and ``{split}/`` or ``{split}.zip``.
        split: ``train2017`` or ``val2017``.
        transforms: see ``transforms.py``.
        return_masks: with ``masks`` in the targets.
    Raises:
        FileNotFoundError: annotations, images, or some of the images are not there.
    """

    def __init__(self, root: str | Path, split: str, transforms: Callable, *, return_masks: bool = False) -> None:
        path = Path(root) / "annotations" / f"instances_{split}.json"
        self.annotations = Annotations(path, with_masks=return_masks)
        self.images = open_images(Path(root), split, [name.decode() for name in self.annotations.names])
        self.transforms, self.return_masks = transforms, return_masks
        raise_if_missing(self.images, path)

    @property
    def categories(self) -> dict[int, str]:
        return self.annotations.categories

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = read_image(self.images, index)
        objects = self.annotations.of_image(index)
        objects.pop("ids")
        single = objects["iscrowd"] == 0
        target = {name: values[single] for name, values in objects.items()}
        target["boxes"] = corners_inside(target["boxes"], image.height, image.width)
        target["image_id"] = self.annotations.image_ids[index : index + 1].clone()
        target["orig_size"] = torch.tensor([image.height, image.width])
        if self.return_masks:
            segmentations = self.annotations.segmentations_of_image(index)
            chosen = [segmentations[i] for i in single.nonzero().flatten().tolist()]
            target["masks"] = decode_masks(chosen, image.height, image.width)
        return self.transforms(image, drop_empty_boxes(target))

    def describe(self, index: int) -> str:
        """Where image number ``index`` lies, for messages."""
        return self.images.describe(index)


def read_image(images, index: int) -> Image.Image:
    """Image number ``index`` in RGB. Raises OSError: it cannot be read or decoded; the message names it."""
    try:
        with Image.open(io.BytesIO(images.read(index))) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{images.describe(index)}: cannot be read as an image ({error})") from error


def corners_inside(boxes: Tensor, height: int, width: int) -> tv_tensors.BoundingBoxes:
    """Boxes (n, 4) as x, y, width, height -> as corners, clipped to the image."""
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    corners[:, 0::2].clamp_(0, width)
    corners[:, 1::2].clamp_(0, height)
    return tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))


def decode_masks(segmentations: list, height: int, width: int) -> tv_tensors.Mask:
    """Polygons, or run lengths (compressed or not), of n objects -> (n, height, width) uint8, 1 on the object."""
    masks = np.zeros((len(segmentations), height, width), dtype=np.uint8)
    for mask, shape in zip(masks, segmentations, strict=True):
        if isinstance(shape, dict):
            runs = rle.frPyObjects(shape, *shape["size"]) if isinstance(shape["counts"], list) else shape
        elif shape:
            runs = rle.merge(rle.frPyObjects(shape, height, width))
        else:
            continue  # an object without a polygon has an empty mask
        mask[:] = rle.decode([runs])[:, :, 0]
    return tv_tensors.Mask(torch.from_numpy(masks))


def raise_if_missing(images, annotations: Path) -> None:
    """Raise FileNotFoundError if any image that the annotations name is not there."""
    if images.missing:
        first = ", ".join(images.missing[:3])
        raise FileNotFoundError(
            f"{images.path}: {len(images.missing)} images that {annotations} names are missing, {first}"
            f"{' and more' if len(images.missing) > 3 else ''}. Extract or download the set again."
        )
