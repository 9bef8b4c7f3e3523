"""The fused CPU attention against the definition in fp64: every encoding, mask and instruction set."""

import pytest
import torch

import irpe_ops.backends.compiled as backend
from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention
from tests.helpers.cpu_kernels import capabilities
from tests.oracles import assert_as_accurate_as_torch, fill_tables

pytest.importorskip("rpe_ops_cuda._C", reason="rpe_ops_cuda is not installed")
ops = torch.ops.irpe


@pytest.fixture(params=capabilities())
def capability(request):
    before = ops.cpu_capability()
    ops.set_cpu_capability(request.param)
    yield request.param
    ops.set_cpu_capability(before)


@pytest.fixture(params=["kept", "computed again"])
def weights(request, monkeypatch):
    """Whether attention weights are kept for backward."""
    if request.param == "computed again":
        monkeypatch.setattr(backend, "KEPT_BYTES", 0)


class Case:
    """Random q, k, v, gradient and tables for one spec on one grid."""

    def __init__(self, spec, height, width, skip=0, batch=2, heads=2, head_dim=8, std=0.3):
        length = height * width + skip
        config = parse_rpe_spec(spec, skip=skip) if spec else None
        generator = torch.Generator().manual_seed(0)
        self.encodings = build_rpe(config, head_dim, heads)
        for rpe in self.encodings:
            if rpe is not None:
                fill_tables(rpe, std=std)
        # As a model hands them over: (B, L, H, D) in memory.
        self.tensors = [
            torch.randn(batch, length, heads, head_dim, generator=generator).transpose(1, 2) for _ in range(4)
        ]
        self.options = {"height": height, "width": width}

    def run(self, name, dtype=torch.float32):
        """Output, then the gradients of q, k, v and every table."""
        *qkv, grad = (t.detach().to(dtype) for t in self.tensors)
        qkv = [t.requires_grad_() for t in qkv]
        modules = [rpe for rpe in self.encodings if rpe is not None]
        of_tables = torch.float64 if dtype == torch.float64 else torch.float32
        tables = [p for rpe in modules for p in rpe.to(of_tables).parameters()]
        options = dict(self.options)
        if torch.is_tensor(options.get("attn_mask")) and options["attn_mask"].is_floating_point():
            options["attn_mask"] = options["attn_mask"].to(dtype)
        with torch.autocast("cpu", enabled=dtype in (torch.bfloat16, torch.float16), dtype=torch.bfloat16):
            out = rpe_attention(*qkv, *self.encodings, **options, backend=name)
        return [out.detach(), *torch.autograd.grad(out, [*qkv, *tables], grad.to(out.dtype))]

    def check(self, dtype=torch.float32):
        ours, eager, exact = self.run("compiled", dtype), self.run("eager", dtype), self.run("eager", torch.float64)
        for result in zip(ours, eager, exact, strict=True):
            assert_as_accurate_as_torch(*result)


SPECS = [
    "",
    *(f"rpe-1.9-product-ctx-1-{rpe_on}" for rpe_on in ("q", "k", "v", "qk", "qkv")),
    "rpe-2.0-product-ctx-0-qkv",
    "rpe-2.0-product-bias-0-qk",
    "rpe-2.0-product-bias-1-k",
    "rpe-2.0-cross-ctx-1-qkv",
    "rpe-20-cross-ctx-0-qkv",
    "rpe-2.0-cross-bias-1-qk",
    "rpe-20-euc-ctx-0-qkv",
    "rpe-33-quant-ctx-1-qkv",
]


@pytest.mark.parametrize("spec", SPECS)
def test_every_encoding(capability, weights, spec):
    Case(spec, 5, 9).check()


@pytest.mark.parametrize("grid", [(14, 14, 1), (1, 7, 2), (7, 1, 1), (1, 1, 1), (17, 34, 0)])
def test_every_grid(capability, weights, grid):
    height, width, skip = grid
    Case("rpe-1.9-product-ctx-1-qkv", height, width, skip, batch=1, head_dim=20).check()


