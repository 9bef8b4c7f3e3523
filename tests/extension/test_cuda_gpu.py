"""The compiled rpe_index on a GPU, at real sizes. What it computes is tested without one in test_cuda_emulated.py."""

import pytest
import torch

from irpe_ops import get_bucket_ids_2d, rpe_index
from irpe_ops.rpe_index import compiled_devices, rpe_index_adjoint
from tests import oracles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in compiled_devices, reason="needs rpe_ops_cuda, built with CUDA"),
]
SHAPES = {"deit": (16, 6, (14, 14), 1, 1.9), "detr": (2, 8, (25, 34), 0, 2.0)}  # batch, heads, grid, skip, ratio
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def example(name, dtype):
    batch, heads, grid, skip, ratio = SHAPES[name]
    index, buckets = get_bucket_ids_2d("product", *grid, skip, ratio, 2 * ratio, 8 * ratio)
    length = len(index)
    table = torch.randn(batch, heads, length, buckets, device="cuda").to(dtype)
    grad = torch.randn(batch, heads, length, length, device="cuda").to(dtype)
    return table, grad, index.cuda(), buckets


@pytest.mark.parametrize("id_type", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_forward_is_a_gather_bit_for_bit(name, dtype, id_type):
    table, _, index, _ = example(name, dtype)
    expected = table.gather(-1, index.expand(*table.shape[:2], -1, -1))
    assert torch.equal(rpe_index(table, index.to(id_type)), expected)
    strided = table.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rpe_index(strided, index.to(id_type)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_adjoint_is_accurate_and_gives_the_same_bits_twice(name, dtype):
    _, grad, index, buckets = example(name, dtype)
    ids = index.expand(*grad.shape[:2], -1, -1)
    zeros = grad.new_zeros(*grad.shape[:3], buckets)
    exact = zeros.double().scatter_add(-1, ids, grad.double())
    plain = zeros.scatter_add(-1, ids, grad)
    for view in (grad, grad.mT.contiguous().mT):
        ours = rpe_index_adjoint(view, index.byte(), buckets)
        oracles.assert_as_accurate_as_torch(ours, plain, exact)
        assert torch.equal(ours, rpe_index_adjoint(view, index.byte(), buckets))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    table, grad, index, buckets = (x.to("cuda:1") if torch.is_tensor(x) else x for x in example("deit", torch.float32))
    assert torch.equal(rpe_index(table, index), table.gather(-1, index.expand(*table.shape[:2], -1, -1)))
    sums = torch.zeros_like(table).scatter_add(-1, index.expand(*table.shape[:2], -1, -1), grad)
    torch.testing.assert_close(rpe_index_adjoint(grad, index, buckets), sums, rtol=1e-4, atol=1e-4)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of free GPU memory")
    index = torch.randint(50, (197, 197), dtype=torch.uint8, device="cuda")
    table = torch.randn(9300, 6, 197, 50, dtype=torch.float16, device="cuda")  # 2.17e9 elements of output
    out = rpe_index(table, index)
    last = table[-1:].gather(-1, index.long().expand(1, 6, -1, -1))
    assert torch.equal(out[-1:], last)
    sums = rpe_index_adjoint(out, index, 50)
    # Alone, its rows start at other places in 16 bytes, and are added in another order.
    torch.testing.assert_close(sums[-1:], rpe_index_adjoint(last, index, 50), rtol=1e-3, atol=1e-6)


def test_runs_on_the_current_stream():
    table, _, index, _ = example("deit", torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = table * 2
        out = rpe_index(late, index)
    stream.synchronize()
    assert torch.equal(out, late.gather(-1, index.expand(*table.shape[:2], -1, -1)))
