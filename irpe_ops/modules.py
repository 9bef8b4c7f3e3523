# SPDX-License-Identifier: Apache-2.0
"""The encodings as modules: one learned table each, on queries, keys or values."""

import functools
import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irpe_ops.buckets import bucket_map, offset_map, traced_bucket_map, traced_offset_map
from irpe_ops.config import RPEConfig
from irpe_ops.methods import bucket_map_named, find_map, maps_of, whole_number
from irpe_ops.modes import MODES, product, without_autocast
from irpe_ops.rpe_index import not_dense, rpe_index, rpe_index_adjoint


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on ``device``; None if it is off, and on ``meta``."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


class IRPE(nn.Module):
    """One relative position encoding with one table.

    Args:
        config: mode, ratio, shared_head, skip.
        head_dim, num_heads: ``D`` and ``H`` of its attention.
        role: ``"q"``, ``"k"`` or ``"v"``: what it encodes.
        method: the bucket map, if not the config's method but a part of it, such as ``cross_rows``.

    The table starts at zero, so that a fresh encoding changes nothing: ``lookup_table_weight`` (``ctx``) is
    ``(H or 1, D, N)`` on q and k and ``(H or 1, N, D)`` on v; ``lookup_table_bias`` (``bias``) is ``(H or 1, N)``.
    Source: Wu et al., ICCV 2021, Eq. (13) to (15).
    """

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, role: str, method: str | None = None) -> None:
        super().__init__()
        self.method = find_map(method or config.method)
        self.mode, self.shared_head, self.skip, self.ratio = config.mode, config.shared_head, config.skip, config.ratio
        self.head_dim, self.num_heads, self.role = head_dim, num_heads, role
        self._coefficients = (repr(self.ratio), int(config.beta), math.ceil(config.gamma))  # traced_bucket_map
        self.num_buckets = bucket_map_named(self.method).buckets(self.ratio, self.skip)
        mode = MODES[self.mode]
        shape = mode.shape(1 if self.shared_head else num_heads, head_dim, self.num_buckets)
        if role == "v":
            shape = (*shape[:-2], shape[-1], shape[-2])
        self.register_parameter(mode.parameter, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the table; also called for models first built on the device ``meta``."""
        nn.init.zeros_(self.table)

    @property
    def table(self) -> nn.Parameter:
        """The one parameter, whatever the mode calls it."""
        return getattr(self, MODES[self.mode].parameter)

    @property
    def uses_tokens(self) -> bool:
        """Whether the tokens' vectors matter, and not only their positions."""
        return MODES[self.mode].uses_tokens

    @property
    def parts(self) -> tuple["IRPE", ...]:
        """The single-table encodings that add up to this one: itself."""
        return (self,)

    def bucket_ids(self, length: int, height: int | None, width: int | None, device: torch.device) -> Tensor:
        """The ``(L, L)`` map of this encoding for a sequence of ``length`` tokens. Shared: treat it as read-only.

        Raises: ValueError: if the tokens do not fit the grid (see `resolve_grid`).
        """
        height, width = resolve_grid(length, height, width, self.skip, f"rpe_{self.role}")
        if torch.compiler.is_compiling():
            return traced_bucket_map(self.method, *self._coefficients, height, width, self.skip, device)
        return bucket_map(self.method, self.ratio, height, width, self.skip, device)

    def offset_ids(self, height: int, width: int, device: torch.device) -> Tensor:
        """The bucket of every offset between two tokens, in the order of `buckets.offset_map`. Also read-only."""
        if torch.compiler.is_compiling():
            return traced_offset_map(self.method, *self._coefficients, height, width, device)
        return offset_map(self.method, self.ratio, height, width, device)

    def lookup(
        self, x: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None, columns_multiple: int = 1
    ) -> Tensor:
        """What every bucket would add to the scores of every token, for an encoding on queries or keys.

        Args:
            x: ``(B, H, L, D)``; for k the queries, for q the keys. scale: factor of ``x``, applied to the table.
            dtype: of the product; None means the table's.
            columns_multiple: N is padded with zeros to a multiple of this.
        Returns: ``(B, H, L, N)``, or broadcastable to it; column ``N - 1`` is for leading tokens, if there are any.
        """
        mode = MODES[self.mode]
        with without_autocast(x.device):
            table = self.table
            if columns_multiple > 1:
                table = F.pad(table, (0, -self.num_buckets % columns_multiple))
            if mode.uses_tokens:
                table = table if scale == 1.0 else table * scale
                x = x.to(dtype or table.dtype)
            return mode.lookup(x, table)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """What this encoding adds to the scores (q, k) or to the output (v) of attention.

        Args:
            x: for k the scaled queries, for q the scaled keys, ``(B, H, L, D)``; for v the weights ``(B, H, L, L)``.
            height, width: of the token grid; None means the square grid of ``L - skip`` tokens.
        Returns: ``(B, H, L, L)`` for q (to be transposed) and k, in ``bias`` mode with batch 1 and ``H or 1`` heads;
            ``(B, H, L, D)`` for v. Under autocast the lookup is done in the dtype of the table, fp32.
        Raises: ValueError: for shapes or dtypes that do not fit the table or the grid.
        """
        self._check(x)
        length = x.shape[2]
        ids = self.bucket_ids(length, height, width, x.device)
        if self.role != "v":
            return rpe_index(self.lookup(x), ids)  # (B, H, L, L)
        with without_autocast(x.device):
            sums = rpe_index_adjoint(x.to(self.table.dtype), ids, self.num_buckets)  # (B, H, L, N)
            return product(sums, self.table)  # (B, H, L, D)

    def _check(self, x: Tensor) -> None:
        name = f"rpe_{self.role}"
        if kind := not_dense(x):
            raise ValueError(f"{name}: expected a dense tensor, not {kind}")
        last = "L" if self.role == "v" else "D"
        if x.dim() != 4 or (last == "L" and x.shape[2] != x.shape[3]):
            raise ValueError(f"{name}: expected (B, H, L, {last}), got {tuple(x.shape)}")
        self.check_fits(x, tokens=self.role != "v")

    def check_fits(self, x: Tensor, *, tokens: bool) -> None:
        """Raises: ValueError: ``x (B, H, L, ...)`` has not the heads or the device of the table, or its dtype without
        autocast; or it has ``tokens`` in its last dimension, of another D.
        """
        name, table, (_, heads, _, dim) = f"rpe_{self.role}", self.table, x.shape
        if tokens and dim != self.head_dim:
            raise ValueError(f"{name}: built for head_dim={self.head_dim}, got D={dim} in {tuple(x.shape)}")
        if not self.shared_head and heads != self.num_heads:
            raise ValueError(f"{name}: built for {self.num_heads} heads, got H={heads} in {tuple(x.shape)}")
        if x.device != table.device:
            raise ValueError(f"{name}: its table is on {table.device} and its input on {x.device}; move one of them")
        if x.dtype != table.dtype and autocast_dtype(x.device) is None:
            raise ValueError(f"{name}: its table is {table.dtype}, its input {x.dtype}; cast one or use torch.autocast")

    def extra_repr(self) -> str:
        heads = "shared" if self.shared_head else self.num_heads
        sizes = f"buckets={self.num_buckets}, heads={heads}, skip={self.skip}"
        return f"on {self.role}, {self.method}, {self.mode}, ratio={self.ratio:g}, {sizes}"


class IRPESum(nn.Module):
    """A method with several maps (``cross``): the sum of one encoding for each, ``rp_rows`` and ``rp_cols``."""

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, role: str) -> None:
        super().__init__()
        self.role = role
        for name in maps_of(config.method):
            part = name.removeprefix(f"{config.method}_")
            self.add_module(f"rp_{part}", IRPE(config, head_dim, num_heads, role, name))

    @property
    def parts(self) -> tuple[IRPE, ...]:
        """The single-table encodings that add up to this one; for ``cross`` rows, then columns."""
        return tuple(self.children())

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """As `IRPE.forward`."""
        return functools.reduce(operator.add, (part(x, height, width) for part in self.parts))


