"""A mode is one row: one added here works in every backend that uses lookups, and is refused by name in the other."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from irpe_ops import build_rpe, modes, parse_rpe_spec, rpe_attention
from irpe_ops.backends import module_of
from irpe_ops.modes import MODES, Mode, _Product, product

SPEC = "rpe-1.9-product-both-0-qk"


@pytest.fixture
def both(monkeypatch):
    """Context and bias in one table, ``(H, D + 1, N)``: the token's vector, lengthened by a one, times the table."""

    def lookup(x, table):
        return torch.cat([x, torch.ones_like(x[..., :1])], -1) @ table

    row = Mode("lookup_table_both", lambda heads, dim, buckets: (heads, dim + 1, buckets), lookup, True, False)
    monkeypatch.setitem(MODES, "both", row)


def example():
    torch.manual_seed(0)
    encodings = build_rpe(parse_rpe_spec(SPEC, skip=1), 8, 2)
    for rpe in encodings[:2]:
        nn.init.normal_(rpe.table, std=0.5)
    return torch.randn(3, 2, 2, 13, 8).unbind(), encodings, {"height": 3, "width": 4}


@pytest.mark.usefixtures("both")
def test_it_is_the_sum_of_ctx_and_bias():
    (q, k, v), encodings, grid = example()
    added = {}
    for mode, part in (("ctx", slice(None, 8)), ("bias", slice(8, None))):
        modules = build_rpe(parse_rpe_spec(f"rpe-1.9-product-{mode}-0-qk", skip=1), 8, 2)
        for ours, theirs in zip(encodings[:2], modules[:2], strict=True):
            theirs.table.data.copy_(ours.table[:, part].reshape(theirs.table.shape))
        added[mode] = modules[1](q * 8**-0.5, 3, 4) + modules[0](k * 8**-0.5, 3, 4).transpose(2, 3)
    weights = (q * 8**-0.5 @ k.transpose(2, 3) + added["ctx"] + added["bias"]).softmax(-1)
    assert list(encodings[1].state_dict()) == ["lookup_table_both"]
    for backend in ("eager", "auto"):
        torch.testing.assert_close(rpe_attention(q, k, v, *encodings, **grid, backend=backend), weights @ v)


@pytest.mark.usefixtures("both")
def test_the_backend_without_it_says_so():
    qkv, encodings, grid = example()
    if module_of("compiled").missing():
        pytest.skip(module_of("compiled").missing())
    with pytest.raises(ValueError, match="it supports the modes ctx and bias, not 'both'; use backend='eager'"):
        rpe_attention(*qkv, *encodings, **grid, backend="compiled")


@pytest.mark.usefixtures("both")
def test_a_mode_that_values_cannot_have():
    with pytest.raises(ValueError, match="mode 'both' with rpe_on 'qkv'"):
        parse_rpe_spec("rpe-1.9-product-both-0-qkv")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [0, 1])
def test_lookup_has_a_column_for_every_bucket(mode, shared):
    _, rpe_k, _ = build_rpe(parse_rpe_spec(f"rpe-1.9-euc-{mode}-{shared}-k", skip=1), 8, 2)
    nn.init.normal_(rpe_k.table)
    x = torch.randn(2, 2, 13, 8)
    found = rpe_k.lookup(x).expand(2, 2, 13, rpe_k.num_buckets)
    ids = rpe_k.bucket_ids(13, 3, 4, x.device).long()
    torch.testing.assert_close(found.gather(-1, ids.expand(2, 2, -1, -1)), rpe_k(x, 3, 4).expand(2, 2, -1, -1))
    if mode == "ctx":
        torch.testing.assert_close(rpe_k.lookup(x, scale=0.5), rpe_k.lookup(x * 0.5))
        assert rpe_k.lookup(x, dtype=torch.bfloat16).dtype == torch.bfloat16


def strided(*shape, dtype):
    """Heads inside the tokens, as a packed projection leaves them."""
    batch, heads, length, width = shape
    return torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tables", [1, 3])
def test_the_gradient_of_an_fp32_table_is_fp32_whatever_the_tokens_are(tables, dtype):
    torch.manual_seed(0)
    x = strided(4, 3, 500, 8, dtype=dtype).requires_grad_()
    table = torch.randn(tables, 8, 10, requires_grad=True)
    grad = strided(4, 3, 500, 10, dtype=dtype)
    out = product(x, table)
    rounded = table.detach().to(dtype)
    torch.testing.assert_close(out, x @ rounded)
    grad_x, grad_table = torch.autograd.grad(out, (x, table), grad)
    torch.testing.assert_close(grad_x, grad @ rounded.mT)
    exact = torch.einsum("bhld,bhln->hdn", x.double(), grad.double())
    exact = exact.sum(0, keepdim=True) if tables == 1 else exact
    assert grad_table.dtype == torch.float32 and grad_x.dtype == dtype
    torch.testing.assert_close(grad_table.double(), exact, rtol=1e-5, atol=1e-4)  # bf16 would have an error of 0.2
    with torch.autocast("cpu", torch.bfloat16):  # backward called inside
        inside = torch.autograd.grad(product(x, table), table, grad)[0]
    assert torch.equal(inside, grad_table)


