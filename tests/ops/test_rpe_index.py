"""The lookup and its adjoint: bit for bit, under every kind of differentiation and compilation, and bad input."""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from irpe_ops import rpe_index
from irpe_ops.rpe_index import rpe_index_adjoint
from tests import oracles

MODULE = importlib.import_module("irpe_ops.rpe_index")  # `irpe_ops.rpe_index` is the function


@pytest.fixture(params=["kernel", "plain"], autouse=True)
def path(request, monkeypatch):
    """Every test runs with the compiled kernel, where it is installed, and in plain PyTorch."""
    if request.param == "kernel" and "cpu" not in MODULE.compiled_devices:
        pytest.skip("rpe_ops_cuda is not installed")
    if request.param == "plain":
        monkeypatch.setattr(MODULE, "compiled_devices", ())
    return request.param


def example(shape=(2, 3, 4, 5), keys=6, dtype=torch.float64, index_dtype=torch.int64, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
    index = torch.randint(0, shape[-1], (shape[2], keys), generator=generator).to(index_dtype)
    return input, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_forward_equals_the_loops_bit_for_bit(dtype, index_dtype):
    input, index = example(dtype=dtype, index_dtype=index_dtype)
    output = rpe_index(input, index)
    assert output.dtype == dtype and torch.equal(output, oracles.lookup(input, index.long()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_adjoint_sums_into_buckets(dtype):
    _, index = example()
    grad = torch.randn(2, 3, 4, 6, dtype=torch.float64).to(dtype)
    exact = oracles.sum_into_buckets(grad, index, 5)
    plain = grad.new_zeros(2, 3, 4, 5).scatter_add(-1, index.expand(2, 3, -1, -1), grad)
    oracles.assert_as_accurate_as_torch(rpe_index_adjoint(grad, index, 5), plain, exact)


def test_each_is_the_gradient_of_the_other():
    input, index = example(requires_grad=True)
    grad = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(rpe_index(input, index), input, grad)[0], rpe_index_adjoint(grad, index, 5)
    )
    torch.testing.assert_close(
        torch.autograd.grad(rpe_index_adjoint(grad, index, 5), grad, input)[0], rpe_index(input, index)
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (1, 1, 1, 1), (2, 1, 7, 130), (1, 2, 3, 300)])
def test_edges_of_shape(shape):
    input, index = example(shape)
    assert torch.equal(rpe_index(input, index), oracles.lookup(input, index))
    grad = torch.randn(*shape[:3], 6, dtype=torch.float64)
    expected = oracles.sum_into_buckets(grad, index, shape[3])
    torch.testing.assert_close(rpe_index_adjoint(grad, index, shape[3]), expected)


def test_no_keys_and_no_queries():
    assert rpe_index(torch.zeros(1, 1, 3, 4), torch.zeros(3, 0, dtype=torch.int64)).shape == (1, 1, 3, 0)
    assert rpe_index(torch.zeros(1, 1, 0, 4), torch.zeros(0, 5, dtype=torch.int64)).shape == (1, 1, 0, 5)
    assert torch.equal(rpe_index_adjoint(torch.zeros(1, 1, 3, 0), torch.zeros(3, 0).long(), 4), torch.zeros(1, 1, 3, 4))


def test_strided_input_and_index():
    input, index = example()
    strided = torch.randn(3, 2, 5, 4, dtype=torch.float64).permute(1, 0, 3, 2)
    assert torch.equal(rpe_index(strided, index), oracles.lookup(strided, index))
    transposed = example(keys=4)[1].t()
    assert torch.equal(rpe_index(input, transposed), oracles.lookup(input, transposed))
    expanded = torch.randn(1, 3, 1, 5, dtype=torch.float64).expand(2, 3, 4, 5)
    assert torch.equal(rpe_index(expanded, index), oracles.lookup(expanded, index))


def test_gradients_numerically():
    input, index = example((1, 2, 3, 4), 3, requires_grad=True)
    assert gradcheck(lambda x: rpe_index(x, index), input, check_forward_ad=True)
    assert gradgradcheck(lambda x: rpe_index(x, index) ** 2, input)
    grad = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: rpe_index_adjoint(x, index, 4), grad, check_forward_ad=True)
    assert gradgradcheck(lambda x: rpe_index_adjoint(x, index, 4) ** 2, grad)


def scalar(x, index):
    return (rpe_index(x, index).sin() * 0.5).sum() + (rpe_index_adjoint(x[..., : index.shape[1]], index, 7) ** 3).sum()


