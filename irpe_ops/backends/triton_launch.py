# SPDX-License-Identifier: Apache-2.0
"""How the kernels of `triton_kernels` are compiled and launched: arguments, tiles, and planes in chunks."""

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from irpe_ops.methods import bucket_map_named
from irpe_ops.rpe_index import constant_of_graphs

# Triton's interpreter runs the kernels on the CPU, for tests without a GPU. Triton reads this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COLUMN_MULTIPLE = 8  # half-precision rows then start at multiples of 16 bytes, as loads and products need
CHUNK_BYTES = 64 << 20  # of pair values per chunk, at least; a chunk has at least one plane


class Arguments(NamedTuple):
    """The arguments of both operators; their schemas are generated from it."""

    q: Tensor
    k: Tensor
    v: Tensor
    lookup_k: Tensor | None
    lookup_q: Tensor | None
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    seed: Tensor | None
    offsets: Tensor | None
    name: str  # methods and ratio, as one string, which no compiler makes symbolic
    height: int
    width: int
    skip: int
    on_values: bool
    dropout_p: float
    scale: float

    @property
    def columns(self) -> int:
        """Columns of a lookup, over all parts."""
        methods, ratio = self.name.split(":")
        counts = [bucket_map_named(method).buckets(float(ratio), self.skip) for method in methods.split(",")]
        return sum(n + -n % COLUMN_MULTIPLE for n in counts)


class Chunk(NamedTuple):
    """Planes ``first`` to ``first + planes`` of all ``B * H``."""

    first: int
    planes: int


