# SPDX-License-Identifier: Apache-2.0
"""Bucket ids for pairs of positions on a grid: maps of whole grids, on any device, in one cache."""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ops.methods import (
    BucketMap,
    bucket_map_named,
    check_coefficients,
    coefficients,
    find_map,
    ids_of,
    offset_ids,
    piecewise_index,
    whole_number,
)
from irpe_ops.rpe_index import constant_of_graphs


def get_bucket_ids_2d(
    method: str, height: int, width: int, skip: int, alpha: float, beta: float, gamma: float
) -> tuple[Tensor, int]:
    """The bucket of every pair of tokens on a ``height x width`` grid with ``skip`` leading tokens.

    Args:
        method: ``euc``, ``quant``, ``product``, ``cross_rows``, ``cross_cols`` or a registered one, in any case.
        height, width: of the grid, in patches; ``L = height * width + skip``.
        alpha, beta, gamma: of `piecewise_index`; ``ratio * (1, 2, 8)`` in iRPE.
    Returns:
        ids: ``(L, L)`` int64 on the CPU, yours to modify; row = query, column = key.
        num_buckets: ``N``; with ``skip > 0`` bucket ``N - 1`` holds every pair with a leading token.
    Raises: ValueError: for an unknown method, ``cross`` (two maps), an empty grid or impossible coefficients;
        for ids of a registered method that are not int64 or out of range on this grid.
    Source: Wu et al., ICCV 2021, section 3.2.2.
    """
    method = find_map(method)
    check_coefficients(alpha, beta, gamma)
    sizes = (("height", height, 1), ("width", width, 1), ("skip", skip, 0))
    height, width, skip = (whole_number(f"get_bucket_ids_2d: {name}", value, least) for name, value, least in sizes)
    row = bucket_map_named(method)
    # A map built during evaluation must also work in training, where inference tensors do not.
    with torch.inference_mode(False), torch.no_grad():
        ids = offset_ids(row, (alpha, beta, gamma), height, width, f"bucket map {method!r}")
        num_buckets = row.num_buckets(int(beta)) + (1 if skip else 0)
        return _pairs_of(ids, height, width, skip, num_buckets), num_buckets


def bucket_map(method: str, ratio: float, height: int, width: int, skip: int, device: torch.device) -> Tensor:
    """The ids of `get_bucket_ids_2d` on ``device``, ``(L, L)``, from one bounded cache: treat them as read-only.

    uint8 if every id fits, int32 otherwise.
    """
    if type(torch.empty(0)) is not Tensor:  # FakeTensorMode: no cache, or it would keep fake maps
        return _make_map(bucket_map_named(method), ratio, height, width, skip, device)
    return _kept(_cached_map(bucket_map_named(method), ratio, height, width, skip, device))


def traced_bucket_map(
    method: str, ratio: str, beta: int, gamma: int, height: int, width: int, skip: int, device: torch.device
) -> Tensor:
    """`bucket_map` for ``torch.compile`` and ``torch.export``, where sizes may be symbolic.

    A compiler may round a logarithm differently, so the piecewise index is a precomputed table; it is constant from
    gamma on. ``ratio`` is the number's ``repr``, because a float may be traced as a symbol, but the table must not
    depend on one; ``beta`` is rounded down and ``gamma`` up.
    """
    rows, cols = torch.arange(height, device=device), torch.arange(width, device=device)
    drow = (rows[:, None] - rows)[:, None, :, None]  # (height, 1, height, 1)
    dcol = (cols[:, None] - cols)[None, :, None, :]  # (1, width, 1, width)
    row, bucket_of = bucket_map_named(method), _traced_index(ratio, gamma, device)
    ids = ids_of(row, drow, dcol, bucket_of, beta, f"bucket map {method!r}").reshape(height * width, height * width)
    num_buckets = row.num_buckets(beta)
    if skip:
        ids, num_buckets = F.pad(ids, (skip, 0, skip, 0), value=num_buckets), num_buckets + 1
    return ids.to(_id_dtype(num_buckets))


def ids_by_lane(ids: Tensor) -> Tensor:
    """A uint8 map ``(L, L)`` in the order a GPU's lanes read it: `Ids` of rpe_ops_cuda's attention_kernels.h.

    Computed once per map and kept with it. Treat it as read-only.
    Returns: ``(2, M, M, 32, 8)``, M x M blocks of 16 x 16, padded with zeros: by query, and by key.
    """
    if torch.compiler.is_compiling() or type(ids) is not Tensor:
        return _ordered_by_lane(ids)
    if not hasattr(ids, "_irpe_by_lane"):
        with torch.inference_mode(False), torch.no_grad():
            ids._irpe_by_lane = _synchronized(_ordered_by_lane(ids))
    return ids._irpe_by_lane


