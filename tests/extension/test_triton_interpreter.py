"""Starts triton_cases.py in a process of its own, where Triton's interpreter runs its kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parents[1] / "helpers" / "triton_cases.py"


@pytest.mark.long
def test_all_cases_pass_in_the_interpreter():
    pytest.importorskip("triton")
    # Triton reads the variable when it is imported, and a kernel stays interpreted: hence the process.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout, result.stdout[-2000:]
