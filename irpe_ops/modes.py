# SPDX-License-Identifier: Apache-2.0
"""The modes: what a table holds for a bucket, and what it adds to the scores. A mode is one row of `MODES`."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from irpe_ops.rpe_index import under_function_transform


class Mode(NamedTuple):
    """What a table holds for a bucket.

    Attributes:
        parameter: the name of the table in checkpoints.
        shape: ``(heads, head_dim, num_buckets) -> shape`` of the table on queries and keys.
        lookup: ``(x (B, H, L, D), table) ->`` what each bucket adds to the scores of each token, broadcastable to
            ``(B, H, L, N)``; linear in the table. Under autocast ``x`` may be half precision while the table is fp32:
            `product` takes both.
        uses_tokens: whether ``x`` matters beyond its shape; then it must have the table's head dimension.
        on_values: whether the mode also works on values; there the table's last two dimensions are swapped,
            ``(heads, N, D)``.
    """

    parameter: str
    shape: Callable[[int, int, int], tuple[int, ...]]
    lookup: Callable[[Tensor, Tensor], Tensor]
    uses_tokens: bool
    on_values: bool


def product(x: Tensor, table: Tensor) -> Tensor:
    """``(B, H, L, D)`` times ``(H or 1, D, N)`` in the dtype of ``x``; the gradient of ``table`` in its own dtype."""
    # torch.compile traces backward under the autocast around the call, even for code that switched autocast off.
    plain = x.dtype == table.dtype and not torch.compiler.is_compiling()
    if plain or torch.compiler.is_exporting() or under_function_transform():
        return _matmul(x, table.to(x.dtype))
    return _Product.apply(x, table)


def _matmul(x: Tensor, table: Tensor) -> Tensor:
    return _times(x, _matrix(x, table))


def _matrix(x: Tensor, table: Tensor) -> Tensor:
    """``table`` as `_times` takes it: ``(D, N)`` or ``(H, D, N)``; if packed, block-diagonal over the heads."""
    if not _is_packed(x):
        # With one table for all heads, the product and its gradient are a single matmul each.
        return table[0] if table.shape[0] == 1 else table
    heads, (dim, buckets) = x.shape[1], table.shape[1:]
    tables = x.new_zeros(heads, dim, heads, buckets)
    tables.diagonal(dim1=0, dim2=2).copy_(table.permute(1, 2, 0))
    return tables.view(heads * dim, heads * buckets)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    with without_autocast(x.device):
        if _is_packed(x):
            return (_tokens(x) @ matrix).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
        return x @ matrix


def _is_packed(x: Tensor) -> bool:
    """Whether ``x (B, H, L, D)`` holds many tokens on a GPU, each with its heads adjacent in memory.

    All heads then share one product with a block-diagonal matrix of their tables: multiplying the zeros costs less
    than copying ``x`` head by head.
    """
    if not x.is_cuda or x.shape[1] == 1 or x.shape[1] * x.shape[3] > 512 or x.shape[0] * x.shape[2] < 4096:
        return False
    return x.stride(1) == x.shape[3] and x.stride(3) == 1


def _tokens(x: Tensor) -> Tensor:
    """``(B, H, L, D) -> (B, L, H D)``."""
    return x.transpose(1, 2).flatten(2)


class _Product(torch.autograd.Function):
    """Autograd would round the table's gradient, a sum over 300,000 rows in DeiT-S, to half precision."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        matrix = _matrix(x, table.to(x.dtype))
        ctx.save_for_backward(x, table, matrix)
        return _times(x, matrix)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, table, matrix = ctx.saved_tensors
        grad_x, grad_table, packed = None, None, _is_packed(x)
        if ctx.needs_input_grad[0]:
            grad_x = _times(grad, matrix.mT) if packed == _is_packed(grad) else _matmul(grad, table.to(x.dtype).mT)
        if ctx.needs_input_grad[1]:
            a, b = (_tokens(t).flatten(0, 1)[None] if packed else _rows(t, len(table)) for t in (x, grad))
            with without_autocast(x.device):
                if table.dtype == torch.float32 and _sums_halves_in_fp32(x.device, x.dtype):
                    a, b = _in_groups(a, b)
                    grad_table = torch.bmm(a.mT, b, out_dtype=torch.float32)
                    if len(a) > len(table):
                        grad_table = grad_table.sum(0, keepdim=True)
                else:
                    grad_table = a.mT.to(table.dtype) @ b.to(table.dtype)
            if packed:  # of all pairs of heads, keep the diagonal
                pairs = grad_table.view(x.shape[1], x.shape[3], x.shape[1], -1)
                grad_table = pairs.diagonal(dim1=0, dim2=2).permute(2, 0, 1).sum_to_size(table.shape)
        return grad_x, grad_table


def _sums_halves_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a half-precision product can return fp32 without fp32 copies: not on ROCm or before Ampere."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.backends.cuda.matmul.allow_fp16_accumulation and dtype == torch.float16:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


_sums_halves_in_fp32._dynamo_marked_constant = True  # called while torch.compile traces


def _in_groups(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A pair of ``(1, rows, columns)`` split into groups of rows: one long product would not fill a GPU.

    Not in compiled graphs, which would recompile for each number of rows.
    """
    if len(a) > 1 or torch.compiler.is_compiling():
        return a, b
    tiles = -(-a.shape[2] // 128) * -(-b.shape[2] // 128)
    groups = next(n for n in range(max(1, 128 // tiles), 0, -1) if a.shape[1] % n == 0)
    return tuple(t.unflatten(1, (groups, -1)).flatten(0, 1) for t in (a, b))


def _rows(x: Tensor, tables: int) -> Tensor:
    """``(tables, rows, columns)``: the rows multiplied with each table."""
    return x.flatten(0, 2)[None] if tables == 1 else x.transpose(0, 1).flatten(1, 2)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast; it costs nothing if autocast is off, as on ``meta``."""
    # torch.compile traces backward under the autocast around the block, whatever the block switches off.
    if device.type == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _table_alone(x: Tensor, table: Tensor) -> Tensor:
    return table[None, :, None, :].expand(-1, -1, x.shape[2], -1)  # (1, H or 1, L, N)


MODES = {
    "ctx": Mode("lookup_table_weight", lambda heads, dim, buckets: (heads, dim, buckets), product, True, True),
    "bias": Mode("lookup_table_bias", lambda heads, dim, buckets: (heads, buckets), _table_alone, False, False),
}
