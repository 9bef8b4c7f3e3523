"""From two positions on a grid to the number of a bucket: the piecewise index and the four methods."""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

# `cross` consists of two maps, each with its own table.
MAPS = ("euc", "quant", "product", "cross_rows", "cross_cols")


def piecewise_index(distance: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Bucket a signed distance: exact up to ``alpha``, then logarithmic, then clipped at ``beta``.

    Args:
        distance: any shape, in patches (squared patches for ``quant``).
        alpha, beta, gamma: where the exact part ends, the largest bucket, where it is reached; in patches.
    Returns: int64, the shape of ``distance``, in ``[-int(beta), int(beta)]``.
    Raises: ValueError: unless ``0 < alpha < beta < gamma``.
    Source: Wu et al., ICCV 2021, Eq. (18).
    """
    _check_coefficients(alpha, beta, gamma)
    size = distance.abs().float()
    # float32 and this order of operations decide exact ties (ratio 1.5 at distance 6), so they are part of the format.
    far = alpha + torch.log(size / alpha) / math.log(gamma / alpha) * (beta - alpha)
    # Clipped after rounding, at a bound that is no integer: ratio 1.9 clips 4 to 3.8, which truncates to bucket 3.
    far = far.round().clamp(max=beta)
    return (torch.where(size <= alpha, size.round(), far) * distance.sign()).long()


def get_bucket_ids_2d(
    method: str, height: int, width: int, skip: int, alpha: float, beta: float, gamma: float
) -> tuple[Tensor, int]:
    """The bucket of every pair of tokens on a ``height x width`` grid with ``skip`` leading tokens.

    Args:
        method: ``euc``, ``quant``, ``product``, ``cross_rows`` or ``cross_cols``, in any case.
        height, width: of the grid, in patches; ``L = height * width + skip``.
        alpha, beta, gamma: of `piecewise_index`; ``ratio * (1, 2, 8)`` in iRPE.
    Returns:
        ids: ``(L, L)`` int64 on the CPU, yours to change; row = query (the token that looks), column = key.
        num_buckets: ``N``; with ``skip > 0`` bucket ``N - 1`` is every pair with a leading token in it.
    Raises: ValueError: for an unknown method, ``cross`` (two maps), an empty grid or impossible coefficients.
    Source: Wu et al., ICCV 2021, section 3.2.2.
    """
    method = check_map(method)
    _check_coefficients(alpha, beta, gamma)
    for name, value, least in (("height", height, 1), ("width", width, 1), ("skip", skip, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"get_bucket_ids_2d: {name} must be an integer of at least {least}, not {value!r}")
    bucket_of = functools.partial(piecewise_index, alpha=alpha, beta=beta, gamma=gamma)
    # A map first made while evaluating must still serve training, which inference tensors cannot.
    with torch.inference_mode(False), torch.no_grad():
        ids = _pair_ids(method, height, width, skip, int(beta), bucket_of, torch.device("cpu"))
    return ids, count_buckets(method, beta, skip)


def count_buckets(method: str, beta: float, skip: int) -> int:
    """``N`` of one map: ``2 int(beta) + 1`` a signed axis, squared for ``product``, one more with leading tokens."""
    side = 2 * int(beta) + 1
    return (side * side if method == "product" else side) + (1 if skip else 0)


def check_map(method: str) -> str:
    """``method`` in lower case; ValueError unless it names one map."""
    name = method.lower() if isinstance(method, str) else method
    if name == "cross":
        raise ValueError("method 'cross' is two maps, each with its own table: ask for cross_rows and cross_cols")
    if name not in MAPS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(MAPS)}")
    return name


def bucket_map(method: str, ratio: float, height: int, width: int, skip: int, device: torch.device) -> Tensor:
    """The ids of `get_bucket_ids_2d` on ``device``, ``(L, L)``, from one bounded cache: treat them as read-only.

    uint8 where every id fits, int32 otherwise.
    """
    if type(torch.empty(0)) is not Tensor:  # shape propagation (FakeTensorMode): no cache, or it would keep fake maps
        return _make_map(method, ratio, height, width, skip, device)
    return _cached_map(method, ratio, height, width, skip, device)


def traced_bucket_map(
    method: str, ratio: str, beta: int, gamma: int, height: int, width: int, skip: int, device: torch.device
) -> Tensor:
    """`bucket_map` for ``torch.compile`` and ``torch.export``, where sizes may be symbols.

    A compiler may round a logarithm differently, so the piecewise index is a table made beforehand; it is constant from
    gamma on. ``ratio`` is the number's ``repr``, because a float may be traced as a symbol and the table may not;
    ``beta`` is ``int(2 * ratio)`` and ``gamma`` ``ceil(8 * ratio)``.
    """
    table = _table_of_index(ratio, device)

    def bucket_of(distance: Tensor) -> Tensor:
        return table[distance.abs().clamp(max=gamma)] * distance.sign()

    return _pair_ids(method, height, width, skip, beta, bucket_of, device).to(
        _id_dtype(count_buckets(method, beta, skip))
    )


def _make_map(method: str, ratio: float, height: int, width: int, skip: int, device: torch.device) -> Tensor:
    ids, num_buckets = get_bucket_ids_2d(method, height, width, skip, ratio, 2 * ratio, 8 * ratio)
    with torch.inference_mode(False):
        return ids.to(_id_dtype(num_buckets)).to(device)


# 32 maps of a 1,764-token DETR grid are 100 MB at one byte an id; a training run has more sizes than are worth keeping.
_cached_map = functools.lru_cache(maxsize=32)(_make_map)


def _table_of_index(ratio: str, device: torch.device) -> Tensor:
    """The piecewise index of 0, 1, ..., ceil(gamma), int64: a constant of the compiled graph."""
    return _cached_table(float(ratio), device)


# torch.compiler.assume_constant_result does this, but first imports torch._dynamo: seconds, in every process.
_table_of_index._dynamo_marked_constant = True


@functools.lru_cache(maxsize=32)
def _cached_table(ratio: float, device: torch.device) -> Tensor:
    def make() -> Tensor:
        distances = torch.arange(math.ceil(8 * ratio) + 1, device="cpu")
        return piecewise_index(distances, ratio, 2 * ratio, 8 * ratio).to(device)

    # A thread of its own has none of the caller's modes: while exporting, the caller's tensors are fake.
    with ThreadPoolExecutor(max_workers=1) as clean:
        return clean.submit(make).result()


def _id_dtype(num_buckets: int) -> torch.dtype:
    return torch.uint8 if num_buckets <= 256 else torch.int32


def _pair_ids(
    method: str,
    height: int,
    width: int,
    skip: int,
    centre: int,
    bucket_of: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tensor:
    """``(L, L)`` int64; ``bucket_of`` maps signed int64 distances to ``[-centre, centre]``."""
    rows, cols = torch.arange(height, device=device), torch.arange(width, device=device)
    drow = (rows[:, None] - rows)[:, None, :, None]  # (height, 1, height, 1)
    dcol = (cols[:, None] - cols)[None, :, None, :]  # (1, width, 1, width)
    ids = offset_ids(method, drow, dcol, centre, bucket_of)
    num_patches = height * width
    ids = ids.expand(height, width, height, width).reshape(num_patches, num_patches)
    return F.pad(ids, (skip, 0, skip, 0), value=count_buckets(method, centre, skip=0)) if skip else ids


def offset_ids(method: str, drow: Tensor, dcol: Tensor, centre: int, bucket_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The bucket of offsets ``(drow, dcol)``, query minus key, int64, that broadcast against each other."""
    if method == "product":
        return (bucket_of(drow) + centre) * (2 * centre + 1) + bucket_of(dcol) + centre
    if method == "cross_rows":
        return bucket_of(drow) + centre
    if method == "cross_cols":
        return bucket_of(dcol) + centre
    if method == "quant":
        return bucket_of(drow**2 + dcol**2) + centre
    # euc; no integer has a root ending in a half, so rounding is never in doubt
    return bucket_of((drow**2 + dcol**2).float().sqrt().round().long()) + centre


def _check_coefficients(alpha: float, beta: float, gamma: float) -> None:
    if not 0 < alpha < beta < gamma:
        raise ValueError(
            f"piecewise index: expected 0 < alpha < beta < gamma, got alpha={alpha}, beta={beta}, gamma={gamma}; "
            "iRPE uses ratio * (1, 2, 8)"
        )