def _padding():
    mask = torch.rand(2, 45, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[1] = True  # no key at all
    return mask


MASKS = {
    "padding": lambda: {"key_padding_mask": _padding()},
    "bool": lambda: {"attn_mask": torch.rand(45, 45, generator=torch.Generator().manual_seed(2)) < 0.3},
    "float": lambda: {"attn_mask": torch.randn(2, 1, 45, 45, generator=torch.Generator().manual_seed(3))},
    "float of heads": lambda: {"attn_mask": torch.randn(2, 45, 1, generator=torch.Generator().manual_seed(4))},
    "both": lambda: {"key_padding_mask": _padding(), "attn_mask": torch.eye(45, dtype=torch.bool)},
}


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(capability, weights, mask):
    case = Case("rpe-1.9-product-ctx-1-qkv", 5, 9)
    case.options.update(MASKS[mask]())
    case.check()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 20, 23, 33])
def test_each_image_has_its_own_padding_at_every_length(capability, weights, length):
    case = Case("rpe-1.9-product-ctx-1-k", 1, length, batch=3)
    padding = torch.rand(3, length, generator=torch.Generator().manual_seed(length)) < 0.5
    padding[:, 0] = False
    case.options["key_padding_mask"] = padding
    case.check()


@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-1-qkv", "rpe-2.0-cross-bias-1-qk"])
def test_autocast_takes_bf16_and_computes_in_fp32(weights, spec):
    case = Case(spec, 5, 9)
    case.check(torch.bfloat16)
    assert case.run("compiled", torch.bfloat16)[0].dtype == torch.bfloat16


def test_all_keys_masked_gives_zeros_and_finite_gradients(weights):
    case = Case("rpe-1.9-product-ctx-1-qkv", 5, 9)
    case.options["key_padding_mask"] = torch.ones(2, 45, dtype=torch.bool)
    out, *grads = case.run("compiled")
    assert not out.any()
    assert not any(g.any() for g in grads)


def test_nan_stays_nan():
    case = Case("rpe-1.9-product-ctx-1-qkv", 5, 9)
    case.tensors[0][0, 1, 7, 3] = float("nan")
    out = case.run("compiled")[0]
    assert out[0, 1, 7].isnan().all() and out.isnan().sum() == 8


def test_scores_near_the_largest_float(capability):
    """exp must not overflow on the way: two equal scores of 3e38 share the weight, whatever the internal scaling."""
    q, k = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8)
    q[..., 0], k[..., 0] = 1e19, torch.tensor([3e19, 3e19, 1e19])
    v = torch.randn(1, 1, 3, 8)
    encoding = build_rpe(parse_rpe_spec("rpe-1.9-product-bias-1-k"), 8, 1)
    out = rpe_attention(q, k, v, *encoding, height=1, width=3, scale=1.0, backend="compiled")
    torch.testing.assert_close(out, v[..., :2, :].mean(-2, keepdim=True).expand_as(out))


def test_any_strides():
    case = Case("rpe-1.9-product-ctx-1-qkv", 5, 9)
    expected = case.run("compiled")
    case.tensors = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in case.tensors]  # D is not the inner one
    for ours, same in zip(case.run("compiled"), expected, strict=True):
        assert torch.equal(ours, same)


def test_output_is_laid_out_for_the_projection():
    out = Case("rpe-1.9-product-ctx-1-k", 5, 9).run("compiled")[0]
    assert out.transpose(1, 2).is_contiguous()


def test_same_bits_twice_and_with_more_threads(weights):
    case = Case("rpe-1.9-product-ctx-1-qkv", 14, 14, 1, batch=3)
    case.options["dropout_p"] = 0.1

    def run():
        torch.manual_seed(5)
        return case.run("compiled")

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(1)


