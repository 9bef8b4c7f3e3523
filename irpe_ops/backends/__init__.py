# SPDX-License-Identifier: Apache-2.0
"""One file for each way to compute `rpe_attention` (``eager.py`` is the definition), and the choice among them.

A backend is a module with ``missing() -> str | None`` (why it is not available here), ``why_not(call) -> str | None``
(why it cannot run this call) and ``attention(call) -> Tensor``.
"""

NAMES = ("eager", "sdpa", "compiled", "triton")


def module_of(name: str):
    """The module of a backend, imported on first use."""
    # Import statements, not importlib: torch.compile can follow these.
    if name == "eager":
        from irpe_ops.backends import eager as module
    elif name == "sdpa":
        from irpe_ops.backends import sdpa as module
    elif name == "compiled":
        from irpe_ops.backends import compiled as module
    else:
        from irpe_ops.backends import triton as module
    return module
