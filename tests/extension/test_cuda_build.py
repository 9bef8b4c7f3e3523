"""The extension has the CUDA kernels of every architecture, and their variables are in registers. Needs no GPU."""

import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from irpe_ops.rpe_index import compiled_devices

SOURCES = sorted((Path(__file__).parents[2] / "rpe_ops_cuda" / "csrc" / "cuda").glob("*.cu"))


# A lookup has 3 sizes of elements for 3 types of ids, the kernels of the sums 4, 4, 4 and 2 types; attention has
# kernels for k, qk and qkv, three for rows and one for tables, in 2 types, and one for floats.
KERNELS = {"lookup": 3 * 3, "bucket_sums": 3 * (4 * 3 + 2)}
KERNELS |= {"attention_forward": 2 * 3, "attention_backward": 2 * (3 + 3), "table_gradient": 2 + 1}
STACK = {"attend": 32, "differentiate_scores": 120}  # the most bytes outside of registers; other kernels, none


@pytest.fixture(scope="module")
def built() -> list[tuple[str, str, str, int, int]]:
    """Of each kernel in the extension: architecture, source, name, registers, and bytes of stack."""
    folder = find_spec("triton") and Path(find_spec("triton").origin).parent / "backends/nvidia/bin"
    lister = shutil.which("cuobjdump", path=folder) or shutil.which("cuobjdump")
    extension = find_spec("rpe_ops_cuda._C")
    if not lister or "cuda" not in compiled_devices:
        pytest.skip("needs an extension that was built with CUDA, and cuobjdump of Triton or of a CUDA toolkit")
    listing = subprocess.run([lister, "--dump-resource-usage", extension.origin], capture_output=True, text=True).stdout
    kernels = [
        (arch, source, name, int(registers), int(stack) + int(local))
        for arch, functions in re.findall(r"arch = sm_(\d+)\n(.*?)(?=\nFatbin|\Z)", listing, re.DOTALL)
        for source, name, registers, stack, local in re.findall(
            r"Function \w+?__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}\d+(\w+):\s+"
            r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
            functions,
        )
    ]
    assert kernels, listing[:1000]
    return kernels


def test_each_architecture_has_all_kernels(built):
    by_architecture = {}
    for arch, source, *_ in built:
        by_architecture.setdefault(arch, Counter())[source] += 1
    assert by_architecture == dict.fromkeys(by_architecture, KERNELS)
    if not torch.cuda.is_available() and "TORCH_CUDA_ARCH_LIST" not in os.environ:  # else built for chosen GPUs
        assert {"75", "80", "86", "90"} <= by_architecture.keys()  # newer ones, if the toolkit knows them


def test_variables_stay_in_registers(built):
    for arch, source, name, registers, stack in built:
        allowed = next((most for kernel, most in STACK.items() if name.startswith(kernel)), 0)
        assert stack <= allowed, (name, arch)
        if arch == "75" and source.startswith("attention"):
            assert registers < 8, name  # empty, because attention needs Ampere


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of a CUDA toolkit")
def test_kernels_include_no_torch_header(tmp_path):
    listing = subprocess.run(["nvcc", "-std=c++17", "-M", *SOURCES], capture_output=True, text=True, check=True).stdout
    assert "rpe_index_kernels.h" in listing
    assert not re.findall(r"\S*/(?:ATen|c10|torch)/\S*", listing)
