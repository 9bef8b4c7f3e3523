"""The compiled rpe_index on a GPU, at real sizes (what it computes is tested without one in test_cuda_emulated.py), and
the compiled attention."""

import pytest
import torch

from irpe_ops import build_rpe, get_bucket_ids_2d, parse_rpe_spec, rpe_attention, rpe_index
from irpe_ops.backends import choice
from irpe_ops.buckets import ids_by_lane
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
    # Alone, its rows are aligned differently to 16 bytes, and are added in another order.
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


OLD = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
ampere = pytest.mark.skipif(OLD, reason="the kernels are for Ampere and later")
HALVES = [torch.bfloat16, torch.float16]
LAYERS = {  # batch, heads, grid, skip
    "deit": (3, 6, (14, 14), 1),
    "one row": (1, 3, (1, 3), 1),
    "no leading token": (3, 1, (7, 5), 0),
    "384 pixels": (1, 3, (24, 24), 1),
}
SPECS = ["rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qk", "rpe-1.9-product-ctx-1-qkv", "rpe-1.9-product-ctx-0-k",
         "rpe-1.9-product-ctx-0-qkv", "rpe-10-euc-ctx-1-qkv", "rpe-13-quant-ctx-0-qk"]  # fmt: skip


def layer(name, spec, dtype, tables=None):
    """q, k and v as views of one projection, and encodings with tables of another dtype if so given."""
    batch, heads, (height, width), skip = LAYERS[name]
    encodings = build_rpe(parse_rpe_spec(spec, skip), 64, heads)
    for seed, rpe in enumerate(encodings):
        if rpe is not None:
            oracles.fill_tables(rpe, seed, std=0.1)
            rpe.to("cuda", tables or dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    packed = torch.randn(batch, height * width + skip, 3, heads, 64, device="cuda", generator=generator).to(dtype)
    return packed, encodings, {"height": height, "width": width}


def attend(packed, encodings, options, backend="compiled", of_sum=False):
    """The result and all gradients, of a loss with random weights or of the sum, whose gradient is one expanded one."""
    packed = packed.detach().requires_grad_()
    out = rpe_attention(*packed.permute(2, 0, 3, 1, 4), *encodings, **options, backend=backend)
    weights = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(out)
    tables = [rpe.table for rpe in encodings if rpe is not None]
    return [out.detach(), *torch.autograd.grad(out.sum() if of_sum else (out * weights).sum(), [packed, *tables])]


def exactly(packed, encodings, options, of_sum=False):
    wide = [None if rpe is None else rpe.double() for rpe in encodings]
    return attend(packed.double(), wide, options, "eager", of_sum)


@ampere
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", LAYERS)
def test_attention_is_as_accurate_as_plain_pytorch(name, spec, dtype):
    case = layer(name, spec, dtype)
    ours, plain = attend(*case), attend(*case, "eager")
    assert ours[0].transpose(1, 2).is_contiguous()
    for x, y, answer in zip(ours, plain, exactly(*case), strict=True):
        oracles.assert_as_accurate_as_torch(x, y, answer, slack=4.0)


@ampere
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-0-qkv"])
def test_autocast_keeps_the_gradients_of_fp32_tables_in_fp32(spec, dtype):
    packed, *rest = layer("deit", spec, dtype, torch.float32)
    with torch.autocast("cuda", dtype):
        ours, plain = attend(packed, *rest), attend(packed, *rest, "eager")
    assert {table.dtype for table in ours[2:]} == {torch.float32}
    for table in ours[2:]:
        assert (table != table.to(dtype)).float().mean() > 0.9  # not rounded at the end
    for x, y, answer in zip(ours, plain, exactly(packed, *rest), strict=True):
        error, allowed = (x.double() - answer).norm(), 2 * (y.double() - answer).norm()
        assert error <= allowed + torch.finfo(dtype).eps * answer.norm()


@ampere
@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qkv"])
def test_attention_gives_the_same_bits_twice_and_in_any_layout(spec):
    packed, *rest = layer("deit", spec, torch.bfloat16)
    first = attend(packed, *rest)
    odd = torch.empty(packed.numel() + 1, dtype=packed.dtype, device="cuda")[1:].view_as(packed).copy_(packed)
    for same in (packed, odd, packed.mT.contiguous().mT, packed.transpose(1, 3).contiguous().transpose(1, 3)):
        assert all(torch.equal(x, y) for x, y in zip(attend(same, *rest), first, strict=True))


@ampere
def test_attention_of_an_expanded_gradient():
    case = layer("deit", "rpe-1.9-product-ctx-1-qkv", torch.bfloat16)
    ours, plain = attend(*case, of_sum=True), attend(*case, "eager", of_sum=True)
    for x, y, answer in zip(ours, plain, exactly(*case, of_sum=True), strict=True):
        oracles.assert_as_accurate_as_torch(x, y, answer, slack=4.0)


@ampere
def test_attention_without_gradients_is_the_same():
    packed, encodings, options = layer("deit", "rpe-1.9-product-ctx-1-qkv", torch.bfloat16)
    expected = attend(packed, encodings, options)[0]
    with torch.no_grad():
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        assert torch.equal(rpe_attention(q, k, v, *encodings, **options, backend="compiled"), expected)
        empty = rpe_attention(q[:0], k[:0], v[:0], *encodings, **options, backend="compiled")
    assert empty.shape == (0, *q.shape[1:])


@ampere
def test_an_empty_batch_has_gradients_of_zero():
    packed, encodings, options = layer("deit", "rpe-1.9-product-ctx-1-qkv", torch.bfloat16)
    assert not any(grad.any() for grad in attend(packed[:0], encodings, options))


@ampere
@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qkv"])
def test_attention_compiles_without_a_graph_break(spec):
    packed, encodings, options = layer("no leading token", spec, torch.bfloat16)
    torch.compiler.reset()
    whole = torch.compile(rpe_attention, fullgraph=True)

    def gradients(function):
        x = packed.clone().requires_grad_()
        out = function(*x.permute(2, 0, 3, 1, 4), *encodings, **options, backend="compiled")
        tables = [rpe.table for rpe in encodings if rpe is not None]
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *tables])

    for ours, expected in zip(gradients(whole), gradients(rpe_attention), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


@ampere
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_on_the_gpu(keep):
    packed, encodings, options = layer("no leading token", "rpe-1.9-product-ctx-0-qkv", torch.bfloat16)
    q, k, v = (x.clone().requires_grad_(keep) for x in packed.permute(2, 0, 3, 1, 4))
    tables = [rpe.table.detach().requires_grad_(keep) for rpe in encodings]
    ids = ids_by_lane(encodings[1].bucket_ids(35, 7, 5, q.device))
    maps = [], [ids], []
    torch.library.opcheck(torch.ops.irpe.attention, (q, k, v, *tables, *maps, None, None, None, 0.1, 0.0, keep, False))


@ampere
def test_attention_in_a_cuda_graph_and_on_another_stream():
    packed, encodings, options = layer("deit", "rpe-1.9-product-ctx-1-qkv", torch.bfloat16)
    packed.requires_grad_()
    leaves = [packed, *(rpe.table for rpe in encodings)]

    def step():
        out = rpe_attention(*packed.permute(2, 0, 3, 1, 4), *encodings, **options, backend="compiled")
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = step()
    torch.cuda.current_stream().wait_stream(stream)
    expected = [x.detach().clone() for x in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for first, second, answer in zip(other, captured, expected, strict=True):
        assert torch.equal(first, answer) and torch.equal(second, answer)


@ampere
def test_auto_measures_the_compiled_attention(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_known", {})
    attend(*layer("deit", "rpe-1.9-product-ctx-1-k", torch.bfloat16), "auto")
    (found,) = choice._known.values()
    assert "compiled" in found.ms and not found.left_out


@ampere
def test_attention_at_many_sizes_of_batch():
    """Rows beyond one launch's blocks, and partial sums of table gradients of every length."""
    encodings = build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-qkv", 1), 64, 6)
    for seed, rpe in enumerate(encodings):
        oracles.fill_tables(rpe.to("cuda", torch.bfloat16), seed, std=0.1)
    for batch in (2, 7, 64):
        packed = torch.randn(batch, 197, 3, 6, 64, device="cuda", dtype=torch.bfloat16)
        out, *grads = attend(packed, encodings, {})
        alone = [attend(packed[i : i + 1], encodings, {}) for i in (0, batch - 1)]
        assert torch.equal(out[:1], alone[0][0]) and torch.equal(out[-1:], alone[1][0])
        for x, answer in zip([out, *grads], exactly(packed, encodings, {}), strict=True):
            assert (x.double() - answer).norm() <= 0.02 * answer.norm()
        for rpe in encodings:
            rpe.bfloat16()


@ampere
def test_a_table_on_another_device_is_refused():
    packed, encodings, _ = layer("no leading token", "rpe-1.9-product-ctx-1-k", torch.bfloat16)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    maps = [], [ids_by_lane(encodings[1].bucket_ids(35, 7, 5, q.device))], []
    with pytest.raises(ValueError, match="table_k is on cpu, q on cuda"):
        torch.ops.irpe.attention(
            q, k, v, None, encodings[1].table.cpu(), None, *maps, None, None, None, 0.1, 0.0, False, False
        )