def test_a_frozen_table_and_frozen_tokens():
    x, table = (
        torch.randn(2, 2, 5, 4, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(1, 4, 3, requires_grad=True),
    )
    assert product(x.detach(), table).sum().backward() is None and x.grad is None
    assert product(x, table.detach()).sum().backward() is None and x.grad is not None


class Seen(TorchDispatchMode):
    """The names of all operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "wide"),
    [
        (8, None, torch.bfloat16, True),
        (8, None, torch.float32, False),
        (7, None, torch.bfloat16, False),  # T4, V100: PyTorch has no such product there
        (9, "7.0", torch.bfloat16, False),  # nor has ROCm
    ],
)
def test_on_a_gpu_the_product_of_halves_is_asked_for_in_fp32(monkeypatch, capability, hip, dtype, wide):
    """No GPU runs here: the shapes and dtypes that PyTorch would give."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode(), Seen() as seen:
        x = torch.empty(2, 3, 5, 4, device="cuda", dtype=dtype)
        for tables in (1, 3):
            table = torch.empty(tables, 4, 7, device="cuda")
            ctx = SimpleNamespace(
                saved_tensors=(x, table, modes._matrix(x, table.to(dtype))), needs_input_grad=(True, True)
            )
            grad_x, grad_table = _Product.backward(ctx, product(x, table))
            assert (grad_x.dtype, grad_table.dtype) == (dtype, torch.float32)
            assert grad_x.shape == x.shape and grad_table.shape == table.shape
    assert ("aten.bmm.dtype" in seen.names) == wide


@pytest.mark.parametrize("backend", ["eager", "sdpa", "compiled"])
@pytest.mark.parametrize("rpe_on", ["qk", "qkv"])
@pytest.mark.parametrize("compiles", [False, True])
def test_under_autocast_no_backend_rounds_the_gradient_of_a_table(backend, rpe_on, compiles):
    if module_of(backend).missing() or (backend, rpe_on) == ("sdpa", "qkv"):
        pytest.skip("does not exist here")
    torch.manual_seed(0)
    encodings = build_rpe(parse_rpe_spec(f"rpe-1.9-product-ctx-1-{rpe_on}", skip=1), 8, 2)
    tables = [nn.init.normal_(rpe.table, std=0.5) for rpe in encodings if rpe is not None]
    qkv = [strided(8, 2, 50, 8, dtype=torch.float32) for _ in range(3)]
    torch.compiler.reset()  # the tests before this one have compiled the same function, and there is a limit

    ours = torch.compile(rpe_attention, backend="aot_eager", fullgraph=True) if compiles else rpe_attention

    def gradients(attention, dtype, name, autocast):
        modules = [None if rpe is None else copy.deepcopy(rpe).to(dtype) for rpe in encodings]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attention(*(x.bfloat16().to(dtype) for x in qkv), *modules, backend=name)
        weights = strided(8, 2, 50, 8, dtype=torch.bfloat16)
        return torch.autograd.grad(
            (out.double() * weights.double()).sum(), [p for m in modules if m for p in m.parameters()]
        )

    torch.manual_seed(1)
    exact = gradients(rpe_attention, torch.float64, "eager", False)
    torch.manual_seed(1)
    for grad, answer, table in zip(gradients(ours, torch.float32, backend, True), exact, tables, strict=True):
        assert grad.dtype == table.dtype
        assert (grad != grad.bfloat16()).float().mean() > 0.9  # of a random fp32 number the last 16 bits are not zero
        assert (grad.double() - answer).norm() < 2**-8 * answer.norm()


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_of_packed_tokens_as_on_a_gpu(monkeypatch, dtype, tables):
    """There q lies inside q, k and v, and each head is a product of its own."""
    results = []
    for packed in (False, True):
        monkeypatch.setattr(modes, "_is_packed", lambda x, packed=packed: packed)
        generator = torch.Generator().manual_seed(0)
        x, table, grad = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((2, 5, 3, 3, 4), (tables, 4, 6), (2, 3, 5, 6))
        )
        x, table = x.to(dtype).requires_grad_(), table.float().requires_grad_()
        out = modes.product(x.permute(2, 0, 3, 1, 4)[0], table if dtype != torch.float64 else table.double())
        results.append([out, *torch.autograd.grad(out, [x, table], grad.to(dtype))])
    for plain, ours in zip(*results, strict=True):
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(255, 5, 85), (50_235, 384, 17), (13_600, 40, 100), (1_009, 40, 1)]
)
def test_a_long_product_for_a_table_is_some_products_of_groups_of_rows(monkeypatch, rows, columns, groups):
    """As many as fill a GPU and divide the rows; in a compiled graph one for all sizes."""
    a, b = torch.ones(1, rows, columns), torch.arange(rows * 7.0).view(1, rows, 7) % 5
    first, second = modes._in_groups(a, b)
    assert len(first) == len(second) == groups
    assert torch.equal((first.mT @ second).sum(0), (a.mT @ b)[0])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert modes._in_groups(a, b) == (a, b)
