"""The CUDA kernels of rpe_index, run on the CPU: g++ reads the .cu files and cuda_emulator.h plays a GPU."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "rpe_ops_cuda" / "csrc" / "cuda"
VALUE_TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # in the order of ValueType
ID_TYPES = [torch.uint8, torch.int32, torch.int64]  # in the order of IdType

EXPORTS = """
extern "C" int rpe_index(const int64_t* s, const void* data, int type, const void* index, int id_type, int64_t keys,
                         void* out) {
  return irpe::launch_rpe_index({data, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]}, irpe::ValueType(type), index,
                                irpe::IdType(id_type), keys, out, nullptr);
}
extern "C" int rpe_index_adjoint(const int64_t* s, const void* data, int type, const void* index, int id_type,
                                 int64_t buckets, void* out) {
  return irpe::launch_rpe_index_adjoint({data, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]}, irpe::ValueType(type),
                                        index, irpe::IdType(id_type), buckets, out, nullptr);
}
"""


def toolkit_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", Path(nvcc).resolve().parents[1] if nvcc else None]
    found = (Path(root) / "include" for root in roots if root)
    return next((path for path in found if (path / "cuda_fp16.h").exists()), None)


def emulated(names: list[str], launches: int) -> str:
    """CUDA sources for g++, with the emulator."""
    source = "".join((SOURCES / name).read_text() for name in names)
    for name in names:
        source = source.replace(f'#include "{name}"\n', "")
    # The two things g++ cannot read: dynamic shared memory, and launches.
    source = re.sub(r"extern __shared__ [^;]*;", "unsigned char* const shared = emulator::shared_memory;", source)
    source, found = re.subn(r"([\w:]+(?:<T, Id>)?)<<<(.*?)>>>\(", r"emulator::launch(\1, \2)(", source, flags=re.DOTALL)
    assert found == launches and "__shared__" not in source
    return '#include "cuda_emulator.h"\n' + source


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    headers = toolkit_headers()
    if headers is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the headers of a CUDA toolkit")
    source = emulated(["bucket_sums.cu", "lookup.cu"], launches=4)
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "kernels.cpp").write_text(source + EXPORTS)
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-Wl,-Bsymbolic"]
    command += [f"-I{SOURCES}", f"-I{Path(__file__).parent}", "-isystem", str(headers)]
    command += [str(folder / "kernels.cpp"), "-o", str(folder / "kernels.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def sums(kernels, grad, index, buckets):
    turned = grad.stride(3) != 1 and grad.shape[3] != 1  # `ids_are_transposed`
    return call(kernels.rpe_index_adjoint, grad, index.mT.contiguous() if turned else index, buckets)


def call(function, tensor, index, columns):
    out = torch.full((*tensor.shape[:3], columns), -77.0, dtype=tensor.dtype)
    geometry = (ctypes.c_int64 * 8)(*tensor.shape, *tensor.stride())
    error = function(
        geometry, ctypes.c_void_p(tensor.data_ptr()), VALUE_TYPES.index(tensor.dtype),
        ctypes.c_void_p(index.data_ptr()), ID_TYPES.index(index.dtype), ctypes.c_int64(columns),
        ctypes.c_void_p(out.data_ptr()),
    )  # fmt: skip
    assert error == 0
    return out


def misaligned(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values, starting ``elements`` after a 16-byte boundary."""
    room = torch.empty(tensor.numel() + elements + 16, dtype=tensor.dtype)
    start = -room.data_ptr() % 16 // room.element_size() + elements
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


SHAPES = [  # batch, heads, queries, keys, buckets
    (2, 3, 17, 17, 50),  # odd planes: every alignment
    (1, 1, 1, 1, 1),
    (3, 7, 5, 9, 4),
    (1, 2, 3, 300, 7),  # several 128-byte steps of a row
    (1, 40, 2, 65, 10),  # more planes than lanes
    (1, 1, 160, 1, 50),  # one key: a piece spans many rows
    (5, 7, 6, 20, 3),  # the planes of a thread span several heads and batches
    (1, 2, 2, 6, 1700),  # a histogram too large for shared memory
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_TYPES, ids=str)
def test_forward_is_a_gather_bit_for_bit(kernels, shape, dtype):
    batch, heads, queries, keys, buckets = shape
    torch.manual_seed(0)
    index = torch.randint(buckets, (queries, keys))
    table = torch.randn(batch, heads, queries, buckets).to(dtype)
    expected = table.gather(-1, index.expand(batch, heads, -1, -1))
    for view in (table, misaligned(table, 1), table.transpose(1, 2).contiguous().transpose(1, 2),
                 table.mT.contiguous().mT):  # fmt: skip
        out = call(kernels.rpe_index, view, index.to(torch.int32), keys)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_TYPES, ids=str)
