"""The Triton kernels compile to sm_90 binaries that fit a multiprocessor. Needs Triton and its own tools, no GPU."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from irpe_ops.backends import triton as triton_backend  # noqa: E402

POINTERS = {"offset_table": "*u8", "padding": "*u8", "seed": "*i64", "log_sums": "*fp32",
            "deltas": "*fp32"}  # fmt: skip
TENSORS = ["q", "k", "v", "lookup_k", "lookup_q", "out", "sums", "grad_out", "grad_sums", "grad_q", "grad_k", "grad_v",
           "grad_lookup_k", "grad_lookup_q"]  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_kernel(name: str, head_dim: int, buckets: int, **flags):
    from irpe_ops.backends import triton_kernels

    kernel = getattr(triton_kernels, name)
    constants = triton_backend.constants(torch.bfloat16, head_dim, buckets)
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
    constants |= {"ON_K": True, "ON_Q": False, "ON_V": False, "PADDING": False, "MASK": "none", "DROPOUT": False,
                  "LEADING": True, "PARTS": 1} | flags  # fmt: skip
    types = POINTERS | dict.fromkeys(TENSORS, "*bf16") | {"scale": "fp32", "dropout_p": "fp32"}
    types["mask"] = "*fp32" if constants["MASK"] == "float" else "*u8"
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    # What a launch finds out by itself: tensors and the strides of q, k, v start at multiples of 16.
    aligned = [i for i, n in enumerate(kernel.arg_names) if n in TENSORS or re.fullmatch(r"(q|k|v|go)_\w+", n)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    text = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="needs the cuobjdump that comes with Triton")
@pytest.mark.parametrize("name", ["forward_kernel", "query_gradient_kernel", "key_gradient_kernel"])
def test_deit_with_keys_needs_no_stack(name, tmp_path):
    compiled = compile_kernel(name, head_dim=64, buckets=50)
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["REG"] <= 255
    assert used["STACK"] == used["LOCAL"] == 0, used  # spilled registers would be on the stack
    assert compiled.metadata.shared <= 227 * 1024
    assert "wgmma" in compiled.asm["ptx"]  # Hopper's own matrix instructions
    assert "atom" not in compiled.asm["ptx"]  # the same bits every time


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["float", "bool"])
@pytest.mark.parametrize("name", ["forward_kernel", "query_gradient_kernel", "key_gradient_kernel"])
def test_everything_at_once_compiles_and_fits(name, mask):
    """The interpreter accepts what the compiler may not: two maps, padding, masks, dropout, on q, k and v."""
    flags = {"ON_Q": True, "ON_V": True, "PADDING": True, "MASK": mask, "DROPOUT": True, "PARTS": 2}
    compiled = compile_kernel(name, head_dim=32, buckets=10, **flags)
    assert compiled.metadata.shared <= 227 * 1024
