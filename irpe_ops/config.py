# SPDX-License-Identifier: Apache-2.0
"""Which relative position encoding: a frozen config, and the spec strings that name one."""

import math
import numbers
import re
from dataclasses import dataclass, replace

from irpe_ops.methods import coefficients, find_method, maps_of, whole_number
from irpe_ops.modes import MODES

MAX_BUCKETS = 1 << 16  # per table, the limit of rpe_ops_cuda's kernels; more can only be a typo
RPE_ON = ("q", "k", "v", "qk", "qv", "kv", "qkv")
SPEC_FORMAT = "rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}"


@dataclass(frozen=True)
class RPEConfig:
    """One encoding, checked and in lower case.

    Attributes:
        ratio: ``alpha, beta, gamma = ratio * (1, 2, 8)``, in patches; at least 0.5: below, all share one bucket.
        method: how two positions become a bucket: ``euc``, ``quant``, ``cross``, ``product`` or a registered one.
        mode: ``ctx`` (the token's vector times the table; alias ``contextual``) or ``bias`` (the table alone).
        shared_head: one table for all heads, or one for each.
        skip: leading tokens without a position (class, distillation, registers).
        rpe_on: which of queries, keys and values are encoded: ``q k v qk qv kv qkv``, letters in any order.
    Raises: ValueError: naming the field, the expected value and the given one.
    Source: Wu et al., ICCV 2021.
    """

    ratio: float = 1.9
    method: str = "product"
    mode: str = "ctx"
    shared_head: bool = True
    skip: int = 0
    rpe_on: str = "k"

    def __post_init__(self) -> None:
        method, mode, rpe_on = find_method(self.method), _lower(self.mode), _lower(self.rpe_on)
        rpe_on = "".join(sorted(rpe_on, key="qkv".find))  # kq is qk
        mode = "ctx" if mode == "contextual" else mode
        if mode not in MODES:
            yours = ", or your own: IRPE_PLUGINS names the module that adds it"
            raise ValueError(f"unknown mode {self.mode!r}; expected one of {', '.join(MODES)} (or contextual){yours}")
        if rpe_on not in RPE_ON:
            raise ValueError(f"unknown rpe_on {self.rpe_on!r}; expected one of {', '.join(RPE_ON)}")
        if "v" in rpe_on and not MODES[mode].on_values:
            raise ValueError(
                f"mode {mode!r} with rpe_on {rpe_on!r}: this mode adds to attention scores, and values have none; "
                "use mode 'ctx', or leave v out of rpe_on"
            )
        if self.shared_head not in (0, 1):
            raise ValueError(f"shared_head is True or False (1 or 0 in a spec), not {self.shared_head!r}")
        skip = whole_number("skip, the number of leading tokens,", self.skip, 0)
        checked = dict(ratio=_check_ratio(self.ratio, method), method=method, mode=mode, rpe_on=rpe_on, skip=skip)
        for name, value in {**checked, "shared_head": bool(self.shared_head)}.items():
            object.__setattr__(self, name, value)

    @property
    def alpha(self) -> float:
        """Where the exact part of the piecewise index ends, in patches."""
        return coefficients(self.ratio)[0]

    @property
    def beta(self) -> float:
        """The largest bucket."""
        return coefficients(self.ratio)[1]

    @property
    def gamma(self) -> float:
        """The distance at which ``beta`` is reached, in patches."""
        return coefficients(self.ratio)[2]

    @property
    def num_buckets(self) -> int:
        """``N``, including the bucket of the leading tokens; summed over the tables of a method with several."""
        return sum(row.buckets(self.ratio, self.skip) for row in maps_of(self.method).values())

    @property
    def rpe_q(self) -> "RPEConfig | None":
        """The encoding on queries alone, None if there is none; ``rpe_k`` and ``rpe_v`` likewise."""
        return self._on("q")

    @property
    def rpe_k(self) -> "RPEConfig | None":
        return self._on("k")

    @property
    def rpe_v(self) -> "RPEConfig | None":
        return self._on("v")

    def _on(self, role: str) -> "RPEConfig | None":
        return replace(self, rpe_on=role) if role in self.rpe_on else None

    @property
    def spec(self) -> str:
        """The spec string that names this config (``skip`` is not part of it)."""
        ratio = repr(self.ratio).removesuffix(".0")
        return f"rpe-{ratio}-{self.method}-{self.mode}-{int(self.shared_head)}-{self.rpe_on}"


get_rpe_config = RPEConfig
"""`RPEConfig` under its published name."""


def parse_rpe_spec(spec: str, skip: int = 0) -> RPEConfig:
    """The config that a spec string names, e.g. ``"rpe-2.0-product-ctx-1-k"``.

    Raises: ValueError: quoting the spec, the wrong part and the format.
    """
    if not isinstance(spec, str):
        raise ValueError(f"an rpe spec is a string, not {type(spec).__name__}. Format: {SPEC_FORMAT}")
    # The ratio may contain a minus sign (an exponent, or negative), so a plain split at "-" would not do.
    match = re.fullmatch(r"rpe-(.+)-([^-]*)-([^-]*)-([^-]*)-([^-]*)", spec.strip(), flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"rpe spec {spec!r}: expected six parts joined by '-'. Format: {SPEC_FORMAT}")
    ratio, method, mode, shared_head, rpe_on = match.groups()
    try:
        if shared_head not in ("0", "1"):
            raise ValueError(f"shared_head is 0 or 1, not {shared_head!r}")
        return RPEConfig(_number(ratio), method, mode, shared_head == "1", skip, rpe_on)
    except ValueError as error:
        raise ValueError(f"rpe spec {spec!r}: {error}. Format: {SPEC_FORMAT}") from None


def _check_ratio(ratio: float, method: str) -> float:
    """``ratio`` as a float, if it gives at least one bucket per side and no huge table."""
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 0 < ratio < math.inf:
        raise ValueError(f"ratio is a positive number, not {ratio!r}")
    size = float(min(ratio, MAX_BUCKETS + 1) if isinstance(ratio, int) else ratio)  # an int may be too large for it
    if coefficients(size)[1] < 1:
        raise ValueError(f"ratio {ratio!r} leaves a single bucket for all distances; use at least 0.5")
    if size > MAX_BUCKETS or any(row.buckets(size, skip=1) > MAX_BUCKETS for row in maps_of(method).values()):
        raise ValueError(f"ratio {ratio!r} asks {method!r} for more than {MAX_BUCKETS:,} buckets; use a smaller one")
    return size


def _number(text: str) -> float:
    try:
        if re.search(r"[^-+.0-9a-z]", text, flags=re.IGNORECASE):  # Python would take 1_9 for 19
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError(f"ratio is a positive number, not {text!r}") from None


def _lower(value: object) -> str:
    return value.lower() if isinstance(value, str) else ""
