"""The CUDA kernels compile for the GPUs we name, and keep their variables in registers. Needs nvcc, no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "rpe_ops_cuda" / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of a CUDA toolkit")
def test_kernels_compile_without_spills(tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90")]
    command = ["nvcc", "-std=c++17", "-O3", *targets, "-t2", "-Xptxas=-v", "-c", *SOURCES]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", result.stderr)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert sorted({arch for _, arch in kernels}) == ["80", "90"]
    # 3 types of ids, each with 3 sizes of elements in the lookup, and 4, 4, 4 and 2 types in the kernels of the sums.
    assert len(kernels) == len(spills) == 2 * 3 * (3 + 4 * 3 + 2)
    assert set(spills) == {("0", "0")}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of a CUDA toolkit")
def test_kernels_include_no_torch_header(tmp_path):
    listing = subprocess.run(["nvcc", "-std=c++17", "-M", *SOURCES], capture_output=True, text=True, check=True).stdout
    assert "rpe_index_kernels.h" in listing
    assert not re.findall(r"\S*/(?:ATen|c10|torch)/\S*", listing)
