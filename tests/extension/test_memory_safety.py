"""The CPU kernels touch nothing but their tensors: guard pages around the inputs, and a sanitized build (slow)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rpe_ops_cuda._C", reason="rpe_ops_cuda is not installed")
ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    return subprocess.run([sys.executable, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                          capture_output=True, text=True, cwd=ROOT)  # fmt: skip


GUARDED = """
import ctypes, sys
import torch
import irpe_ops.backends.compiled as compiled
from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention, rpe_index
from irpe_ops.rpe_index import rpe_index_adjoint
from tests.helpers.cpu_kernels import capabilities
from tests.helpers.guard_pages import guarded
from tests.oracles import fill_tables

torch.set_num_threads(1)
if sys.argv[1] == "touch":
    x = guarded(torch.ones(8), True)
    print(ctypes.string_at(x.data_ptr() + 28, 4) and "inside is fine", flush=True)
    ctypes.string_at(x.data_ptr() + 32, 4)
for capability in capabilities():
    torch.ops.irpe.set_cpu_capability(capability)
    for end in (True, False):
        for length, keys, buckets in ((1, 1, 1), (3, 5, 7), (7, 33, 50), (9, 64, 81), (5, 197, 130)):
            index = guarded(torch.randint(buckets, (length, keys)).to(torch.uint8), end)
            for dtype in (torch.float32, torch.bfloat16):
                rpe_index(guarded(torch.randn(2, 1, length, buckets).to(dtype), end), index)
                rpe_index_adjoint(guarded(torch.randn(2, 1, length, keys).to(dtype), end), index, buckets)
        for spec in ("rpe-1.9-product-ctx-0-qkv", "rpe-2.0-cross-bias-1-qk", "rpe-9-euc-ctx-1-qkv"):
            for height, width, skip, head_dim in ((1, 1, 0, 1), (1, 7, 2, 3), (5, 9, 0, 8), (14, 14, 1, 20)):
                length = height * width + skip
                encodings = build_rpe(parse_rpe_spec(spec, skip=skip), head_dim, 2)
                for rpe in encodings:
                    if rpe is not None:
                        fill_tables(rpe)
                        for part in rpe.parts:
                            part.table.data = guarded(part.table.data, end)
                q, k, v, grad = (guarded(torch.randn(2, 2, length, head_dim), end) for _ in range(4))
                masks = {"key_padding_mask": guarded(torch.rand(2, length) < 0.3, end),
                         "attn_mask": guarded(torch.randn(2, 1, length, length), end)}
                for compiled.KEPT_BYTES in (0, 1 << 30):
                    out = rpe_attention(*(x.requires_grad_() for x in (q, k, v)), *encodings, height=height,
                                        width=width, **masks, backend="compiled")
                    out.backward(grad)
print("done")
"""


def test_the_guard_pages_guard():
    result = run("-c", GUARDED, "touch")
    assert result.returncode < 0 and result.stdout == "inside is fine\n"


def test_nothing_before_or_after_the_tensors_is_touched():
    result = run("-c", GUARDED, "kernels")
    assert result.returncode == 0 and result.stdout == "done\n", result.stdout + result.stderr[-2000:]


def runtime(name: str) -> str | None:
    """The compiler's own copy of a sanitizer's library, which must be loaded before Python allocates."""
    path = subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The environment of a process in which ``rpe_ops_cuda`` is a sanitized build of the CPU code."""
    if shutil.which("g++") is None or runtime("libasan") is None or runtime("libubsan") is None:
        pytest.skip("needs g++ and its sanitizer libraries")
    folder = tmp_path_factory.mktemp("sanitized")
    source, installed = folder / "source", str(folder / "installed")
    shutil.copytree(ROOT / "rpe_ops_cuda", source, ignore=shutil.ignore_patterns("build", "*.egg-info", "*.so"))
    flags = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    built = run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", installed,
                str(source), FORCE_CUDA="0", IRPE_CXXFLAGS=flags, LDFLAGS="-fsanitize=address,undefined")  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    return {
        "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}",
        "LD_PRELOAD": f"{runtime('libasan')} {runtime('libubsan')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python itself frees little when it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.mark.slow
def test_kernels_are_clean_under_sanitizers(sanitized):
    overrun = "import torch, ctypes; x = torch.zeros(8); ctypes.memmove(x.data_ptr() + 16, x.data_ptr(), 32)"
    result = run("-c", overrun, **sanitized)
    assert result.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr[-2000:]
    where = run("-c", "import rpe_ops_cuda; print(rpe_ops_cuda.__file__)", **sanitized).stdout
    assert where.startswith(sanitized["PYTHONPATH"].split(os.pathsep)[0])
    tests = ["tests/extension/test_cpu_rpe_index.py", "tests/extension/test_cpu_attention.py"]
    result = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests, **sanitized)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
