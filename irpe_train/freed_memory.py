# SPDX-License-Identifier: Apache-2.0
"""What the C library does with the memory that a run on the CPU frees."""

import ctypes
import os

# Of glibc's malloc.h, with the variable by which a user sets the same; bytes.
_SETTINGS = (
    (-1, "MALLOC_TRIM_THRESHOLD_", 1 << 30),
    (-2, "MALLOC_TOP_PAD_", 64 << 20),
    (-3, "MALLOC_MMAP_THRESHOLD_", 1 << 30),
)


def keep_freed_memory() -> bool:
    """Let this process keep freed memory instead of handing it back to the system and faulting it in anew each step.

    Variables that the user set win. Returns: False where the C library has no ``mallopt`` (musl, macOS, Windows).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of the process itself
        return False
    return all([mallopt(setting, value) == 1 for setting, name, value in _SETTINGS if name not in os.environ])
