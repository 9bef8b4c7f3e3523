"""The CUDA kernels compile for the GPUs we name, and keep their variables in registers. Needs nvcc, no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "rpe_ops_cuda" / "csrc" / "cuda").glob("*.cu"))


# Kernels per architecture: a lookup has 3 sizes of elements for 3 types of ids, the kernels of the sums 4, 4, 4 and 2
# types; attention has kernels for k, qk and qkv, three for rows and one for tables, in 2 types, and one for floats.
KERNELS = {"lookup.cu": 3 * 3, "bucket_sums.cu": 3 * (4 * 3 + 2)}
KERNELS |= {"attention_forward.cu": 2 * 3, "attention_backward.cu": 2 * (3 + 3), "table_gradient.cu": 2 + 1}
SPILLS = {"attend": 64, "differentiate_scores": 400}  # the most bytes; other kernels, none
# PyTorch's flags, with which less compiles.
FLAGS = [
    f"-D__CUDA_NO_{x}__" for x in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of a CUDA toolkit")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_compile_and_keep_to_their_registers(tmp_path, source):
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    wanted = ["80", "90"] + [
        arch for arch in ("75", "120") if f"compute_{arch}" in known and "attention" in source.stem
    ]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    command = ["nvcc", "-std=c++17", "-O3", *FLAGS, *targets, "-t2", "-Xptxas=-v", "-c", source]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reports = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers", result.stderr, re.DOTALL,
    )  # fmt: skip
    assert sorted(arch for _, arch, *_ in reports) == sorted(wanted * KERNELS[source.name])
    for name, arch, stores, loads, registers in reports:
        allowed = next((most for kernel, most in SPILLS.items() if kernel in name), 0)
        assert max(int(stores), int(loads)) <= allowed, (name, arch)
        assert arch != "75" or int(registers) < 8  # empty, because attention needs Ampere


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of a CUDA toolkit")
def test_kernels_include_no_torch_header(tmp_path):
    listing = subprocess.run(["nvcc", "-std=c++17", "-M", *SOURCES], capture_output=True, text=True, check=True).stdout
    assert "rpe_index_kernels.h" in listing
    assert not re.findall(r"\S*/(?:ATen|c10|torch)/\S*", listing)
