# SPDX-License-Identifier: Apache-2.0
"""The transforms of DeiT: augmentation in training, resize and centre crop in evaluation."""

import itertools

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from timm.data import auto_augment, create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms
from torchvision.transforms.functional import center_crop

THINNEST = 64  # long side to short side; the ends of a thinner image would be cut off anyway


def build_transform(
    train: bool,
    input_size: int | tuple[int, int] = 224,
    *,
    color_jitter: float = 0.4,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    hflip: float = 0.5,
) -> transforms.Compose:
    """The augmentation of DeiT, or its evaluation transform.

    Images of up to 32 pixels are shifted in training, neither cropped nor scaled, as published.

    Args:
        interpolation: of crops, and of rotations where Pillow supports it.
        input_size: pixels, one number or (height, width). Evaluation resizes the short side to 256/224 of it (of its
            longer side if it is not square), then crops the centre.
    Raises: ValueError: timm has no such policy, or a number is out of range.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    small = max(size) <= 32
    to_size = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)  # leaves images of that size unchanged
    if train:
        # Pillow crops with every filter, but rotates with only three
        geometry = "bicubic" if interpolation in ("lanczos", "hamming") else interpolation
        try:
            how = dict(color_jitter=color_jitter, auto_augment=aa or None, interpolation=geometry, hflip=hflip)
            erasing = dict(re_prob=reprob, re_mode=remode, re_count=recount)
            steps = create_transform(size, is_training=True, **how, **erasing).transforms
        except Exception as error:  # timm asserts on its policies
            raise ValueError(f"cannot build the augmentation (--aa {aa}, --reprob {reprob}, ...): {error}") from error
        if geometry != interpolation:
            steps[0].interpolation = str_to_interp_mode(interpolation)
        for step in steps:
            _allow_posterizing_to_no_bits(step)
        return transforms.Compose([to_size, transforms.RandomCrop(size, padding=4), *steps[1:]] if small else steps)
    resize = _ResizeShortSide(int(256 / 224 * max(size)), transforms.InterpolationMode.BICUBIC)
    cut = [to_size] if small else [resize, transforms.CenterCrop(size)]
    return transforms.Compose([*cut, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


class _ResizeShortSide(transforms.Resize):
    """Resizes the short side, but cuts very long images first: 1 x 100,000 pixels would not fit in memory."""

    def forward(self, image: Image.Image) -> Image.Image:
        longest = THINNEST * min(image.size)
        if max(image.size) > longest:
            image = center_crop(image, [min(image.height, longest), min(image.width, longest)])
        return super().forward(image)


def _allow_posterizing_to_no_bits(policy) -> None:
    """timm's policies ask for 0 bits at magnitude 10, which gave a black image until Pillow began to refuse it."""
    subpolicies = getattr(policy, "policy", [getattr(policy, "ops", [])])
    for op in itertools.chain.from_iterable(subpolicies):
        if getattr(op, "aug_fn", None) is auto_augment.posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    return image.point(lambda _: 0) if bits_to_keep < 1 else auto_augment.posterize(image, bits_to_keep)
