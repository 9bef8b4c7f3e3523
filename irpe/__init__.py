# SPDX-License-Identifier: Apache-2.0
"""The front door: ``irpe`` is the command, and ``from irpe import ...`` re-exports the names of `irpe_ops`."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from irpe_ops import *  # noqa: F403

try:
    __version__ = version("irpe")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"


# Names of the published irpe.py that are not here, and what to use instead (docs/migrate.md).
MOVED = {
    "METHOD": "methods are strings: method='euc', 'quant', 'cross' or 'product'",
    "iRPE": "build_rpe(config, head_dim, num_heads) makes the modules; their class is irpe_ops.modules.IRPE",
    "iRPE_Cross": "build_rpe(config, head_dim, num_heads) makes the modules, also for method 'cross'",
    "get_single_rpe_config": "get_rpe_config(..., rpe_on='k')",
    "get_num_buckets": "get_bucket_ids_2d(...) returns the ids and the number of buckets",
    "piecewise_index": "irpe_ops.methods.piecewise_index(distance, alpha, beta, gamma)",
    "RPEIndexFunction": "rpe_index(input, index)",
}


def __getattr__(name: str):
    import irpe_ops  # here, because importing PyTorch takes seconds and `irpe --help` must not

    if name == "__all__" or name in irpe_ops.__all__:
        return getattr(irpe_ops, name)
    if name in MOVED:  # an ImportError, because `from irpe import name` hides the message of an AttributeError
        raise ImportError(f"irpe has no {name}: {MOVED[name]} (docs/migrate.md)")
    raise AttributeError(f"module 'irpe' has no attribute {name!r}")


def __dir__() -> list[str]:
    import irpe_ops

    return [*irpe_ops.__all__, "__version__"]
