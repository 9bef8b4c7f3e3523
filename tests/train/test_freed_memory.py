"""Whether freed memory stays with the process: page faults are counted in fresh ones."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from irpe_train import distributed
from irpe_train.freed_memory import keep_freed_memory

CALLS = """
import resource
from irpe_train.freed_memory import keep_freed_memory

keep_freed_memory()


def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [bytearray(12 << 20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


print([faults_of_a_step() for _ in range(8)][-1])
"""


def faults(**environment: str) -> int:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))} | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **environment,
    }
    command = [sys.executable, "-c", CALLS]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    kept = faults()
    # The user's setting wins; 48 MB are then faulted in again, in small pages or in large ones.
    handed_back = faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert 4 * kept < handed_back


def test_a_run_on_the_cpu_asks_for_it_at_its_start(monkeypatch):
    """The C library happens to keep some memory unasked, so page faults do not always show it."""
    asked = []
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: asked.append("once"))
    assert distributed.start(device="cpu").type == "cpu" and asked == ["once"]


def test_a_missing_mallopt_is_not_an_error(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