def test_adjoint_sums_buckets(kernels, shape, dtype):
    batch, heads, queries, keys, buckets = shape
    torch.manual_seed(0)
    index = torch.randint(buckets, (queries, keys))
    grad = torch.randn(batch, heads, queries, keys).to(dtype)
    ids = index.expand(batch, heads, -1, -1)
    exact = torch.zeros(batch, heads, queries, buckets, dtype=torch.float64).scatter_add_(-1, ids, grad.double())
    # Sums are in fp32 at least and rounded once.
    tolerance = torch.finfo(dtype).eps * exact.abs() + keys * min(torch.finfo(dtype).eps, 1.2e-7) * 4
    for view in (grad, misaligned(grad, 1), grad.transpose(1, 2).contiguous().transpose(1, 2),
                 grad.mT.contiguous().mT):  # fmt: skip
        out = sums(kernels, view, index.to(torch.int32), buckets)
        assert ((out.double() - exact).abs() <= tolerance).all()
    expanded = grad[..., :1].expand(-1, -1, -1, keys)  # what the gradient of a sum looks like
    exact = torch.zeros_like(exact).scatter_add_(-1, ids, expanded.double())
    out = sums(kernels, expanded, index.to(torch.int32), buckets)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=tolerance.max().item())


@pytest.mark.parametrize("id_type", ID_TYPES, ids=str)
def test_every_id_type(kernels, id_type):
    index = torch.randint(50, (10, 10))
    table = torch.randn(2, 2, 10, 50)
    ids = index.expand(2, 2, -1, -1)
    out = call(kernels.rpe_index, table, index.to(id_type), 10)
    assert torch.equal(out, table.gather(-1, ids))
    found = sums(kernels, out, index.to(id_type), 50)
    torch.testing.assert_close(found, torch.zeros(2, 2, 10, 50).scatter_add_(-1, ids, out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_stays_in_its_bucket(kernels, dtype):
    """On tensor cores it would not: it is multiplied by the zeros of all other buckets."""
    index = torch.tensor([[0, 1, 1, 2]])
    grad = torch.tensor([[[[1.0, float("nan"), 2.0, 3.0]], [[1.0, 2.0, 2.0, float("inf")]]]]).to(dtype)
    wanted = torch.tensor([[[[1.0, float("nan"), 3.0]], [[1.0, 4.0, float("inf")]]]]).to(dtype)
    torch.testing.assert_close(sums(kernels, grad, index, 3), wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_next_to_a_row_do_not_matter(kernels, dtype):
    """A slice of wider rows, as the gradient of a mask is: the memory between the rows may hold NaN."""
    wide = torch.full((2, 9, 3, 80), float("nan"), dtype=dtype)
    for keys in (35, 64, 73):
        grad = wide[..., 3 : 3 + keys]
        grad.copy_(torch.randint(-8, 8, grad.shape))
        index = torch.randint(70, (3, keys))
        exact = torch.zeros(2, 9, 3, 70).scatter_add_(-1, index.expand(2, 9, -1, -1), grad.float())
        assert torch.equal(sums(kernels, grad, index, 70).float(), exact)
        wide.fill_(float("nan"))


def test_few_and_many_rows_give_every_number_of_splits(kernels):
    """The adjoint gives 32 rows to 4 warps, 2 or 1, fewer with more rows."""
    for heads, keys in ((1, 300), (1030, 34), (2050, 3)):
        index = torch.randint(5, (32, keys))
        grad = torch.randn(1, heads, 32, keys)
        exact = torch.zeros(1, heads, 32, 5).scatter_add_(-1, index.expand(1, heads, -1, -1), grad)
        torch.testing.assert_close(sums(kernels, grad, index, 5), exact, rtol=1e-5, atol=1e-5)
