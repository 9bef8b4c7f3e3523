"""torch.ops.irpe.rpe_index and its adjoint on CPU: each instruction set that runs here, against plain PyTorch."""

import re
from pathlib import Path

import pytest
import torch

from irpe_ops import get_bucket_ids_2d
from tests.helpers.cpu_kernels import capabilities
from tests.oracles import assert_as_accurate_as_torch

pytest.importorskip("rpe_ops_cuda._C", reason="rpe_ops_cuda is not installed")
ops = torch.ops.irpe


@pytest.fixture(params=capabilities())
def capability(request):
    before = ops.cpu_capability()
    ops.set_cpu_capability(request.param)
    yield request.param
    ops.set_cpu_capability(before)


def gather(input, index):
    return input.gather(-1, index.long().expand(*input.shape[:2], -1, -1))


def scatter(grad, index, num_buckets):
    zeros = grad.new_zeros(*grad.shape[:3], num_buckets)
    return zeros.scatter_add(-1, index.long().expand(*grad.shape[:2], -1, -1), grad)


def grid(method, height, width, skip, ratio):
    return get_bucket_ids_2d(method, height, width, skip, ratio, 2 * ratio, 8 * ratio)


def arbitrary(rows, cols, buckets):
    """Ids without any structure: neither segments nor separable."""
    return torch.randint(buckets, (rows, cols), generator=torch.Generator().manual_seed(1)), buckets


MAPS = {
    "product 14x14+1": lambda: grid("product", 14, 14, 1, 1.9),  # a grid row is two registers of 8 lanes
    "product 10x17": lambda: grid("product", 10, 17, 0, 2.0),  # 9 column parts: more than a register of 8 lanes
    "product 1x9+2": lambda: grid("product", 1, 9, 2, 2.0),
    "product 9x1+1": lambda: grid("product", 9, 1, 1, 2.0),
    "product 1x1": lambda: grid("product", 1, 1, 0, 1.9),
    "euc 14x14+1": lambda: grid("euc", 14, 14, 1, 20.0),
    "quant 6x7": lambda: grid("quant", 6, 7, 0, 33.0),
    "cross_rows 5x8": lambda: grid("cross_rows", 5, 8, 0, 20.0),
    "cross_cols 5x40": lambda: grid("cross_cols", 5, 40, 0, 20.0),  # too many column parts for one-hot columns
    "product 3x60": lambda: grid("product", 3, 60, 0, 2.0),  # more columns than are summed at a time
    "product 20x5": lambda: grid("product", 20, 5, 0, 3.5),  # more row parts than are summed at a time
    "random 7x13": lambda: arbitrary(7, 13, 5),
    "random 3x100": lambda: arbitrary(3, 100, 300),
    "one bucket": lambda: arbitrary(4, 6, 1),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_equals_plain_pytorch(capability, name, dtype):
    index, num_buckets = MAPS[name]()
    torch.manual_seed(0)
    input = torch.randn(2, 3, index.shape[0], num_buckets).to(dtype)
    assert torch.equal(ops.rpe_index(input, index), gather(input, index))
    grad = torch.randn(2, 3, *index.shape).to(dtype)
    sums = ops.rpe_index_adjoint(grad, index, num_buckets)
    assert sums.dtype == dtype
    exact = scatter(grad.double(), index, num_buckets)
    assert_as_accurate_as_torch(sums, scatter(grad, index, num_buckets), exact)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_every_index_dtype(dtype):
    index, num_buckets = MAPS["product 10x17"]()
    input, grad = torch.randn(1, 2, 170, num_buckets), torch.randn(1, 2, 170, 170)
    assert torch.equal(ops.rpe_index(input, index.to(dtype)), gather(input, index))
    assert torch.equal(
        ops.rpe_index_adjoint(grad, index.to(dtype), num_buckets), ops.rpe_index_adjoint(grad, index, num_buckets)
    )


def test_infinite_value_stays_in_its_bucket(capability):
    index, num_buckets = MAPS["product 14x14+1"]()
    grad = torch.zeros(1, 1, 197, 197)
    grad[..., 60] = float("inf")
    assert torch.equal(ops.rpe_index_adjoint(grad, index, num_buckets), scatter(grad, index, num_buckets))


def test_a_large_result_is_in_large_pages():
    smaps = Path("/proc/self/smaps")
    if not smaps.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("no transparent huge pages in this system")
    index, num_buckets = MAPS["product 14x14+1"]()
    input = torch.randn(48, 6, 197, num_buckets)  # a result of 44 MB
    out = ops.rpe_index(input, index)
    assert torch.equal(out, gather(input, index))
    inside, advised = out.data_ptr() + out.nbytes // 2, None
    for line in smaps.read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            here = int(bounds[1], 16) <= inside < int(bounds[2], 16)
        elif here and line.startswith("VmFlags:"):
            advised = "hg" in line.split()
    assert advised


def test_strided_and_expanded_tensors():
    index, num_buckets = MAPS["product 10x17"]()
    wide = torch.randn(2, 170, 3, 2 * num_buckets)
    input = wide.transpose(1, 2)[..., ::2]
    assert torch.equal(ops.rpe_index(input, index.t()), gather(input, index.t()))
    grad = torch.randn(1, 1, 170, 1).expand(2, 3, 170, 170)
    plain = scatter(grad, index, num_buckets)
    torch.testing.assert_close(ops.rpe_index_adjoint(grad, index, num_buckets), plain)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_empty_batch_or_heads(shape):
    index, num_buckets = MAPS["quant 6x7"]()
    assert ops.rpe_index(torch.empty(*shape, 42, num_buckets), index).shape == (*shape, 42, 42)
    assert ops.rpe_index_adjoint(torch.empty(*shape, 42, 42), index, num_buckets).shape == (*shape, 42, num_buckets)


def test_no_keys_gives_zero_sums():
    index = torch.zeros(4, 0, dtype=torch.int64)
    assert torch.equal(ops.rpe_index_adjoint(torch.empty(1, 2, 4, 0), index, 3), torch.zeros(1, 2, 4, 3))


def test_index_changed_in_place_is_seen():
    index = torch.zeros(3, 40, dtype=torch.int64)
    input = torch.arange(6.0).reshape(1, 1, 3, 2)
    first = ops.rpe_index(input, index)
    index.fill_(1)
    assert not torch.equal(ops.rpe_index(input, index), first)
    index.fill_(2)
    with pytest.raises(IndexError, match=r"index holds 2; with 2 buckets it must be in \[0, 2\)"):
        ops.rpe_index(input, index)


def test_index_changed_behind_the_back_of_its_tensor_is_seen():
    """Graphs of torch.compile write one map where another was: cross on keys was wrong there, rows looked up twice."""
    index = torch.zeros(3, 40, dtype=torch.uint8)
    input = torch.arange(6.0).reshape(1, 1, 3, 2)
    for value in (0, 1, 0):
        index.numpy()[:] = value  # counts no version
        assert torch.equal(ops.rpe_index(input, index), gather(input, index.long()))


def test_inference_mode_index_is_read_afresh():
    with torch.inference_mode():
        index = torch.zeros(3, 40, dtype=torch.int64)
        input = torch.arange(6.0).reshape(1, 1, 3, 2)
        ops.rpe_index(input, index)
        index.fill_(1)
        assert torch.equal(ops.rpe_index(input, index), gather(input, index))


@pytest.mark.parametrize("name", MAPS)
def test_heads_summed_together_get_what_each_gets_alone(capability, name):
    index, num_buckets = MAPS[name]()
    grad = torch.randn(2, 9, *index.shape)  # eight at a time, and two more
    grad[0, 3, 0, 0], grad[1, 2, -1, -1] = float("inf"), float("-inf")
    sums = ops.rpe_index_adjoint(grad, index, num_buckets)
    torch.testing.assert_close(sums, scatter(grad, index, num_buckets))
    assert all(
        torch.equal(sums[b, h], ops.rpe_index_adjoint(grad[b, h][None, None], index, num_buckets)[0, 0])
        for b in range(2)
        for h in range(9)
    )


@pytest.mark.parametrize("name", ["product 14x14+1", "euc 14x14+1"])
def test_threads_change_nothing(capability, name):
    index, num_buckets = MAPS[name]()
    input, grad = torch.randn(3, 6, 197, num_buckets), torch.randn(3, 6, 197, 197)

    def both():
        return ops.rpe_index(input, index), ops.rpe_index_adjoint(grad, index, num_buckets)

    alone = both()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(alone, both(), strict=True))
    finally:
        torch.set_num_threads(1)