class Launch:
    """All kernel arguments by name, and how the launches are shaped."""

    def __init__(self, arguments: Arguments, **gradients: Tensor) -> None:
        q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, offsets, *_ = arguments
        batch, heads, self.length, head_dim = q.shape
        self.q, self.planes, self.row = q, batch * heads, self.length + -self.length % COLUMN_MULTIPLE
        kind = "none" if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "float"
        if kind == "bool":
            attn_mask = attn_mask.view(torch.uint8)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.contiguous().view(torch.uint8)
        parts = 1 if offsets is None else len(offsets)
        columns = COLUMN_MULTIPLE if offsets is None else arguments.columns
        self.given = constants(q.dtype, head_dim, generation(q.device)) | {
            "padding": q if key_padding_mask is None else key_padding_mask,
            "mask": q if attn_mask is None else attn_mask,
            "seed": q if seed is None else seed,
            "offset_table": offsets,
            "heads": heads, "length": self.length, "row": self.row, "height": arguments.height,
            "width": arguments.width, "skip": arguments.skip, "table_size": 0 if offsets is None else offsets.shape[1],
            "scale": arguments.scale, "dropout_p": arguments.dropout_p,
            "drop_below": round(arguments.dropout_p * 65536),
            "ON_K": lookup_k is not None, "ON_Q": lookup_q is not None, "ON_V": arguments.on_values,
            "PADDING": key_padding_mask is not None, "MASK": kind, "DROPOUT": arguments.dropout_p > 0,
            "PARTS": parts, "PADDED": columns // parts, "ALL_PADDED": columns,
            "COLUMNS": max(16, power_of_two(columns)),
        }  # fmt: skip
        for name, x in {"q": q, "k": k, "v": v, **gradients}.items():
            self.given[name] = x = x if x.stride(-1) == 1 else x.contiguous()
            short = {"grad_out": "go", "grad_sums": "gs"}.get(name, name)
            self.given |= zip((f"{short}_batch", f"{short}_head", f"{short}_row"), x.stride(), strict=False)
        strides = (0,) * 4 if attn_mask is None else attn_mask.stride()
        self.given |= zip(("mask_batch", "mask_head", "mask_query", "mask_key"), strides, strict=True)

    def chunks(self, buffers: int) -> Iterator[Chunk]:
        """All planes at once, unless that many ``buffers`` of pairs would be too large."""
        if self.q.numel():
            plane_bytes = self.length * self.row * self.q.element_size() * buffers
            step = min(self.planes, max(1, chunk_bytes(self.q.device) // plane_bytes)) if buffers else self.planes
            for first in range(0, self.planes, step):
                yield Chunk(first, min(step, self.planes - first))

    def room(self, chunk: Chunk) -> Tensor:
        """An uninitialized value for each pair of tokens."""
        return self.q.new_empty(chunk.planes, self.length, self.row)

    def spread(self, chunk: Chunk, lookup: Tensor | None) -> Tensor | None:
        """The entry of ``lookup (B, H, L, N)`` for the bucket of each pair of tokens."""
        if lookup is None:
            return None
        if lookup.stride(-1) != 1 or any(stride % COLUMN_MULTIPLE for stride in lookup.stride()[:3]):
            lookup = lookup.contiguous()
        pairs = self.room(chunk)
        self._by_token("spread_kernel", chunk, spread_tiles(self.row), lookup, lookup=lookup, pairs=pairs)
        return pairs

    def sum(self, chunk: Chunk, pairs: Tensor, sums: Tensor, peaks: Tensor | None = None, log_sums=None) -> None:
        """Sum pairs by bucket, into the chunk's part of ``sums (B, H, L, N)``, whose columns are adjacent.

        With ``peaks`` and ``log_sums`` the pairs are the weights that `forward_kernel` has kept.
        """
        tiles = sum_tiles(self.q.dtype, self.given["COLUMNS"], chunk.planes) | {"BLOCK_N": self.given["BLOCK_N"]}
        self._by_token("sum_kernel", chunk, tiles, sums, pairs=pairs, sums=sums, peaks=peaks, log_sums=log_sums,
                       RELATIVE=peaks is not None)  # fmt: skip

    def _by_token(self, kernel: str, chunk: Chunk, tiles: dict, bucketed: Tensor, **more) -> None:
        strides = dict(zip(("batch_stride", "head_stride", "row_stride"), bucketed.stride(), strict=False))
        others = -(-self.row // tiles["BLOCK_N"]) if kernel == "spread_kernel" else 1
        grid = (self.length, -(-chunk.planes // tiles["BLOCK_P"]), others)
        self._run(kernel, grid, chunk, **tiles, **strides, **more)

    def by_tile(self, kernel: str, block: str, chunk: Chunk, **more) -> None:
        """Run a kernel whose programs take BLOCK_M queries, or BLOCK_N keys, of one plane; ``more``: its arguments."""
        self._run(kernel, (chunk.planes * -(-self.length // self.given[block]),), chunk, **more)

    def _run(self, kernel: str, grid: tuple[int, ...], chunk: Chunk, **more) -> None:
        from irpe_ops.backends import triton_kernels

        function = getattr(triton_kernels, kernel)
        given = self.given | chunk._asdict() | more
        given |= {name: self.q for name, x in more.items() if x is None}  # a pointer that is never read
        with torch.cuda.device_of(self.q):
            function[grid](*[given[name] for name in function.arg_names], **options(given))


def options(given: dict) -> dict:
    """What the compiler takes beside the kernel's arguments; Triton 3.10 will fuse products with sums only if asked."""
    return {"num_warps": given["num_warps"], "num_stages": given["num_stages"], "enable_fp_fusion": True}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache
def chunk_bytes(device: torch.device) -> int:
    """Memory for the pairs of one chunk: 1/64 of the GPU's. More chunks mean more launches."""
    return CHUNK_BYTES if INTERPRETED else max(CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // 64)


@constant_of_graphs
def generation(device: torch.device) -> int:
    """The first number of the GPU's compute capability: 8 is Ampere and Ada, 9 Hopper, 10 and 12 Blackwell."""
    return 9 if INTERPRETED else torch.cuda.get_device_capability(device)[0]


def constants(dtype: torch.dtype, head_dim: int, generation: int) -> dict:
    """Compile-time constants of the kernels that take a tile of one plane. Other tiles: docs/benchmarks/README.md."""
    head = max(16, power_of_two(head_dim))
    # Four warps of 16 rows each split a tile of 64 without duplicate work. fp32 needs twice the registers.
    wide = dtype != torch.float32
    return {
        "HEAD_DIM": head_dim,
        "HEAD": head,
        "BLOCK_M": 64 if wide else 32,
        "BLOCK_N": 64 if wide and head <= 64 and generation >= 9 else 32,
        "PRECISION": "ieee" if wide else fp32_products(),
        "INTERPRETED": INTERPRETED,
        "num_warps": 4 if wide else 8,
        "num_stages": 2 if wide else 1,
        "KEY_STAGES": 3 if wide and head <= 64 and generation == 9 else 2 if wide else 1,
    }


def spread_tiles(row: int) -> dict:
    """Compile-time constants of `spread_kernel`: one token, with others along a row, in some planes."""
    return {"BLOCK_P": 16, "BLOCK_N": min(256, max(64, power_of_two(row))), "num_warps": 4, "num_stages": 1}


def sum_tiles(dtype: torch.dtype, columns: int, planes: int) -> dict:
    """Compile-time constants of `sum_kernel`, apart from BLOCK_N."""
    most = 64 if columns <= 128 and dtype != torch.float32 else 32
    return {"BLOCK_P": min(max(16, power_of_two(planes)), most), "num_warps": 4, "num_stages": 3}


def fp32_products() -> str:
    """``ieee``, exact to fp32, unless the user has allowed ``tf32`` by any of PyTorch's switches."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
