# SPDX-License-Identifier: Apache-2.0
"""Tells the C library what to do with memory freed by a run on the CPU."""

import ctypes
import os

# From glibc's malloc.h, with the environment variable for the same setting; in bytes.
_SETTINGS = (
    (-1, "MALLOC_TRIM_THRESHOLD_", 1 << 30),
    (-2, "MALLOC_TOP_PAD_", 64 << 20),
    (-3, "MALLOC_MMAP_THRESHOLD_", 1 << 30),
)


def keep_freed_memory() -> bool:
    """Let this process keep freed memory instead of returning it to the system and faulting it in again each step.

    Variables set by the user win. Returns: False if the C library has no ``mallopt`` (musl, macOS, Windows).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: CDLL(None) does not exist on Windows
        return False
    return all([mallopt(setting, value) == 1 for setting, name, value in _SETTINGS if name not in os.environ])