def _ordered_by_lane(ids: Tensor) -> Tensor:
    blocks = -(-len(ids) // 16)
    padding = 16 * blocks - len(ids)
    ids = F.pad(ids, (0, padding, 0, padding))
    # Row 8 i + g and column 8 j + 2 t + c of a block.
    maps = [x.reshape(blocks, 2, 8, blocks, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6) for x in (ids, ids.mT)]
    return torch.stack([x.reshape(blocks, blocks, 32, 8) for x in maps])


def offset_map(method: str, ratio: float, height: int, width: int, device: torch.device) -> Tensor:
    """The bucket of every offset between two tokens, flattened; cached, so read-only.

    Offset (rows, columns) is at ``rows * (2 width - 1) + columns``, counted from the smallest. As many entries
    again, plus one, follow for pairs with a leading token.
    """
    if type(torch.empty(0)) is not Tensor:
        return _make_offsets(bucket_map_named(method), ratio, height, width, device)
    return _kept(_cached_offsets(bucket_map_named(method), ratio, height, width, device))


def traced_offset_map(
    method: str, ratio: str, beta: int, gamma: int, height: int, width: int, device: torch.device
) -> Tensor:
    """`offset_map` for ``torch.compile``; see `traced_bucket_map`."""
    rows, cols = torch.arange(1 - height, height, device=device), torch.arange(1 - width, width, device=device)
    row, bucket_of = bucket_map_named(method), _traced_index(ratio, gamma, device)
    ids = ids_of(row, rows[:, None], cols[None, :], bucket_of, beta, f"bucket map {method!r}")
    return _with_leading(ids, row.num_buckets(beta))


def _traced_index(ratio: str, gamma: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    table = _table_of_index(ratio, device)
    return lambda distance: table[distance.abs().clamp(max=gamma)] * distance.sign()


def _make_offsets(row: BucketMap, ratio: float, height: int, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        ids = offset_ids(row, coefficients(ratio), height, width, "bucket map")
        return _to_device(_with_leading(ids, row.buckets(ratio, skip=0)), device)


def _with_leading(ids: Tensor, bucket: int) -> Tensor:
    return F.pad(ids.flatten(), (0, ids.numel() + 1), value=bucket).to(_id_dtype(bucket + 1))


def _to_device(ids: Tensor, device: torch.device) -> Tensor:
    """``ids`` copied to the device, asynchronously on CUDA."""
    # On other devices, such as MPS, the copy might read this memory after it is freed. Fake tensors cannot be pinned.
    if device.type != "cuda" or type(ids) is not Tensor:
        return ids.to(device)
    return ids.pin_memory().to(device, non_blocking=True)


def _make_map(row: BucketMap, ratio: float, height: int, width: int, skip: int, device: torch.device) -> Tensor:
    """`get_bucket_ids_2d` for grids that change from step to step.

    Only ``(2 height - 1)(2 width - 1)`` ids are computed and sent, asynchronously; the device expands them to pairs.
    """
    num_buckets = row.buckets(ratio, skip)
    with torch.inference_mode(False), torch.no_grad():
        ids = offset_ids(row, coefficients(ratio), height, width, "bucket map").to(_id_dtype(num_buckets))
        return _pairs_of(_to_device(ids, device), height, width, skip, num_buckets)


def _pairs_of(offsets: Tensor, height: int, width: int, skip: int, num_buckets: int) -> Tensor:
    """The ids of all pairs of tokens, ``(L, L)``, from those of all offsets (see `offset_ids`)."""
    # Key (0, 0) has offset (r, c) from query (r, c), and later keys have smaller ones: windows of the flipped map.
    windows = offsets.flip(0, 1).unfold(0, height, 1).unfold(1, width, 1)  # (height, width, height, width)
    ids = windows.flip(0, 1).reshape(height * width, height * width)
    return F.pad(ids, (skip, 0, skip, 0), value=num_buckets - 1) if skip else ids


def _synchronized(ids: Tensor) -> Tensor:
    """``ids``, synchronized if the caller uses its own CUDA stream: another stream may find them in the cache."""
    if ids.device.type == "cuda":
        stream = torch.cuda.current_stream(ids.device)
        if stream != torch.cuda.default_stream(ids.device):
            stream.synchronize()
    return ids


# 32 maps of a 1,764-token DETR grid are 100 MB at one byte per id; a training run has too many sizes to keep them all.
_cached_map = functools.lru_cache(maxsize=32)(lambda *key: _synchronized(_make_map(*key)))
_cached_offsets = functools.lru_cache(maxsize=256)(lambda *key: _synchronized(_make_offsets(*key)))


_read_by_graphs: set[Tensor] = set()


def _kept(ids: Tensor) -> Tensor:
    """``ids``, kept forever if a CUDA graph is being captured: replays read them, cached or not."""
    if ids.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _read_by_graphs.add(ids)
    return ids


@constant_of_graphs
def _table_of_index(ratio: str, device: torch.device) -> Tensor:
    """The piecewise index of 0, 1, ..., ceil(gamma), int64."""

    def make() -> Tensor:
        alpha, beta, gamma = coefficients(float(ratio))
        distances = torch.arange(math.ceil(gamma) + 1, device="cpu")
        return piecewise_index(distances, alpha, beta, gamma).to(device)

    # A fresh thread has none of the caller's modes: during export the caller's tensors are fake.
    with ThreadPoolExecutor(max_workers=1) as clean:
        return clean.submit(make).result()


def _id_dtype(num_buckets: int) -> torch.dtype:
    return torch.uint8 if num_buckets <= 256 else torch.int32
