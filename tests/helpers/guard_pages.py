"""Tensors beside memory that nobody may touch: a kernel that reads or writes too far ends the process."""

import ctypes
import mmap

import torch
from torch import Tensor

_libc, PAGE = ctypes.CDLL(None), mmap.PAGESIZE


def guarded(tensor: Tensor, at_the_end: bool = True) -> Tensor:
    """A copy whose last (first) byte is the last (first) one before (after) a page that nobody may touch."""
    size = max(tensor.numel() * tensor.element_size(), 1)
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert _libc.mprotect(ctypes.c_void_p(base + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    start = PAGE + (pages * PAGE - size if at_the_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)
