"""The formulas of iRPE as nested loops, in fp64: slow, short, and checked by hand in tests/ops/test_oracles.py."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def piecewise(distance: float, ratio: float) -> int:
    """g(x) of Eq. (18) for one signed distance; ``round`` is half to even, as ``torch.round``."""
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    size = abs(distance)
    if size <= alpha:
        bucket = round(size)
    else:
        bucket = int(min(round(alpha + math.log(size / alpha) / math.log(gamma / alpha) * (beta - alpha)), beta))
    return bucket if distance >= 0 else -bucket


def bucket_of_pair(method: str, drow: int, dcol: int, ratio: float) -> int:
    """The bucket of a query ``drow`` rows and ``dcol`` columns after a key; neither is a leading token."""
    b = int(2 * ratio)
    if method == "product":
        return (piecewise(drow, ratio) + b) * (2 * b + 1) + piecewise(dcol, ratio) + b
    if method == "cross_rows":
        return piecewise(drow, ratio) + b
    if method == "cross_cols":
        return piecewise(dcol, ratio) + b
    squared = drow * drow + dcol * dcol
    return piecewise(squared if method == "quant" else round(math.sqrt(squared)), ratio) + b


def bucket_ids(method: str, height: int, width: int, skip: int, ratio: float) -> Tensor:
    """``(L, L)`` int64: `bucket_of_pair` for every two tokens, one more bucket for pairs with a leading token."""
    length, b = height * width + skip, int(2 * ratio)
    leading = (2 * b + 1) ** 2 if method == "product" else 2 * b + 1
    ids = torch.full((length, length), leading, dtype=torch.int64)
    for i in range(skip, length):
        for j in range(skip, length):
            (row_i, col_i), (row_j, col_j) = divmod(i - skip, width), divmod(j - skip, width)
            ids[i, j] = bucket_of_pair(method, row_i - row_j, col_i - col_j, ratio)
    return ids


def lookup(input: Tensor, index: Tensor) -> Tensor:
    """``output[b, h, i, j] = input[b, h, i, index[i, j]]``."""
    output = input.new_zeros(*input.shape[:2], *index.shape)
    for b, h, i, j in _cells(output):
        output[b, h, i, j] = input[b, h, i, index[i, j]]
    return output


def sum_into_buckets(grad: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """``output[b, h, i, n]`` = the sum of ``grad[b, h, i, j]`` over the ``j`` with ``index[i, j] == n``, in fp64."""
    output = torch.zeros(*grad.shape[:3], num_buckets, dtype=torch.float64)
    for b, h, i, j in _cells(grad):
        output[b, h, i, index[i, j]] += grad[b, h, i, j].double()
    return output


def encode(rpe: nn.Module, x: Tensor, height: int, width: int) -> Tensor:
    """The result of a module of `build_rpe` for ``x``, in fp64; a bias is expanded over batch and heads."""
    total = torch.zeros((), dtype=torch.float64)
    for part in rpe.parts:
        ids = bucket_ids(part.method, height, width, part.skip, part.ratio)
        table = part.table.detach().double()
        batch, heads, length, width_of_x = x.shape
        output = torch.zeros(batch, heads, length, table.shape[-1] if part.role == "v" else length, dtype=torch.float64)
        for b in range(batch):
            for h in range(heads):
                of_head = table[0 if part.shared_head else h]
                for i in range(length):
                    for j in range(length):
                        n = ids[i, j]
                        if part.mode == "bias":
                            output[b, h, i, j] = of_head[n]
                        elif part.role == "v":
                            output[b, h, i] += x[b, h, i, j].double() * of_head[n]
                        else:
                            for d in range(width_of_x):
                                output[b, h, i, j] += x[b, h, i, d].double() * of_head[d, n]
        total = total + output
    return total


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_q: nn.Module | None,
    rpe_k: nn.Module | None,
    rpe_v: nn.Module | None,
    height: int,
    width: int,
    *,
    excluded: Tensor | None = None,
    added: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Encoded attention ``(B, H, L, D)`` in fp64, one query at a time.

    ``excluded`` (bool) and ``added`` (float) are ``(B, H, L, L)``; a query with every key excluded gives zeros.
    """
    q, k, v = q.detach().double(), k.detach().double(), v.detach().double()
    batch, heads, length, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    scores = torch.zeros(batch, heads, length, length, dtype=torch.float64)
    for b, h, i, j in _cells(scores):
        scores[b, h, i, j] = (q[b, h, i] * scale * k[b, h, j]).sum()
    if rpe_k is not None:
        scores += encode(rpe_k, q * scale, height, width)
    if rpe_q is not None:
        scores += encode(rpe_q, k * scale, height, width).transpose(2, 3)
    if added is not None:
        scores += added.double()
    weights = torch.zeros_like(scores)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                keys = [
                    j
                    for j in range(length)
                    if (excluded is None or not excluded[b, h, i, j]) and scores[b, h, i, j] > -math.inf
                ]
                if keys:
                    row = torch.exp(scores[b, h, i, keys] - scores[b, h, i, keys].max())
                    weights[b, h, i, keys] = row / row.sum()
    output = weights @ v
    return output if rpe_v is None else output + encode(rpe_v, weights, height, width)


def fill_tables(module: nn.Module, seed: int = 0, std: float = 0.5) -> None:
    """Normal values into every lookup table below ``module`` (fresh tables are zero and would hide mistakes)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lookup_table" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
            with torch.no_grad():
                parameter.copy_(values)


def assert_as_accurate_as_torch(ours: Tensor, torch_same_dtype: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """The largest error of ``ours`` is at most ``slack`` times that of plain PyTorch in the same dtype.

    ``exact`` is the fp64 answer; one rounding step of its largest value is granted on top.
    """
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == torch_same_dtype.dtype, f"dtype {ours.dtype}, expected {torch_same_dtype.dtype}"
    if exact.numel() == 0:
        return
    band = torch.finfo(ours.dtype).eps * exact.abs().max()
    error, theirs = (ours.double() - exact).abs().max(), (torch_same_dtype.double() - exact).abs().max()
    budget = slack * (theirs + band)
    assert error <= budget, f"error {error:.3e}, plain PyTorch {theirs:.3e}, allowed {budget:.3e}"


def _cells(tensor: Tensor) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, tensor.shape))