def reference(x, index):
    wide = index.long().expand(*x.shape[:2], -1, -1)
    zeros = torch.zeros(*x.shape[:3], 7, dtype=x.dtype)
    sums = zeros.scatter_add(-1, wide, x[..., : index.shape[1]])
    return (x.gather(-1, wide).sin() * 0.5).sum() + (sums**3).sum()


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name):
    input, index = example((1, 2, 3, 5), 4, index_dtype=torch.uint8)
    transform = TRANSFORMS[name]
    torch.testing.assert_close(
        transform(lambda x: scalar(x, index))(input), transform(lambda x: reference(x, index))(input)
    )


def test_vmap_over_inputs_and_over_both():
    inputs, index = torch.randn(3, 1, 2, 4, 5), example()[1]
    expected = torch.stack([rpe_index(x, index) for x in inputs])
    assert torch.equal(torch.func.vmap(rpe_index, in_dims=(0, None))(inputs, index), expected)
    indices = torch.randint(0, 5, (3, 4, 6))
    expected = torch.stack([rpe_index(x, i) for x, i in zip(inputs, indices, strict=True)])
    assert torch.equal(torch.func.vmap(rpe_index)(inputs, indices), expected)


def test_forward_mode_is_not_silently_zero():
    input, index = example()
    with forward_ad.dual_level():
        output = rpe_index(forward_ad.make_dual(input, input.cos()), index)
        assert torch.equal(forward_ad.unpack_dual(output).tangent, rpe_index(input.cos(), index))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torch._dynamo.reset()

    def f(input, index):
        output = rpe_index(input * 2, index)
        return rpe_index_adjoint(output, index, input.shape[-1])

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(2, 3, 4, 5), (1, 2, 6, 7)]:
        input, index = example(shape, requires_grad=True)
        output, expected = compiled(input, index), f(input, index)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            torch.autograd.grad(output.sin().sum(), input), torch.autograd.grad(expected.sin().sum(), input)
        )


@pytest.mark.parametrize("name", ["grad", "jvp"])
def test_compiles_inside_a_transform(name):
    torch._dynamo.reset()
    input, index = example((1, 2, 3, 5), 4)
    f = TRANSFORMS[name](lambda x: scalar(x, index))
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(input), f(input))


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    input, index = example(dtype=torch.float32, requires_grad=True)
    output = torch.compile(rpe_index, fullgraph=True)(input, index)
    assert torch.equal(output, rpe_index(input, index))
    output.sum().backward()
    torch.testing.assert_close(input.grad, oracles.sum_into_buckets(torch.ones_like(output), index, 5).float())


def test_ids_are_not_read_while_operators_are_recorded():
    input, index = example()
    graph = make_fx(lambda x: rpe_index_adjoint(rpe_index(x, index), index, 5))(input)
    assert torch.equal(graph(input), rpe_index_adjoint(rpe_index(input, index), index, 5))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert rpe_index(mode.from_tensor(input), index).shape == (2, 3, 4, 6)