def test_dropout_is_that_of_the_definition(weights):
    """The weights it kept are read off by values that are unit vectors; then the definition with them must agree."""
    case = Case("rpe-1.9-product-ctx-1-qkv", 4, 10, batch=8, heads=2, head_dim=40)
    rpe_q, rpe_k, rpe_v = case.encodings
    q, k, v, grad = case.tensors
    before = rpe_attention(q, k, torch.eye(40).expand(8, 2, 40, 40), rpe_q, rpe_k, height=4, width=10, backend="eager")
    torch.manual_seed(3)
    after = rpe_attention(
        q, k, torch.eye(40).expand(8, 2, 40, 40), rpe_q, rpe_k, height=4, width=10, dropout_p=0.25, backend="compiled"
    )
    factor = (after / before).detach()
    kept = factor > 0.5
    torch.testing.assert_close(factor[kept], torch.full_like(factor[kept], 1 / 0.75), rtol=1e-4, atol=1e-4)
    assert abs(kept.double().mean() - 0.75) < 0.01  # 25,600 weights: 3.7 standard deviations
    assert (kept.double().mean((0, 1, 2)) - 0.75).abs().max() < 0.08  # and no key, query or head is favoured
    assert (kept.double().mean((0, 1, 3)) - 0.75).abs().max() < 0.08
    assert (kept.double().mean((2, 3)) - 0.75).abs().max() < 0.06

    case.options["dropout_p"] = 0.25
    torch.manual_seed(3)
    ours = case.run("compiled")
    tables = [p for rpe in case.encodings for p in rpe.double().parameters()]
    q, k, v, grad = (t.detach().double() for t in case.tensors)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    scaled, scale = q * 40**-0.5, 40**-0.5
    scores = scaled @ k.mT + rpe_k(scaled, 4, 10) + rpe_q(k * scale, 4, 10).mT
    dropped = scores.softmax(-1) * torch.where(kept, 1 / 0.75, 0.0)
    out = dropped @ v + rpe_v(dropped, 4, 10)
    exact = [out, *torch.autograd.grad(out, [*leaves, *tables], grad)]
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


def test_dropout_under_another_default_device():
    case = Case("", 5, 9)
    case.options["dropout_p"] = 0.5
    torch.manual_seed(1)
    first = case.run("compiled")[0]
    torch.manual_seed(1)
    with torch.device("meta"):  # what a user's `torch.set_default_device("cuda")` would be
        assert torch.equal(case.run("compiled")[0], first)


def test_new_dropout_each_call():
    case = Case("", 5, 9)
    case.options["dropout_p"] = 0.5
    assert not torch.equal(case.run("compiled")[0], case.run("compiled")[0])


def test_auto_takes_it_and_backward_needs_no_weights_in_memory(monkeypatch):
    """At L = 1024 no tensor of (L, L) floats exists in forward or backward when weights are recomputed."""
    monkeypatch.setattr(backend, "KEPT_BYTES", 0)
    case = Case("rpe-1.9-product-ctx-1-qkv", 32, 32, batch=1, heads=1, head_dim=16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                if torch.is_tensor(t) and t.is_floating_point():
                    largest = max(largest, t.numel())
            return result

    case.run("auto")
    with Watch():
        case.run("auto")
    assert largest <= 1024 * 64


def test_compile_without_graph_break():
    case = Case("rpe-1.9-product-ctx-1-qkv", 5, 9)
    case.options["key_padding_mask"] = _padding()
    expected = case.run("compiled")
    *qkv, grad = (t.detach() for t in case.tensors)
    qkv = [t.requires_grad_() for t in qkv]
    tables = [p for rpe in case.encodings for p in rpe.parameters()]

    def attend(q, k, v):
        return rpe_attention(q, k, v, *case.encodings, **case.options, backend="compiled")

    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*qkv)
    for a, b in zip([out, *torch.autograd.grad(out, [*qkv, *tables], grad)], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    case = Case("rpe-1.9-product-ctx-1-qkv", 3, 4)
    tensors = [t.detach().requires_grad_() for t in case.tensors[:3]]
    tables = [rpe.table for rpe in case.encodings]
    maps = [[rpe.bucket_ids(12, 3, 4, torch.device("cpu"))] for rpe in case.encodings]
    padding = torch.zeros(2, 12, dtype=torch.bool)
    seed = torch.tensor([7])
    for keep_probs in (True, False):
        arguments = (*tensors, *tables, *maps, padding, torch.zeros(12, 12), seed, 0.3, 0.1, True, keep_probs)
        torch.library.opcheck(ops.attention, arguments)


def test_function_transforms_go_through_plain_pytorch():
    case = Case("rpe-1.9-product-ctx-1-k", 3, 3, batch=1)
    q, k, v, _ = case.tensors

    def loss(q):
        return rpe_attention(q, k, v, *case.encodings, height=3, width=3).square().sum()

    expected = torch.autograd.grad(loss(q.requires_grad_()), q)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), expected)


