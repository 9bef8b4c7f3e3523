# SPDX-License-Identifier: Apache-2.0
"""The piecewise index and the methods built on it: a method is one row of `METHODS`, yours included."""

import contextlib
import importlib
import math
import operator
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


def piecewise_index(distance: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Bucket a signed distance: exact up to ``alpha``, then logarithmic, then clipped at ``beta``.

    Args:
        distance: any shape, in patches (squared patches for ``quant``).
        alpha, beta, gamma: where the exact part ends, the largest bucket, where it is reached; in patches.
    Returns: int64, the shape of ``distance``, in ``[-int(beta), int(beta)]``.
    Raises: ValueError: unless ``0 < alpha < beta < gamma``.
    Source: Wu et al., ICCV 2021, Eq. (18).
    """
    check_coefficients(alpha, beta, gamma)
    size = distance.abs().float()
    # float32 and this order of operations decide exact ties (ratio 1.5 at distance 6), so checkpoints depend on them.
    far = alpha + torch.log(size / alpha) / math.log(gamma / alpha) * (beta - alpha)
    # Clipped after rounding, at a bound that need not be an integer: ratio 1.9 clips 4 to 3.8, which truncates to 3.
    far = far.round().clamp(max=beta)
    return (torch.where(size <= alpha, size.round(), far) * distance.sign()).long()


def coefficients(ratio: float) -> tuple[float, float, float]:
    """``alpha, beta, gamma`` of `piecewise_index`, as published."""
    return ratio, 2 * ratio, 8 * ratio


def whole_number(name: str, value: object, least: int) -> int:
    """``value`` as an int, also NumPy's, or a size that is being traced.

    Raises: ValueError: naming ``name``, if it is not one, or below ``least``.
    """
    number = value
    if not isinstance(value, (int, torch.SymInt)):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    if isinstance(value, bool) or not isinstance(number, (int, torch.SymInt)) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    return number


def check_coefficients(alpha: float, beta: float, gamma: float) -> None:
    """Raises: ValueError: unless ``0 < alpha < beta < gamma``."""
    if not 0 < alpha < beta < gamma:
        raise ValueError(
            f"piecewise index: expected 0 < alpha < beta < gamma, got alpha={alpha}, beta={beta}, gamma={gamma}; "
            "iRPE uses ratio * (1, 2, 8)"
        )


class BucketMap(NamedTuple):
    """One map from the offset of two tokens to a bucket; its encoding has one table.

    Attributes:
        ids: ``(drow, dcol, index, beta) -> ids``. ``drow`` and ``dcol`` are int64, query minus key, in patches, and
            broadcast against each other. ``index`` is `piecewise_index` for the encoding's ratio, from int64 distances
            to int64 in ``[-beta, beta]``. Ids are int64 in ``[0, num_buckets(beta))``.
        num_buckets: ``beta -> N``, without the bucket for leading tokens; ``beta`` is ``int(2 * ratio)``.
    """

    ids: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor], int], Tensor]
    num_buckets: Callable[[int], int]

    def buckets(self, ratio: float, skip: int) -> int:
        """``N`` of an encoding's table: one more with leading tokens."""
        return self.num_buckets(int(coefficients(ratio)[1])) + (1 if skip else 0)


def one_signed_axis(beta: int) -> int:
    """The number of buckets of a signed distance."""
    return 2 * beta + 1


def _euclidean(drow, dcol, index, beta):
    # The root of an integer never ends in exactly one half, so rounding has no ties.
    return index((drow**2 + dcol**2).float().sqrt().round().long()) + beta


def _squared(drow, dcol, index, beta):
    return index(drow**2 + dcol**2) + beta


def _rows(drow, dcol, index, beta):
    return index(drow) + beta


def _columns(drow, dcol, index, beta):
    return index(dcol) + beta


def _rows_by_columns(drow, dcol, index, beta):
    return (index(drow) + beta) * (2 * beta + 1) + index(dcol) + beta


# A method with several maps is the sum of one encoding per map. Map "part" of method "name" is called "name_part".
METHODS: dict[str, BucketMap | dict[str, BucketMap]] = {
    "euc": BucketMap(_euclidean, one_signed_axis),
    "quant": BucketMap(_squared, one_signed_axis),
    "cross": {"rows": BucketMap(_rows, one_signed_axis), "cols": BucketMap(_columns, one_signed_axis)},
    "product": BucketMap(_rows_by_columns, lambda beta: (2 * beta + 1) ** 2),
}
_PUBLISHED = tuple(METHODS)
_PUBLISHED_IDS = (_euclidean, _squared, _rows, _columns, _rows_by_columns)


def register_bucket_method(
    name: str,
    ids: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor], int], Tensor],
    num_buckets: Callable[[int], int] = one_signed_axis,
) -> None:
    """Make ``name`` a method in spec strings, flags and grids.

    Args:
        name: lower-case letters, digits and underscores.
        ids, num_buckets: see `BucketMap`. ``ids`` may use only tensor operations, so that it can be compiled.
    Raises: TypeError: for ids or num_buckets that are no functions. ValueError: for a name that is malformed or taken,
        or ids that are not int64 in ``[0, num_buckets(beta))``.

    Programs that do not import your module (``python -m deit_irpe``) import the modules named in the environment
    variable ``IRPE_PLUGINS`` (separated by commas) before they read the first encoding or build a model.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"register_bucket_method: a name has a-z, 0-9 and _, and starts with a letter; got {name!r}")
    if not (callable(ids) and callable(num_buckets)):
        kinds = f"got {type(ids).__name__} and {type(num_buckets).__name__}"
        raise TypeError(f"register_bucket_method: {name!r}: expected two functions, as in BucketMap; {kinds}")
    taken = METHODS.get(name)
    if name in _PUBLISHED or name in _map_names() and taken is None:
        raise ValueError(f"register_bucket_method: {name!r} is a method of iRPE; choose another name")
    if taken is not None and _origin(taken.ids) != _origin(ids):  # equal if a notebook cell is run twice
        raise ValueError(f"register_bucket_method: {name!r} is registered already, by {'.'.join(_origin(taken.ids))}")
    row = BucketMap(ids, num_buckets)
    for ratio in (0.5, 1.9, 20.0):
        for height, width in ((4, 5), (40, 1), (1, 40)):
            offset_ids(row, coefficients(ratio), height, width, f"register_bucket_method: {name!r}")
    METHODS[name] = row


def _origin(function: Callable) -> tuple[str, str]:
    return getattr(function, "__module__", "") or "", getattr(function, "__qualname__", repr(function))


def find_method(name: object) -> str:
    """``name`` in lower case. Raises: ValueError: no such method, or no such module in ``IRPE_PLUGINS``."""
    import_plugins()
    method = name.lower() if isinstance(name, str) else None
    if method not in METHODS:
        yours = "(or your own: IRPE_PLUGINS names the module that registers it)"
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)} {yours}")
    return method


def maps_of(method: str) -> dict[str, BucketMap]:
    """The maps of a known method by name: one, or one for each part."""
    row = METHODS.get(method) or METHODS[find_method(method)]  # a config may be unpickled
    return {method: row} if isinstance(row, BucketMap) else {f"{method}_{part}": one for part, one in row.items()}


def find_map(name: object) -> str:
    """``name`` in lower case. Raises: ValueError: unless it names a single map."""
    wanted = name.lower() if isinstance(name, str) else None
    if wanted not in _map_names() and wanted not in METHODS:
        import_plugins()
    if wanted in _map_names():
        return wanted
    if wanted in METHODS:
        maps = " and ".join(maps_of(wanted))
        raise ValueError(f"method {wanted!r} is {len(METHODS[wanted])} maps, each with its own table: ask for {maps}")
    raise ValueError(f"unknown method {name!r}; expected one of {', '.join(_map_names())}")


def bucket_map_named(name: str) -> BucketMap:
    """The map of a name returned by `find_map`."""
    row = METHODS.get(name)
    if isinstance(row, BucketMap):
        return row
    method, _, part = name.rpartition("_")
    return METHODS[method][part] if method in METHODS else bucket_map_named(find_map(name))  # of an unpickled model


def _map_names() -> list[str]:
    return [name for method in list(METHODS) for name in maps_of(method)]  # another thread may register one


def import_plugins() -> None:
    """Import the modules that ``IRPE_PLUGINS`` names. Raises: ValueError: there is no such module."""
    names = (part.strip().removesuffix(".py") for part in os.environ.get("IRPE_PLUGINS", "").split(","))
    for module in filter(None, names):
        if os.getcwd() not in sys.path:  # python -m looks there, a console command does not
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"IRPE_PLUGINS={module}: {error}; put its folder on PYTHONPATH") from error
        except (Exception, SystemExit) as error:  # raised by the module itself, which may be a script
            raise ValueError(f"IRPE_PLUGINS={module}: {type(error).__name__}: {error}") from error


def offset_ids(
    row: BucketMap, alpha_beta_gamma: tuple[float, float, float], height: int, width: int, name: str
) -> Tensor:
    """The bucket of every offset on a grid, ``(2 height - 1, 2 width - 1)`` int64 on the CPU, smallest offset first.

    Raises: ValueError: see `ids_of`.
    """
    alpha, beta, gamma = alpha_beta_gamma
    index = partial(piecewise_index, alpha=alpha, beta=beta, gamma=gamma)
    drow = torch.arange(1 - height, height, device="cpu")[:, None]
    dcol = torch.arange(1 - width, width, device="cpu")[None, :]
    return ids_of(row, drow, dcol, index, int(beta), name)


def ids_of(
    row: BucketMap, drow: Tensor, dcol: Tensor, index: Callable[[Tensor], Tensor], beta: int, name: str
) -> Tensor:
    """``row.ids`` of these offsets, broadcast to their common shape.

    Raises: ValueError: naming ``name``, unless they are int64, of a fitting shape, in ``[0, num_buckets(beta))``;
        RuntimeError: for wrong values of a registered method under ``torch.compile``, when the graph runs.
    """
    ids, shape = row.ids(drow, dcol, index, beta), (drow + dcol).shape
    count = whole_number(f"{name}: num_buckets(beta)", row.num_buckets(beta), 1)
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name}: ids must be an int64 tensor, got {kind}")
    if ids.dim() > len(shape) or any(a not in (1, b) for a, b in zip(ids.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name}: ids must broadcast to {tuple(shape)}, as drow and dcol do, got {tuple(ids.shape)}")
    wanted = f"{name}: ids must lie in [0, {count}) for beta={beta}"
    if torch.compiler.is_compiling():
        if row.ids not in _PUBLISHED_IDS and not torch.compiler.is_exporting():  # exported gathers check their indices
            torch._assert_async((ids.min() >= 0) & (ids.max() < count), wanted)
    elif type(ids) is Tensor and not (int(ids.min()) >= 0 and int(ids.max()) < count):  # a fake tensor has no values
        raise ValueError(f"{wanted}, got {int(ids.min())} to {int(ids.max())}")
    return ids.expand(shape)