def test_opcheck():
    index, num_buckets = MAPS["quant 6x7"]()
    for dtype in (torch.float32, torch.bfloat16):
        input = torch.randn(2, 1, 42, num_buckets, dtype=dtype, requires_grad=True)
        torch.library.opcheck(ops.rpe_index, (input, index))
        grad = torch.randn(2, 1, 42, 42, dtype=dtype, requires_grad=True)
        torch.library.opcheck(ops.rpe_index_adjoint, (grad, index, num_buckets))


def test_each_is_the_gradient_of_the_other():
    index = torch.arange(30).remainder(4).view(5, 6)
    input = torch.randn(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.rpe_index, (input, index))
    assert torch.autograd.gradgradcheck(ops.rpe_index, (input, index))


INDEX = torch.zeros(4, 5, dtype=torch.int64)
MISTAKES = [
    (lambda: ops.rpe_index(torch.zeros(2, 4, 3), INDEX), ValueError, "expected input .B, H, L_query, N."),
    (lambda: ops.rpe_index(torch.zeros(1, 1, 3, 3), INDEX), ValueError, "has 3 queries and index .4, 5. has 4"),
    (lambda: ops.rpe_index(torch.zeros(1, 1, 4, 3, dtype=torch.int64), INDEX), ValueError, "input must be float32"),
    (lambda: ops.rpe_index(torch.zeros(1, 1, 4, 3), INDEX.float()), ValueError, "index must be uint8, int16, int32 or"),
    (lambda: ops.rpe_index(torch.zeros(1, 1, 4, 3), INDEX - 1), IndexError, r"index holds -1; with 3 buckets"),
    (lambda: ops.rpe_index_adjoint(torch.zeros(1, 1, 4, 6), INDEX, 3), ValueError, "has 6 keys and index .4, 5. has 5"),
    (lambda: ops.rpe_index_adjoint(torch.zeros(1, 1, 4, 5), INDEX, -1), ValueError, "num_buckets must not be negative"),
    (lambda: ops.rpe_index_adjoint(torch.zeros(1, 1, 4, 5), INDEX + 7, 7), IndexError, "index holds 7; with 7 buckets"),
    (lambda: ops.rpe_index(torch.zeros(1, 1, 4, 70000), INDEX + 69999), ValueError, "at most 65536 buckets"),
    (lambda: ops.set_cpu_capability("sse9"), ValueError, "expected one of generic, avx2, avx512"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_named(mistake):
    call, kind, words = mistake
    with pytest.raises(kind, match=words):
        call()


def test_capability_that_the_processor_lacks():
    if ops.cpu_capability() == "avx512":
        pytest.skip("this processor has all of them")
    with pytest.raises(ValueError, match="this processor lacks it; the best one here is"):
        ops.set_cpu_capability("avx512")
