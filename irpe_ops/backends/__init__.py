# SPDX-License-Identifier: Apache-2.0
"""One file for each way to compute `rpe_attention` beside the definition, ``irpe_ops/attention.py``; and the choice.

A backend is a module with ``missing() -> str | None`` (why it does not exist on this machine), ``why_not(call) -> str |
None`` (why it cannot run this call) and ``attention(call) -> Tensor``.
"""

NAMES = ("sdpa", "compiled", "triton")


def module_of(name: str):
    """The module of a backend other than ``eager``, imported when it is first asked for."""
    # Import statements, not importlib: torch.compile can follow these.
    if name == "sdpa":
        from irpe_ops.backends import sdpa as module
    elif name == "compiled":
        from irpe_ops.backends import compiled as module
    else:
        from irpe_ops.backends import triton as module
    return module