def test_exports():
    class Lookup(torch.nn.Module):
        def forward(self, input, index):
            return rpe_index(input, index)

    input, index = example()
    program = torch.export.export(Lookup(), (input, index))
    assert torch.equal(program.module()(input, index), rpe_index(input, index))
    assert "irpe" not in program.graph_module.code  # it may run where our operators are not registered


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, i: (x[0], i), "expected input (B, H, L_query, N) and index (L_query, L_key); got input (3, 4, 5)"),
        (lambda x, i: (x, i[0]), "got input (2, 3, 4, 5) and index (6,)"),
        (lambda x, i: (x, i[..., None]), "expected input (B, H, L_query, N) and index (L_query, L_key); got"),
        (lambda x, i: (x, i[:3]), "input (2, 3, 4, 5) and index (3, 6) differ in L_query"),
        (lambda x, i: (x, i.double()), "must be uint8, int16, int32 or int64, not torch.float64; use index.long()"),
        (lambda x, i: (x, i > 0), "not torch.bool"),
        (lambda x, i: (x.to(torch.float8_e5m2), i), "input must have a floating-point dtype, not torch.float8_e5m2"),
        (lambda x, i: (x, i.tolist()), "index must be a dense tensor, not list"),
        (lambda x, i: (x.to_sparse(), i), "input must be a dense tensor, not torch.sparse_coo"),
        (lambda x, i: (x, i.to_sparse()), "index must be a dense tensor, not torch.sparse_coo"),
        (lambda x, i: (x.long(), i), "input must have a floating-point dtype, not torch.int64"),
        (lambda x, i: (x.to("meta"), i), "input is on meta and index on cpu; use index.to(input.device)"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        rpe_index(*change(*example()))


def test_adjoint_names_both_lengths():
    with pytest.raises(ValueError, match="differ in L_query or L_key"):
        rpe_index_adjoint(torch.zeros(1, 1, 4, 5), example()[1], 5)


@pytest.mark.parametrize("wrong", [-1, 5, 100])
def test_index_out_of_range(wrong):
    input, index = example()
    rpe_index(input, index)
    index[1, 2] = wrong  # after a call that found it right: the change must be seen
    with pytest.raises(IndexError, match=f"index holds {wrong}; 5 buckets allow 0 to 4"):
        rpe_index(input, index)
    with pytest.raises(IndexError, match="rpe_index_adjoint: index holds"):
        rpe_index_adjoint(torch.zeros(2, 3, 4, 6), index, 5)
    index[1, 2] = 4
    rpe_index(input, index)


def test_the_range_of_inference_tensors_is_checked_each_time():
    with torch.inference_mode():
        input, index = example()
        rpe_index(input, index)
        index[0, 0] = 9
        with pytest.raises(IndexError, match="index holds 9"):
            rpe_index(input, index)


def test_the_kernel_is_taken_where_it_exists(path, monkeypatch):
    input, index = example()
    calls = []
    if path == "kernel":
        real = torch.ops.irpe.rpe_index
        monkeypatch.setattr(torch.ops.irpe, "rpe_index", lambda *a: calls.append(1) or real(*a))
    rpe_index(input, index)
    torch.func.vmap(rpe_index, in_dims=(0, None))(input[None], index)
    assert len(calls) == (1 if path == "kernel" else 0)


@pytest.mark.parametrize("built", [True, False])
def test_a_gpu_that_the_extension_was_not_built_for_gets_plain_pytorch(monkeypatch, built):
    tensor = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    monkeypatch.setattr(MODULE, "compiled_devices", ("cpu", "cuda"))
    monkeypatch.setattr(MODULE, "built_for", lambda device: built and device == 1)
    assert MODULE.has_kernel(tensor) is built


def test_missing_kernels_are_named_with_the_remedy(monkeypatch):
    build = "pip install ./rpe_ops_cuda"
    monkeypatch.setattr(MODULE, "extension_error", "no such file")
    for kind in ("cpu", "cuda"):
        assert MODULE.missing_kernels(kind) == f"rpe_ops_cuda does not load (no such file); build it: {build}"
    monkeypatch.setattr(MODULE, "extension_error", "")
    monkeypatch.setattr(MODULE, "compiled_devices", ("cpu",))
    assert MODULE.missing_kernels("cpu") is None
    assert MODULE.missing_kernels("cuda").endswith(f"without CUDA; with a CUDA toolkit installed: FORCE_CUDA=1 {build}")
    monkeypatch.setattr(MODULE, "compiled_devices", ("cpu", "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in MODULE.missing_kernels("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device))
    monkeypatch.setattr(MODULE, "built_for", lambda device: device == 1)
    assert MODULE.missing_kernels("cuda", 9).endswith(f"other GPUs; build it here: TORCH_CUDA_ARCH_LIST=8.9 {build}")
    assert MODULE.missing_kernels("cuda", 1) is None


def test_asking_what_the_extension_was_built_for_is_a_constant_of_the_graph(monkeypatch):
    """Dynamo traces through lru_cache even if it is marked, and an operator that returns a bool cannot be traced."""
    with torch.library._scoped_library("irpe_of_a_test", "DEF") as library:
        library.define("has_code_for(int device) -> bool")
        library.impl("has_code_for", lambda device: device == 7, "CompositeExplicitAutograd")
        cuda, ops = SimpleNamespace(is_available=lambda: True), SimpleNamespace(irpe=torch.ops.irpe_of_a_test)
        monkeypatch.setattr(MODULE, "torch", SimpleNamespace(cuda=cuda, ops=ops))
        compiled = torch.compile(lambda x: x + MODULE.built_for(7), backend="eager", fullgraph=True)
        assert compiled(torch.zeros(())) == 1 and not MODULE.built_for(8)
