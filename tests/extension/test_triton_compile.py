"""The Triton kernels compile for GPUs that are not here, and fit their limits. Needs Triton's own tools, no GPU."""

import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from tests.helpers.triton_builds import CUOBJDUMP, KERNELS, VARIANTS, compile_kernel, resources  # noqa: E402

pytestmark = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="needs the cuobjdump that comes with Triton")
SHARED = {90: 227 << 10, 80: 99 << 10, 120: 99 << 10}  # a program's; what runs on 8.0 runs on 8.6 and 8.9 too
FUSED = ("forward_kernel", "delta_kernel", "key_gradient_kernel")  # they add products, in one instruction each
NEWER = [int(part) for part in triton.__version__.split(".")[:2]] >= [3, 9]
SPILLED = {50: 512, 81: 1280, 10: 512}  # bytes per thread, by buckets: smaller tiles spill less and execute more


@pytest.mark.parametrize("name", KERNELS)
def test_deit_with_keys_needs_hardly_any_stack(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # as Triton 3.10 will have it
    compiled = compile_kernel(name, head_dim=64, buckets=50, arch=90)
    used = resources(compiled, tmp_path)
    two = 8 if name == "key_gradient_kernel" and NEWER else 0  # spilled registers are on the stack
    assert used["REG"] <= 255 and used["STACK"] <= two, used
    assert used["SHARED"] <= SHARED[90]
    multiplies = name not in ("spread_kernel", "delta_kernel")
    assert "fma.rn" in compiled.asm["ptx"] or name not in FUSED
    assert ("wgmma" in compiled.asm["ptx"]) == multiplies  # Hopper's own matrix instructions
    assert "atom" not in compiled.asm["ptx"]  # the same bits every time


def test_sums_by_bucket_load_and_do_little():
    """What was once a loop over the buckets: rows are read 16 bytes at a time, past the registers."""
    ptx = compile_kernel("sum_kernel", head_dim=64, buckets=50, arch=90).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx and ", 0x10," in ptx


@pytest.mark.parametrize(
    "row, variant",
    [
        ("DeiT-S k, sm_90", "sm_90,64,50,bfloat16,k,,"),
        ("DETR k with padding and dropout, sm_90", "sm_90,32,81,bfloat16,k,padding+dropout,"),
    ],
)
def test_the_page_has_the_counts_of_the_first_version_too(row, variant):
    folder = Path(__file__).parents[2] / "docs/benchmarks"
    cells = dict(re.findall(r"^\| (D.*?) \| (.*) \|$", (folder / "README.md").read_text(), re.MULTILINE))
    (file,) = folder.glob("triton_compiled-not-run_*.csv")
    fields = [line.removeprefix(variant).split(",") for line in file.read_text().splitlines() if variant in line]
    counts = {kernel.removesuffix("_kernel"): count for kernel, *_, count in fields}
    now = [counts[name] for name in ("spread", "forward", "key_gradient", "query_gradient", "sum")]
    assert cells[row].split(" | ") == now
    before = re.findall(r"\d+", cells[f"{row}, first version"])
    assert all(int(first) > 4 * int(last) for first, last in zip(before, now[1:4], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: f"sm_{v[0]}-D{v[1]}-N{v[2]}-{str(v[3])[6:]}-{'.'.join(v[4])}"
)
def test_every_variant_fits(name, variant, tmp_path):
    arch, head_dim, buckets, dtype, flags = variant
    compiled = compile_kernel(name, head_dim=head_dim, buckets=buckets, arch=arch, dtype=dtype, **flags)
    used = resources(compiled, tmp_path)
    assert used["SHARED"] <= SHARED[arch], used
    assert used["STACK"] <= SPILLED[buckets], used
    assert "atom" not in compiled.asm["ptx"]
