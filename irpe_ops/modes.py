# SPDX-License-Identifier: Apache-2.0
"""What a table holds for a bucket, and what the scores get from it: a mode is one row of `MODES`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Mode(NamedTuple):
    """One way to fill a bucket.

    Attributes:
        parameter: the name of the table in checkpoints.
        shape: ``(heads, head_dim, num_buckets) -> shape`` of the table on queries and keys.
        lookup: ``(x (B, H, L, D), table) -> `` what each bucket adds to the scores of each token, to be broadcast to
            ``(B, H, L, N)``; linear in the table.
        uses_tokens: whether ``x`` matters beyond its shape; then it must have the table's head dimension.
        on_values: whether it exists on values too; the last two dimensions of the table are swapped, ``(heads, N, D)``.
    """

    parameter: str
    shape: Callable[[int, int, int], tuple[int, ...]]
    lookup: Callable[[Tensor, Tensor], Tensor]
    uses_tokens: bool
    on_values: bool


def _product(x: Tensor, table: Tensor) -> Tensor:
    # One table for all heads is one product of matrices, and so is its gradient.
    return x @ (table[0] if table.shape[0] == 1 else table)


def _table_alone(x: Tensor, table: Tensor) -> Tensor:
    return table[None, :, None, :].expand(-1, -1, x.shape[2], -1)  # (1, H or 1, L, N)


MODES = {
    "ctx": Mode("lookup_table_weight", lambda heads, dim, buckets: (heads, dim, buckets), _product, True, True),
    "bias": Mode("lookup_table_bias", lambda heads, dim, buckets: (heads, buckets), _table_alone, False, False),
}
