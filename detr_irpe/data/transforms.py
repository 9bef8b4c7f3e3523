# SPDX-License-Identifier: Apache-2.0
"""DETR's augmentation: torchvision's v2 operations on an image and its target together.

A transform takes and returns ``(image, target)``: a PIL image (a float tensor after ``ToModelInput``) and a dict whose
``boxes`` and ``masks`` are torchvision ``tv_tensors``, so that any transform of ``torchvision.transforms.v2`` can be
combined with these. All draw from torch's random state.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PER_OBJECT = ("boxes", "labels", "masks", "area", "iscrowd")


def train_transforms(image_size: int = 800) -> nn.Module:
    """The published augmentation; every size scales with ``image_size``, the largest short side.

    A flip; then, with equal probability, a random short side (480 to 800 in steps of 32, the long side at most 1333),
    or a short side of 400, 500 or 600, a random crop of 384 to 600 per side, and then the random short side.
    Source: Carion et al., ECCV 2020, section 4 and appendix A.4.
    """

    def scaled(*sides: int) -> list[int]:
        return [max(round(side * image_size / 800), 1) for side in sides]

    to_random_size = RandomShortSide(scaled(*range(480, 801, 32)), max_size=_max_size(image_size))
    # Without our limit, 1 x 3000 pixels would become 600 x 1,800,000. It applies from 1 x 32 on.
    enlarged = RandomShortSide(scaled(400, 500, 600), max_size=scaled(32 * 600)[0])
    cropped = v2.Compose([enlarged, RandomSizeCrop(*scaled(384, 600)), to_random_size])
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([to_random_size, cropped]), ToModelInput()])


def eval_transforms(image_size: int = 800) -> nn.Module:
    """Short side ``image_size``, long side at most 1333 / 800 of it, no randomness."""
    return v2.Compose([RandomShortSide([image_size], max_size=_max_size(image_size)), ToModelInput()])


def resized_size(height: int, width: int, short: int, max_size: int | None = None) -> tuple[int, int]:
    """Height and width with the short side ``short``, or less if the long one would exceed ``max_size``.

    The rounding is the published one (the long side is truncated, not rounded), unlike torchvision's.
    """
    low, high = sorted((height, width))
    if max_size is not None and high / low * short > max_size:
        short = int(round(max_size * low / high))
    sides = (short, int(short * high / low)) if short else (1, max_size)
    return sides if height <= width else sides[::-1]


class RandomShortSide(nn.Module):
    """Resize (bilinear with antialiasing; masks: nearest) to a short side drawn from ``sizes``."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None) -> None:
        super().__init__()
        self.sizes, self.max_size = list(sizes), max_size

    def forward(self, image: Image.Image, target: dict) -> tuple[Image.Image, dict]:
        short = self.sizes[int(torch.randint(len(self.sizes), ()))]
        size = resized_size(image.height, image.width, short, self.max_size)
        scale = (size[1] / image.width) * (size[0] / image.height)
        changed = {name: F.resize(target[name], size) for name in ("boxes", "masks") if name in target}
        return F.resize(image, size), target | changed | {"area": target["area"] * scale}


class RandomSizeCrop(nn.Module):
    """Crop a random window of ``min_size`` to ``max_size`` pixels per side; objects outside it are dropped.

    A side shorter than ``min_size`` is kept whole. ``area`` becomes that of the clipped box, as published.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def forward(self, image: Image.Image, target: dict) -> tuple[Image.Image, dict]:
        height, width = self._draw_side(image.height), self._draw_side(image.width)
        top = int(torch.randint(image.height - height + 1, ()))
        left = int(torch.randint(image.width - width + 1, ()))
        window = (top, left, height, width)
        target = dict(target)
        for name in ("boxes", "masks"):
            if name in target:
                target[name] = F.crop(target[name], *window)  # boxes are clipped to the window
        target["area"] = (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1)
        return F.crop(image, *window), drop_empty_boxes(target)

    def _draw_side(self, length: int) -> int:
        low, high = min(self.min_size, length), min(self.max_size, length)
        return int(torch.randint(low, high + 1, ()))


class ToModelInput(nn.Module):
    """PIL image to a normalised (3, h, w) float tensor; boxes to centre, width, height in fractions of the image."""

    def forward(self, image: Image.Image, target: dict) -> tuple[Tensor, dict]:
        width, height = image.size
        boxes = box_convert(target["boxes"].as_subclass(Tensor), "xyxy", "cxcywh")
        target = target | {"boxes": boxes / torch.tensor([width, height, width, height], dtype=torch.float32)}
        if "masks" in target:
            target["masks"] = target["masks"].as_subclass(Tensor).bool()
        target["size"] = torch.tensor([height, width])
        return _normalised(image), target


def prepare_image(image: Image.Image, image_size: int = 800) -> Tensor:
    """One RGB image without annotations, as evaluation sees it -> (3, h, w)."""
    return _normalised(F.resize(image, resized_size(image.height, image.width, image_size, _max_size(image_size))))


def drop_empty_boxes(target: dict) -> dict:
    """``target`` without objects whose box has no area; ``boxes`` are corners in pixels."""
    keep = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(1)
    kept = {name: target[name][keep] for name in _PER_OBJECT if name in target}
    for name in ("boxes", "masks"):  # indexing drops the tv_tensor type
        if name in kept:
            kept[name] = tv_tensors.wrap(kept[name], like=target[name])
    return target | kept


def _max_size(image_size: int) -> int:
    return round(1333 * image_size / 800)


def _normalised(image: Image.Image) -> Tensor:
    return F.normalize(F.pil_to_tensor(image).to(torch.get_default_dtype()).div_(255), IMAGENET_MEAN, IMAGENET_STD)
