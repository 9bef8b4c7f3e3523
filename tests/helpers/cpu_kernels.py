"""The instruction sets that the compiled CPU kernels can use on this machine."""

import torch


def capabilities() -> list[str]:
    """The best one first; "generic" runs anywhere."""
    best = torch.ops.irpe.cpu_capability()
    return ["generic", *(name for name in ("avx2", "avx512") if name <= best and best != "generic")][::-1]