def test_no_gradient_from_above_is_a_gradient_of_zero():
    class Stop(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: None)

    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    rpe_k = build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-k"), 8, 2)[1]
    out = rpe_attention(q, q, q, None, rpe_k, height=3, width=3, backend="compiled")
    for grad in torch.autograd.grad(Stop.apply(out).sum(), [q, rpe_k.lookup_table_weight]):
        assert not grad.any()


def test_second_derivative_is_refused_with_the_way_out():
    case = Case("rpe-1.9-product-ctx-1-k", 3, 3, batch=1)
    q, k, v, _ = case.tensors
    q = q.detach().requires_grad_()
    out = rpe_attention(q, k, v, *case.encodings, height=3, width=3, backend="compiled")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice; use .* backend='eager'"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype, words", [(torch.float64, "computes in float32, and q is torch.float64")])
def test_what_it_leaves_to_plain_pytorch(dtype, words):
    q = torch.randn(1, 1, 9, 8, dtype=dtype)
    with pytest.raises(ValueError, match=words):
        rpe_attention(q, q, q, backend="compiled")
    mask = torch.zeros(9, 9, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for attn_mask"):
        rpe_attention(q.float(), q.float(), q.float(), attn_mask=mask, backend="compiled")
    assert rpe_attention(q, q, q).dtype == dtype  # auto


def test_mistakes_of_direct_callers_are_named():
    q = torch.randn(1, 2, 9, 8)
    index = torch.zeros(9, 9, dtype=torch.int64)

    def call(q=q, k=q, table=None, index=(), padding=None, dropout_p=0.0):
        return ops.attention(
            q, k, q, None, table, None, [], list(index), [], padding, None, None, 1.0, dropout_p, False, False
        )

    for arguments, words in [
        ({"k": q[:, :1]}, "q, k and v must be .B, H, L, D. of one shape"),
        ({"table": torch.zeros(3, 8, 5), "index": [index]}, r"table_k \[3, 8, 5\] does not fit H=2 and D=8"),
        ({"table": torch.zeros(1, 8, 5), "index": [index[:5]]}, r"must be \(L, L\) with L=9, got \[5, 9\]"),
        ({"table": torch.zeros(1, 8, 5)}, "needs one or two index maps, got 0"),
        ({"padding": torch.zeros(1, 8, dtype=torch.bool)}, r"key_padding_mask must be bool and \(B, L\)"),
        ({"dropout_p": 0.5}, "dropout needs a seed"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            call(**arguments)
    with pytest.raises(IndexError, match="index holds 9; with 5 buckets"):
        call(table=torch.zeros(1, 8, 5), index=[index + 9])
    with pytest.raises(RuntimeError, match="keep=True is needed"):
        call(q=q.clone().requires_grad_())


@pytest.mark.parametrize("shape", [(0, 2, 9, 8), (2, 0, 9, 8)])
def test_empty_batch(shape):
    q = torch.empty(shape, requires_grad=True)
    out = rpe_attention(q, q, q, backend="compiled")
    assert out.shape == shape
    assert torch.autograd.grad(out.sum(), q)[0].shape == shape
