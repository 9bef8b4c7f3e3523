# SPDX-License-Identifier: Apache-2.0
"""A list of byte strings in two flat tensors, which worker processes share instead of copying."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class PackedStrings:
    """A read-only sequence of ``bytes``, stored end to end in shared memory.

    A Python list of a million small objects is gradually copied into every data loading worker, because reading an
    object writes its reference count. Two tensors in shared memory are not, however the workers are started.
    """

    def __init__(self, items: Iterable[bytes]) -> None:
        items = list(items)
        self._ends = shared(np.cumsum([0, *map(len, items)], dtype=np.int64))
        self._bytes = shared(np.frombuffer(b"".join(items) or b"\0", dtype=np.uint8).copy())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        start, end = self._ends[index : index + 2].tolist()
        return self._bytes[start:end].numpy().tobytes()


def shared(column: np.ndarray) -> Tensor:
    """The array as a tensor in memory that worker processes share."""
    return torch.from_numpy(np.ascontiguousarray(column)).share_memory_()
