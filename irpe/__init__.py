"""The front door: ``irpe`` is the command, and ``from irpe import ...`` hands on the names of `irpe_ops`."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from irpe_ops import *  # noqa: F403

try:
    __version__ = version("irpe")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"


def __getattr__(name: str):
    import irpe_ops  # here, because importing PyTorch takes seconds and `irpe --help` must not

    if name == "__all__" or name in irpe_ops.__all__:
        return getattr(irpe_ops, name)
    raise AttributeError(f"module 'irpe' has no attribute {name!r}")