def build_rpe(
    config: RPEConfig | None, head_dim: int, num_heads: int
) -> tuple[IRPE | IRPESum | None, IRPE | IRPESum | None, IRPE | IRPESum | None]:
    """The modules ``(rpe_q, rpe_k, rpe_v)`` that a config asks for; the others are None.

    Raises: ValueError: for a head_dim or num_heads below 1; TypeError: for a config of another type.
    """
    if config is None:
        return None, None, None
    if not isinstance(config, RPEConfig):
        raise TypeError(f"build_rpe: expected get_rpe_config(...) or parse_rpe_spec(...), got {config!r}")
    head_dim = whole_number("build_rpe: head_dim", head_dim, 1)
    num_heads = whole_number("build_rpe: num_heads", num_heads, 1)
    kind = IRPE if len(maps_of(config.method)) == 1 else IRPESum
    return tuple(kind(config, head_dim, num_heads, role) if role in config.rpe_on else None for role in "qkv")


def resolve_grid(length: int, height: int | None, width: int | None, skip: int, name: str) -> tuple[int, int]:
    """The grid of a sequence: ``(height, width)`` as given, or the square of ``length - skip`` tokens.

    Raises: ValueError: for one side without the other, non-integers, or a ``length`` other than
        ``height * width + skip``.
    """
    if (height is None) != (width is None):
        raise ValueError(f"{name}: got height={height} and width={width}; give both, or neither for a square grid")
    if height is None:
        side = int(math.sqrt(max(length - skip, 0)))
        if side < 1 or side * side + skip != length:
            remedy = "pass height and width (equip: grid=(height, width)), or build the encoding with the right skip"
            raise ValueError(f"{name}: L={length} minus skip={skip} leading tokens is not a square grid; {remedy}")
        return side, side
    height, width = whole_number(f"{name}: height", height, 1), whole_number(f"{name}: width", width, 1)
    if height * width + skip != length:
        raise ValueError(
            f"{name}: height={height}, width={width} gives {height * width} tokens and the table expects skip={skip} "
            f"leading ones; got L={length}, not {height * width + skip}"
        )
    return height, width


def buckets_of(model: nn.Module) -> int:
    """Buckets of the first encoding in ``model``, rows plus columns for ``cross``; 0 without an encoding."""
    encodings = (module for module in model.modules() if isinstance(module, (IRPE, IRPESum)))
    return sum(part.num_buckets for part in getattr(next(encodings, None), "parts", ()))
