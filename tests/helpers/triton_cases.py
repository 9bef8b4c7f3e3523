"""The Triton backend against the definition: run by test_triton_interpreter.py, and by test_triton_gpu.py's GPU."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from irpe_ops import build_rpe, methods, modes, parse_rpe_spec, rpe_attention
from irpe_ops.backends import eager, triton_launch
from irpe_ops.backends import triton as triton_backend
from tests import oracles

DEVICE = "cpu" if triton_backend.INTERPRETED else "cuda"
# ratio 1 has few buckets, which the interpreter visits one by one.
SPECS = [
    "rpe-1.0-product-ctx-1-qkv",
    "rpe-1.9-product-ctx-0-k",
    "rpe-1.0-euc-ctx-0-qkv",
    "rpe-1.0-quant-ctx-1-qkv",
    "rpe-1.0-cross-ctx-1-qkv",
    "rpe-1.0-cross-bias-0-qk",
    "rpe-1.0-product-bias-1-k",
    "rpe-1.0-product-ctx-1-q",
    "rpe-1.0-product-ctx-0-v",
]


def example(spec="rpe-1.0-product-ctx-1-qkv", grid=(2, 3), skip=1, batch=2, heads=2, head_dim=8, dtype=torch.float32):
    """Packed q, k, v (so that each is strided), and encodings with filled tables."""
    encodings = build_rpe(parse_rpe_spec(spec, skip), head_dim, heads)
    for seed, rpe in enumerate(encodings):
        if rpe is not None:
            oracles.fill_tables(rpe, seed)
            rpe.to(DEVICE, dtype)
    generator = torch.Generator().manual_seed(0)
    length = grid[0] * grid[1] + skip
    packed = torch.randn(batch, length, 3, heads, head_dim, generator=generator, dtype=torch.float64)
    return packed.to(DEVICE, dtype), encodings, {"height": grid[0], "width": grid[1]}


def run(packed, encodings, options, backend, dtype):
    """The result and all gradients, of a loss with random weights."""
    packed = packed.detach().to(dtype).requires_grad_()
    encodings = [None if rpe is None else copy.deepcopy(rpe).to(dtype) for rpe in encodings]
    out = rpe_attention(*packed.permute(2, 0, 3, 1, 4), *encodings, **options, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tables = [p for rpe in encodings if rpe is not None for p in rpe.parameters()]
    return [out.detach(), *torch.autograd.grad((out * weights.to(out)).sum(), [packed, *tables])]


def assert_right(packed, encodings, options):
    exact = run(packed, encodings, options, "eager", torch.float64)
    plain = run(packed, encodings, options, "eager", packed.dtype)
    for ours, theirs, answer in zip(run(packed, encodings, options, "triton", packed.dtype), plain, exact, strict=True):
        oracles.assert_as_accurate_as_torch(ours, theirs, answer, slack=4.0)


@pytest.mark.parametrize("number", range(len(SPECS)))
def test_forward_and_all_gradients(number):
    grid, skip = (((2, 3), 1), ((1, 5), 2), ((3, 2), 0))[number % 3]
    assert_right(*example(SPECS[number], grid, skip, batch=1))


def test_a_registered_method():
    methods.METHODS["reach"] = methods.BucketMap(
        lambda drow, dcol, index, beta: index(torch.maximum(drow.abs(), dcol.abs())), lambda beta: beta + 1
    )
    assert_right(*example("rpe-1.0-reach-ctx-1-qkv", (2, 3), 1, batch=1))


LAYOUTS = [lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1]]


@pytest.mark.parametrize("lay_out", LAYOUTS, ids=["rows", "columns", "rows of odd lengths"])
def test_a_registered_mode(lay_out):
    modes.MODES["half"] = modes.MODES["ctx"]._replace(lookup=lambda x, table: lay_out(modes.product(x, table) / 2))
    assert_right(*example("rpe-1.0-product-half-1-qk", (2, 3), 1, batch=1))


def test_several_tiles():
    assert_right(*example("rpe-0.5-product-ctx-1-qkv", (5, 13), 0, batch=1, heads=1))


@pytest.mark.parametrize("spec", ["rpe-0.5-product-ctx-1-qkv", "rpe-0.5-cross-ctx-0-qkv"])
def test_numbers_for_pairs_are_kept_for_some_planes_at_a_time(monkeypatch, spec):
    case = example(spec, (2, 3), 1, batch=2, heads=1)
    whole = run(*case, "triton", torch.float32)
    monkeypatch.setattr(triton_launch, "chunk_bytes", lambda device: 1)  # one plane, the minimum
    for pieces, expected in zip(run(*case, "triton", torch.float32), whole, strict=True):
        assert torch.equal(pieces, expected)


def test_no_encoding():
    packed, _, _ = example()
    assert_right(packed, (None, None, None), {})


def test_padding_and_a_float_mask_and_a_query_without_keys():
    packed, encodings, options = example("rpe-0.5-product-ctx-1-qkv")
    padding = torch.zeros(2, 7, dtype=torch.bool, device=DEVICE)
    padding[0, 4:] = True
    padding[1] = True
    mask = torch.randn(1, 2, 7, 7, dtype=torch.float64).to(DEVICE)
    mask[:, :, 2] = -math.inf
    options |= {"key_padding_mask": padding, "attn_mask": mask}
    assert_right(packed, encodings, options)
    out = run(packed, encodings, options, "triton", torch.float32)[0]
    assert not out[1].any() and not out[0, :, 2].any() and out[0, :, 3].all()


def test_bool_mask():
    packed, encodings, options = example("rpe-0.5-euc-ctx-1-k")
    assert_right(packed, encodings, options | {"attn_mask": torch.rand(2, 1, 7, 7, device=DEVICE) < 0.4})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    assert_right(*example(batch=1, heads=1, dtype=dtype))


def test_autocast_is_in_half_precision_with_fp32_tables():
    packed, encodings, options = example(batch=1)
    exact = run(packed, encodings, options, "eager", torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(packed, encodings, options, "triton", torch.float32)
        plain = run(packed, encodings, options, "eager", torch.float32)
    assert ours[0].dtype == torch.bfloat16 and {x.dtype for x in ours[1:]} == {torch.float32}
    for table in ours[2:]:  # no rounding at the end; buckets that this grid does not use are zero
        assert (table != table.bfloat16())[table != 0].float().mean() > 0.9
    for x, y, answer in zip(ours, plain, exact, strict=True):
        assert (x.double() - answer).norm() <= 2 * (y.double() - answer).norm() + 2e-3 * answer.norm()


def test_two_runs_give_the_same_bits():
    case = example("rpe-0.5-cross-ctx-1-qkv", (2, 3) if DEVICE == "cpu" else (25, 38), batch=1, heads=1)
    for first, second in zip(run(*case, "triton", torch.float32), run(*case, "triton", torch.float32), strict=True):
        assert torch.equal(first, second)


def dropout_options(options):
    return options | {"dropout_p": 0.25}


def dropped_weights(heads, length, p):
    """(1, H, L, L): with equal scores and the identity as values, the result is the weights themselves."""
    q = torch.zeros(1, heads, length, length, device=DEVICE)
    unit = torch.eye(length, device=DEVICE).expand(1, heads, -1, -1)
    return rpe_attention(q, q, unit, dropout_p=p, backend="triton")


def test_dropout_keeps_each_weight_with_its_probability_and_scales_it():
    torch.manual_seed(3)
    first, second = dropped_weights(4, 32, 0.25), dropped_weights(4, 32, 0.25)
    torch.manual_seed(3)
    assert torch.equal(first, dropped_weights(4, 32, 0.25))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0, 0], first[0, 1])
    kept = first > 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / 32 / 0.75))
    # 4,096 draws: five standard deviations are 0.034.
    assert abs(kept.float().mean().item() - 0.75) < 0.034
    assert kept.float().mean((0, 1, 2)).std() < 0.1 and kept.float().mean((0, 1, 3)).std() < 0.1


def test_dropout_forward_and_gradients(monkeypatch):
    """The same weights dropped in plain PyTorch, also for the encoding on values."""
    packed, encodings, options = example("rpe-1.0-cross-ctx-1-qkv", (2, 4), 0, batch=1, head_dim=8)
    torch.manual_seed(3)
    kept = dropped_weights(2, 8, 0.25) > 0
    monkeypatch.setattr(eager.F, "dropout", lambda weights, p, **_: weights * kept / (1 - p))
    exact = run(packed, encodings, dropout_options(options), "eager", torch.float64)
    torch.manual_seed(3)
    for ours, answer in zip(
        run(packed, encodings, dropout_options(options), "triton", torch.float32), exact, strict=True
    ):
        torch.testing.assert_close(ours.double(), answer, rtol=1e-4, atol=1e-5)


def test_nan_stays_nan_and_only_where_it_belongs():
    packed, encodings, options = example(batch=1)
    packed[0, 3, 0] = math.nan  # one query
    out = run(packed, encodings, options, "triton", torch.float32)[0]
    assert out[:, :, 3].isnan().all() and not out[:, :, [0, 1, 2, 4, 5, 6]].isnan().any()


def test_no_tokens():
    q = torch.zeros(2, 2, 0, 8, device=DEVICE)
    assert rpe_attention(q, q, q, backend="triton").shape == q.shape


def test_empty_batch():
    packed, encodings, options = example(batch=0)
    out, *grads = run(packed, encodings, options, "triton", torch.float32)
    assert out.shape == (0, 2, 7, 8) and all(not grad.any() for grad in grads)


def test_any_strides():
    packed, encodings, options = example("rpe-0.5-product-ctx-1-k", batch=1)
    odd = packed.transpose(1, 4).contiguous().transpose(1, 4)  # the last dimension is not the adjacent one
    for ours, expected in zip(
        run(odd, encodings, options, "triton", torch.float32),
        run(packed, encodings, options, "triton", torch.float32), strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("spec", ["rpe-1.0-cross-ctx-1-qkv", "rpe-1.0-product-bias-0-k"])
def test_compiles_without_a_graph_break(spec):
    packed, encodings, options = example(spec, batch=1, heads=1)
    torch.compiler.reset()
    compiled = torch.compile(rpe_attention, fullgraph=True, backend="aot_eager")

    def gradients(function):
        x = packed.clone().requires_grad_()
        out = function(*x.permute(2, 0, 3, 1, 4), *encodings, **options, backend="triton")
        return out.detach(), *torch.autograd.grad(out.square().sum(), x)

    for ours, expected in zip(gradients(compiled), gradients(rpe_attention), strict=True):
        torch.testing.assert_close(ours, expected)


def test_operator_is_registered_correctly():
    packed, encodings, options = example(batch=1, heads=1)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    lookup, offsets = torch.randn(1, 1, 7, 32, device=DEVICE), encodings[1].offset_ids(2, 3, q.device)[None]
    tensors = [x.detach().requires_grad_() for x in (q, k, v, lookup)]
    arguments = (*tensors[:3], tensors[3], None, None, None, None, offsets, "product:1.0", 2, 3, 1, True, 0.0, 0.5)
    torch.library.opcheck(
        triton_backend.fused_attention, arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )  # fmt: skip


def test_second_derivatives_are_refused_not_wrong():
    packed, encodings, options = example(batch=1)
    x = packed.requires_grad_()
    out = rpe_attention(*x.permute(2, 0, 3, 1, 4), *encodings, **options, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_attention_backward"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec": "rpe-4.0-product-ctx-1-k"}, "up to 256 buckets, ratio=4 has 290"),
        ({"head_dim": 136, "dtype": torch.bfloat16}, "heads of up to 128 dimensions in torch.bfloat16, got D=136"),
        ({"head_dim": 72}, "heads of up to 64 dimensions in torch.float32, got D=72"),
        ({"dtype": torch.float64}, "float32, bfloat16 and float16, not torch.float64"),
    ],
)
def test_refusals_by_shape(change, words):
    packed, encodings, options = example(**change)
    with pytest.raises(ValueError, match="backend='triton' cannot run this call: .*" + words):
        rpe_attention(*packed.permute(2, 0, 3, 1, 4), *encodings, **options, backend="triton")


@pytest.mark.parametrize(("switch", "words"), [("older", "ieee"), ("newer", "tf32"), ("newer ieee", "ieee")])
def test_fp32_products_follow_either_of_the_switches(switch, words):
    before = torch.backends.fp32_precision
    try:
        if switch != "older":
            torch.backends.fp32_precision = "ieee" if "ieee" in switch else "tf32"
        assert triton_launch.fp32_products() == words
        assert triton_launch.constants(torch.bfloat16, 64, 9)["PRECISION"] == "ieee"  # it applies to fp32 only
    finally:
        torch.backends.fp32_precision = before


def test_older_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(triton_backend, "generation", lambda device: 7)
    q = SimpleNamespace(device=torch.device("cuda"))
    reason = triton_backend.why_not(SimpleNamespace(q=q, attn_mask=None, encodings=[]))
    assert "compute capability 8.0" in reason and "backend='sdpa'" in reason


def test_refusals():
    packed, encodings, options = example()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    mask = torch.zeros(7, 7, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for attn_mask"):
        rpe_attention(q, k, v, *encodings, **options, attn_mask=mask, backend="triton")
    _, (_, other, _), _ = example("rpe-1.0-euc-ctx-1-k")
    with pytest.raises(ValueError, match="share method, ratio and skip"):
        rpe_attention(q, k, v, encodings[0], other, None, **options, backend="triton")
    with pytest.raises(ValueError, match="torch.func and forward-mode differentiation need plain PyTorch"):
        torch.func.grad(lambda x: rpe_attention(x, k, v, *encodings, **options, backend="triton").sum())(q)
