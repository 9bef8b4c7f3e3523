# SPDX-License-Identifier: Apache-2.0
"""COCO detection for DETR: images from a folder or an archive, targets as tensors."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert, clip_boxes_to_image

from detr_irpe.data.annotations import Annotations
from detr_irpe.data.image_files import FilesInFolder, FilesInZip, open_images
from detr_irpe.data.segmentations import decode_masks
from detr_irpe.data.transforms import drop_empty_boxes
from irpe_train.pixels import decode_image


class CocoDetection(Dataset):
    """One split of a COCO-layout data set.

    ``dataset[i]`` is ``(image, target)`` after ``transforms``. The target has ``boxes`` (n, 4), ``labels``
    (n,) with the original category ids, ``masks`` (n, h, w) bool if requested, ``image_id`` (1,), ``area`` and
    ``iscrowd`` (n,), ``orig_size`` and ``size`` (2,) as height, width. Crowds are left out: regions, not objects.

    Args:
        root: holds ``annotations/instances_{split}.json`` and ``{split}/`` or ``{split}.zip``.
        split: ``train2017`` or ``val2017``.
        transforms: see ``transforms.py``.
        return_masks: include ``masks`` in the targets.
    Raises: FileNotFoundError: the annotations, the images, or some of them are missing.
    """

    def __init__(self, root: str | Path, split: str, transforms: Callable, *, return_masks: bool = False) -> None:
        self.path = Path(root) / "annotations" / f"instances_{split}.json"
        self.annotations = Annotations(self.path, with_masks=return_masks)
        self.images = open_images(Path(root), split, [name.decode() for name in self.annotations.names], self.path)
        self.categories = self.annotations.categories
        self.transforms, self.return_masks = transforms, return_masks

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        size = tuple(self.annotations.sizes[index].tolist())
        image = read_image(self.images, index, size)
        objects = self.annotations.of_image(index)
        objects.pop("ids")
        single = objects["iscrowd"] == 0
        target = {name: values[single] for name, values in objects.items()}
        canvas = (image.height, image.width)
        corners = clip_boxes_to_image(box_convert(target["boxes"], "xywh", "xyxy"), canvas)
        target["boxes"] = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=canvas)
        target["image_id"] = self.annotations.image_ids[index : index + 1].clone()
        target["orig_size"] = torch.tensor(canvas)
        if self.return_masks:
            if canvas != size:  # the masks have that size
                annotated = f"annotated {size[0]} x {size[1]}"
                raise OSError(f"{self.name(index)}: {image.height} x {image.width} pixels, {annotated}")
            segmentations = self.annotations.segmentations_of_image(index)
            chosen = [segmentations[i] for i in single.nonzero().flatten().tolist()]
            target["masks"] = decode_masks(chosen, *canvas)
        return transformed(self.transforms, image, target, self.name(index))

    def name(self, index: int) -> str:
        """The path of image number ``index``, for messages."""
        return self.images.name(index)


def read_image(images: FilesInFolder | FilesInZip, index: int, size: Sequence[int]) -> Image.Image:
    """Image number ``index`` in RGB, in the frame of its boxes; see ``decode_in_frame``.

    Raises: OSError: it cannot be read or decoded; the message names it.
    """
    return decode_in_frame(images.read(index), images.name(index), size)


def decode_in_frame(data: bytes, name: str, size: Sequence[int]) -> Image.Image:
    """An encoded image in RGB, in the frame of its annotated ``size`` (height, width).

    As published, it stays as stored, unless the annotated size is that of the image after its EXIF rotation.
    """
    image = decode_image(data, name)
    if tuple(size) == image.size != image.size[::-1]:
        return decode_image(data, name, upright=True)
    return image


def transformed(transforms: Callable, image: Image.Image, target: dict[str, Tensor], name: str) -> tuple[Tensor, dict]:
    """The item after ``transforms``, without empty boxes.

    Raises: RuntimeError: a transform failed. That is not the image's fault, so it must not be skipped as unreadable.
    """
    try:
        return transforms(image, drop_empty_boxes(target))
    except Exception as error:  # not the image's fault: it must not be skipped as unreadable
        raise RuntimeError(f"{name}: the augmentation failed on this image ({error})") from error
