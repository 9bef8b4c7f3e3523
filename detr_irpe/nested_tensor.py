# SPDX-License-Identifier: Apache-2.0
"""A batch of images of different sizes: padded to one size, with a mask of the padding."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

SMALL = 1 << 16  # bytes; masks may be larger, and stay in shared memory


class NestedTensor:
    """Padded images and their mask.

    Attributes:
        tensors: ``(B, C, H, W)``, zero where padded.
        mask: ``(B, H, W)`` bool, True = padding.
    """

    def __init__(self, tensors: Tensor, mask: Tensor):
        if mask.dtype != torch.bool:  # ~mask is bitwise for integers
            raise ValueError(f"the mask of a batch is bool, True = padding; got {mask.dtype}.")
        self.tensors, self.mask = tensors, mask

    @classmethod
    def from_images(cls, images: Sequence[Tensor] | Tensor) -> "NestedTensor":
        """Pad images ``(C, h, w)`` at the bottom and right, to the largest height and the largest width among them.

        Args: images: a list of them, or images of one size as ``(B, C, h, w)``.
        """
        if len({image.shape[:-2] for image in images}) != 1 or images[0].ndim != 3:
            shapes = [tuple(image.shape) for image in images]
            raise ValueError(f"a batch is one or more images (C, h, w) with the same C; got shapes {shapes}.")
        height = max(image.shape[1] for image in images)
        width = max(image.shape[2] for image in images)
        tensors = images[0].new_zeros(len(images), images[0].shape[0], height, width)
        mask = torch.ones(len(images), height, width, dtype=torch.bool, device=tensors.device)
        for index, image in enumerate(images):
            _, h, w = image.shape
            tensors[index, :, :h, :w] = image
            mask[index, :h, :w] = False
        return cls(tensors, mask)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "NestedTensor":
        """Both tensors on ``device``."""
        return NestedTensor(*(t.to(device, non_blocking=non_blocking) for t in self.decompose()))

    def pin_memory(self) -> "NestedTensor":
        """Both tensors in page-locked memory; a ``DataLoader(pin_memory=True)`` calls this."""
        return NestedTensor(self.tensors.pin_memory(), self.mask.pin_memory())

    def decompose(self) -> tuple[Tensor, Tensor]:
        """``(tensors, mask)``."""
        return self.tensors, self.mask

    def __repr__(self) -> str:
        return f"NestedTensor(tensors={tuple(self.tensors.shape)}, padding={self.mask.float().mean():.0%})"


class Targets(list):
    """The targets of a batch; their small tensors leave a worker process as values.

    In shared memory, PyTorch's default, each takes a file descriptor and a mapping. Eight per image take longer
    than reading a small image, and soon end in "too many open files".
    """

    def __reduce__(self):
        def packed(value):
            return value.numpy() if isinstance(value, Tensor) and value.nbytes <= SMALL else value

        return _targets_of, ([{name: packed(value) for name, value in target.items()} for target in self],)


def _targets_of(arrays: list[dict]) -> Targets:
    return Targets(
        {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in target.items()}
        for target in arrays
    )


def collate(batch: Sequence[tuple[Tensor, dict]]) -> tuple[NestedTensor, Targets]:
    """``[(image, target), ...]`` as a data set yields them -> ``(NestedTensor, [target, ...])``."""
    images, targets = zip(*batch, strict=True)
    images = NestedTensor.from_images(images)
    if get_worker_info() is not None:  # here the main process is told if it is full; later PyTorch would lose the batch
        for tensor in (*images.decompose(), *(value for target in targets for value in target.values())):
            if tensor.nbytes > SMALL:
                tensor.share_memory_()
    return images, Targets(targets)
