# SPDX-License-Identifier: Apache-2.0
"""How the kernels of `triton_kernels` are compiled and launched: arguments, tiles, and tokens in chunks."""

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from irpe_ops.buckets import count_buckets

# Triton's interpreter runs the kernels on the CPU, for tests without a GPU. Triton reads this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COLUMN_MULTIPLE = 8  # rows of halves then start at multiples of 16 bytes, which loads and products want
CHUNK_BYTES = 64 << 20  # of weights, or gradients of scores, that wait to be summed by bucket; at least one tile a head


class Arguments(NamedTuple):
    """What both operators are given; their schemas are made of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    lookup_k: Tensor | None
    lookup_q: Tensor | None
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    seed: Tensor | None
    offsets: Tensor | None
    name: str  # methods and ratio, as one string, which no compiler takes for a symbol
    height: int
    width: int
    skip: int
    on_values: bool
    dropout_p: float
    scale: float

    @property
    def columns(self) -> int:
        """Of a lookup, all parts together."""
        methods, ratio = self.name.split(":")
        counts = [count_buckets(method, 2 * float(ratio), self.skip) for method in methods.split(",")]
        return sum(n + -n % COLUMN_MULTIPLE for n in counts)


class Chunk(NamedTuple):
    """Tokens ``first`` to ``first + rows`` of every head, and room for what is summed by bucket of theirs."""

    first: int
    rows: int
    programs: int
    kept: Tensor  # (B * H, rows, kept_row), empty where nothing is summed
    peaks: int  # (B * H, rows, tiles) fp32 numbers


class Launch:
    """The arguments that all kernels share, taken apart, and the shape of the launch."""

    def __init__(self, arguments: Arguments, grad_out: Tensor | None = None) -> None:
        q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, offsets, *_, dropout_p, scale = arguments
        q, k, v = (_rows_adjacent(x) for x in (q, k, v))
        self.q = q
        batch, heads, length, head_dim = q.shape
        on_k, on_q = lookup_k is not None, lookup_q is not None
        lookup_k, lookup_q = (q if x is None else _rows_adjacent(x) for x in (lookup_k, lookup_q))
        parts, table_size = (1, 0) if offsets is None else offsets.shape
        padded = COLUMN_MULTIPLE if offsets is None else arguments.columns // parts
        self.table = q if offsets is None else offsets
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.contiguous().view(torch.uint8)
        kind = "none" if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "float"
        mask = q if attn_mask is None else attn_mask.view(torch.uint8) if kind == "bool" else attn_mask
        padding = q if key_padding_mask is None else key_padding_mask
        self.tensors = (q, k, v, lookup_k, lookup_q, self.table, padding, mask)
        self.seed = q if seed is None else seed
        self.strides = [stride for x in (q, k, v, lookup_k, lookup_q) for stride in x.stride()[:3]]
        self.strides += mask.stride() if attn_mask is not None else [0] * 4
        if grad_out is not None:
            self.grad_out = _rows_adjacent(grad_out)
            self.strides += self.grad_out.stride()[:3]
        self.grid = (length, arguments.height, arguments.width, arguments.skip, table_size)
        self.sizes = (heads, *self.grid, scale, dropout_p)
        self.planes, self.length, self.kept_row = batch * heads, length, length + -length % COLUMN_MULTIPLE
        self.constants = constants(q.dtype, head_dim, padded, generation(q.device)) | {
            "ON_K": on_k, "ON_Q": on_q, "ON_V": arguments.on_values, "PADDING": key_padding_mask is not None,
            "MASK": kind, "DROPOUT": dropout_p > 0, "PARTS": parts,
        }  # fmt: skip

    def chunks(self, block: str, *, kept: bool) -> Iterator[Chunk]:
        """All tokens in tiles of the constant ``block``, at once unless too much would be kept."""
        tile, rows = self.constants[block], self.length
        if kept and self.q.numel():
            row_bytes = self.planes * self.kept_row * self.q.element_size()
            rows = min(rows, max(1, CHUNK_BYTES // (row_bytes * tile)) * tile)
        room = self.q.new_empty(self.planes * rows * self.kept_row if kept else 0)
        for first in range(0, self.length, max(rows, 1)):
            here = min(rows, self.length - first)
            peaks = self.planes * here * -(-self.length // self.constants["BLOCK_N"])
            yield Chunk(first, here, self.planes * -(-here // tile), room, peaks)

    def __call__(self, kernel, chunk: Chunk, *tensors: Tensor) -> None:
        if self.q.numel():
            with torch.cuda.device_of(self.q):
                kernel[(chunk.programs,)](
                    *self.tensors, self.seed, *tensors, *self.strides, *self.sizes, chunk.first, chunk.rows,
                    self.kept_row, **self.constants,
                )  # fmt: skip

    def sum(self, chunk: Chunk, sums: Tensor, peaks: Tensor | None = None, log_sums: Tensor | None = None) -> None:
        """What the chunk has kept, by bucket, into ``sums``; with ``peaks`` and ``log_sums`` it is weights."""
        from irpe_ops.backends import triton_kernels

        if not self.q.numel():
            return
        relative, parts, padded = peaks is not None, self.constants["PARTS"], self.constants["PADDED"]
        columns = max(16, power_of_two(parts * padded))
        planes = min(max(16, power_of_two(self.planes)), 64 if columns <= 128 else 32)
        with torch.cuda.device_of(self.q):
            triton_kernels.sum_kernel[(chunk.rows, -(-self.planes // planes))](
                chunk.kept, peaks if relative else chunk.kept, log_sums if relative else chunk.kept, self.table, sums,
                self.planes, *self.grid, chunk.first, chunk.rows, self.kept_row,
                RELATIVE=relative, PARTS=parts, PADDED=padded, BLOCK_P=planes, BLOCK_N=self.constants["BLOCK_N"],
                ALL_COLUMNS=columns, INTERPRETED=INTERPRETED, num_warps=4, num_stages=3,
            )  # fmt: skip


def power_of_two(n: int) -> int:
    """The least one that is not below ``n``."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache
def generation(device: torch.device) -> int:
    """The first number of the GPU's compute capability: 8 is Ampere and Ada, 9 Hopper, 10 and 12 Blackwell."""
    return 9 if INTERPRETED else torch.cuda.get_device_capability(device)[0]


generation._dynamo_marked_constant = True  # called while torch.compile traces


def constants(dtype: torch.dtype, head_dim: int, padded: int, generation: int) -> dict:
    """How a kernel is compiled for these sizes: docs/benchmarks/README.md counts what other tiles cost."""
    columns, head = max(16, power_of_two(padded)), max(16, power_of_two(head_dim))
    # Four warps of 16 rows each divide a tile of 64 without computing anything twice. A wider tile is worth its
    # registers where Hopper's matrix instructions read both factors from shared memory. fp32 needs twice the registers.
    wide = dtype != torch.float32
    return {
        "PADDED": padded,
        "COLUMNS": columns,
        "HEAD_DIM": head_dim,
        "HEAD": head,
        "BLOCK_M": 64 if wide and columns <= 128 else 32,
        "BLOCK_N": 64 if wide and columns <= 128 and head <= 64 and generation == 9 else 32,
        "PRECISION": "ieee" if dtype != torch.float32 else fp32_products(),
        "INTERPRETED": INTERPRETED,
        "num_warps": 4 if wide else 8,
        "num_stages": 2 if wide else 1,
    }


def fp32_products() -> str:
    """``ieee``, exact to fp32, unless the user has allowed ``tf32`` by any of PyTorch's switches."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # the older question raises once the newer switch has been used
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def _rows_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
