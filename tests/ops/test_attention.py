"""rpe_attention: the eager definition against the loops, masks, dropout, autocast, and the choice of a backend."""

import itertools
import math
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention
from irpe_ops.backends import module_of
from tests import oracles


@pytest.fixture(params=["eager", "auto"])
def backend(request):
    """The definition, and the backend that this machine takes for the same call."""
    return request.param


def example(spec="rpe-1.9-product-ctx-1-qkv", grid=(2, 3), skip=1, batch=2, heads=2, head_dim=4, dtype=torch.float32):
    """Encodings with filled tables, and random q, k, v."""
    encodings = build_rpe(parse_rpe_spec(spec, skip), head_dim, heads)
    for seed, rpe in enumerate(encodings):
        if rpe is not None:
            oracles.fill_tables(rpe.to(dtype), seed)
    generator = torch.Generator().manual_seed(1)
    length = grid[0] * grid[1] + skip
    qkv = torch.randn(3, batch, heads, length, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    return *qkv.unbind(), *encodings


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)


SPECS = [
    f"rpe-1.9-{method}-{mode}-{shared}-{on}"
    for method, (mode, on), shared in itertools.product(
        ("euc", "quant", "cross", "product"), (("ctx", "k"), ("ctx", "qkv"), ("bias", "qk")), (0, 1)
    )
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("grid", "skip"), [((2, 3), 1), ((3, 1), 0), ((1, 3), 2)])
def test_equals_the_loops(spec, grid, skip, backend):
    arguments = example(spec, grid, skip)
    out = rpe_attention(*arguments, height=grid[0], width=grid[1], backend=backend)
    close(out, oracles.attention(*arguments, *grid))


@pytest.mark.parametrize("rpe_on", ["q", "k", "v", "qk", "qv", "kv"])
def test_any_place(rpe_on, backend):
    arguments = example(f"rpe-1.9-product-ctx-1-{rpe_on}")
    close(rpe_attention(*arguments, height=2, width=3, backend=backend), oracles.attention(*arguments, 2, 3))


def test_the_largest_table(backend):
    arguments = example("rpe-16383.5-euc-ctx-1-qkv", batch=1)
    assert arguments[-1].num_buckets == 2**16
    close(rpe_attention(*arguments, height=2, width=3, backend=backend), oracles.attention(*arguments, 2, 3))


def test_zero_tables_and_no_encodings_are_plain_attention(backend):
    q, k, v, *encodings = example()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    close(rpe_attention(q, k, v, backend=backend), expected)
    for rpe in encodings:
        torch.nn.init.zeros_(rpe.table)
    close(rpe_attention(q, k, v, *encodings, height=2, width=3, backend=backend), expected)


def test_the_square_grid_is_found(backend):
    arguments = example(grid=(3, 3))
    close(rpe_attention(*arguments, backend=backend), oracles.attention(*arguments, 3, 3))


def test_scale(backend):
    arguments = example()
    out = rpe_attention(*arguments, height=2, width=3, scale=0.7, backend=backend)
    close(out, oracles.attention(*arguments, 2, 3, scale=0.7))


@pytest.mark.parametrize("backend", ["eager", "auto", "sdpa"])
def test_an_empty_batch_gives_tables_gradients_of_zero(backend):
    q, k, v, *encodings = example(f"rpe-1.9-cross-ctx-1-qk{'v' * (backend != 'sdpa')}", batch=0)
    out = rpe_attention(q.requires_grad_(), k, v, *encodings, height=2, width=3, backend=backend)
    assert out.shape == (0, 2, 7, 4)
    out.sum().backward()
    assert not any(part.table.grad.any() for rpe in encodings if rpe for part in rpe.parts)


def test_strided_inputs(backend):
    q, k, v, *encodings = example()
    packed = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()  # (B, L, 3, H, D), as a qkv projection gives
    strided = packed.permute(2, 0, 3, 1, 4).unbind()
    close(
        rpe_attention(*strided, *encodings, height=2, width=3, backend=backend),
        oracles.attention(q, k, v, *encodings, 2, 3),
    )


@pytest.mark.parametrize("shape", [(7, 7), (1, 1, 7, 7), (2, 1, 1, 7), (2, 2, 7, 7), (2, 7, 1)])
def test_float_mask_is_added(shape, backend):
    arguments = example()
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    out = rpe_attention(*arguments, height=2, width=3, attn_mask=mask, backend=backend)
    close(out, oracles.attention(*arguments, 2, 3, added=mask.expand(2, 2, 7, 7)))


def test_bool_mask_and_padding_exclude(backend):
    arguments = example()
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 1, 7, 7, generator=generator) > 0.6
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    out = rpe_attention(*arguments, height=2, width=3, attn_mask=mask, key_padding_mask=padding, backend=backend)
    close(out, oracles.attention(*arguments, 2, 3, excluded=(mask | padding[:, None, None]).expand(2, 2, 7, 7)))


def test_padding_is_invisible(backend):
    q, k, v, *encodings = example()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[:, 4:] = True
    options = {"height": 2, "width": 3, "key_padding_mask": padding, "backend": backend}
    out = rpe_attention(q, k, v, *encodings, **options)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 4:], v2[:, :, 4:] = 100.0, -100.0
    torch.testing.assert_close(rpe_attention(q, k2, v2, *encodings, **options), out)


@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
def test_a_query_without_keys_gives_zeros_and_finite_gradients(kind, backend):
    *qkv, rpe_q, rpe_k, rpe_v = example()
    qkv = [t.requires_grad_() for t in qkv]
    excluded = torch.zeros(2, 2, 7, 7, dtype=torch.bool)
    if kind == "padding":
        excluded[1] = True
        masks = {"key_padding_mask": torch.tensor([[False] * 7, [True] * 7])}
    else:
        excluded[:, :, 3] = True
        mask = excluded if kind == "bool" else torch.zeros(2, 2, 7, 7).masked_fill(excluded, -math.inf)
        masks = {"attn_mask": mask}
    out = rpe_attention(*qkv, rpe_q, rpe_k, rpe_v, height=2, width=3, backend=backend, **masks)
    close(out, oracles.attention(*qkv, rpe_q, rpe_k, rpe_v, 2, 3, excluded=excluded))
    assert (out[1] == 0).all() if kind == "padding" else (out[:, :, 3] == 0).all()
    out.sum().backward()
    for tensor in (*qkv, rpe_q.table, rpe_k.table, rpe_v.table):
        assert tensor.grad.isfinite().all()


def test_nan_stays_nan(backend):
    q, k, v, *encodings = example()
    q[0, 0, 2, 0] = math.nan
    for masks in ({}, {"key_padding_mask": torch.tensor([[False] * 6 + [True]] * 2)}):
        out = rpe_attention(q, k, v, *encodings, height=2, width=3, backend=backend, **masks)
        assert out[0, 0, 2].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-1-qkv", "rpe-1.9-cross-bias-0-qk"])
def test_gradients_numerically(spec):
    *qkv, rpe_q, rpe_k, rpe_v = example(spec, batch=1, head_dim=2, dtype=torch.float64)
    encodings = [rpe for rpe in (rpe_q, rpe_k, rpe_v) if rpe is not None]
    tables = [table for rpe in encodings for table in rpe.parameters()]
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[2] = mask[:, 5] = True

    def f(q, k, v, *_):
        return rpe_attention(q, k, v, rpe_q, rpe_k, rpe_v, height=2, width=3, attn_mask=mask, backend="eager")

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in qkv] + tables)
    assert torch.autograd.gradgradcheck(lambda q: f(q, *qkv[1:]), qkv[0])


def test_gradients_of_both_agree():
    grads = []
    for name in ("eager", "auto"):
        *qkv, rpe_q, rpe_k, rpe_v = example()
        qkv = [t.requires_grad_() for t in qkv]
        rpe_attention(*qkv, rpe_q, rpe_k, rpe_v, height=2, width=3, backend=name).sin().sum().backward()
        grads.append([t.grad for t in (*qkv, rpe_q.table, rpe_k.table, rpe_v.table)])
    for ours, expected in zip(*grads, strict=True):
        close(ours, expected)


def test_dropout_is_seeded_unbiased_and_off_at_zero(backend):
    q, k, v, *encodings = example()
    options = {"height": 2, "width": 3, "backend": backend}

    def run(p):
        return rpe_attention(q, k, v, *encodings, dropout_p=p, **options)

    torch.manual_seed(0)
    first, second = run(0.5), run(0.5)
    torch.manual_seed(0)
    assert torch.equal(run(0.5), first) and not torch.equal(first, second)
    assert torch.equal(run(0.0), run(0.0))
    # 500 samples of the mean are within 6 standard errors of the value without dropout.
    samples = torch.stack([run(0.5) for _ in range(500)])
    error = (samples.mean(0) - run(0.0)).abs() / (samples.std(0) / math.sqrt(500))
    assert error.max() < 6


def test_the_value_encoding_sees_weights_after_dropout(backend):
    # v = 0 leaves rpe_v(weights); with the same table entry c everywhere that is c times the sum of kept weights.
    q, k, v, _, _, rpe_v = example("rpe-1.9-product-ctx-1-qkv")
    torch.nn.init.ones_(rpe_v.table)
    torch.manual_seed(0)
    options = {"height": 2, "width": 3, "dropout_p": 0.4, "backend": backend}
    with_table = rpe_attention(q, k, torch.zeros_like(v), None, None, rpe_v, **options)
    assert with_table.std() > 0.1
    torch.manual_seed(0)
    torch.testing.assert_close(with_table, rpe_attention(q, k, torch.ones_like(v), None, None, None, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    arguments = example(dtype=dtype)
    exact = oracles.attention(*arguments, 2, 3)
    eager = rpe_attention(*arguments, height=2, width=3, backend="eager")
    ours = rpe_attention(*arguments, height=2, width=3, backend=backend)
    oracles.assert_as_accurate_as_torch(ours, eager, exact)
    close(eager, exact, 5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_any_float_and_returns_its_own(dtype, backend):
    q, k, v, *encodings = example()
    exact = oracles.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), *encodings, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # A normalisation leaves q and k in fp32 under autocast, beside a bf16 v.
        out = rpe_attention(q.to(dtype), k.to(dtype), v.bfloat16(), *encodings, height=2, width=3, backend=backend)
    assert out.dtype == torch.bfloat16
    close(out, exact, 3e-2)


def test_autocast_leaves_fp64_alone(backend):
    arguments = example(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rpe_attention(*arguments, height=2, width=3, backend=backend)
    close(out, oracles.attention(*arguments, 2, 3), 1e-12)


def test_compiles_whole_with_sizes_that_change():
    torch._dynamo.reset()
    *_, rpe_k, rpe_v = example()

    def f(q, k, v, padding, height, width):
        options = {"key_padding_mask": padding, "backend": "eager"}
        return rpe_attention(q, k, v, None, rpe_k, rpe_v, height=height, width=width, **options)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in [(2, 3), (3, 4)]:
        q, k, v = example(grid=(height, width))[:3]
        padding = torch.zeros(2, q.shape[2], dtype=torch.bool)
        padding[1, 2:] = True
        q.requires_grad_()
        out, expected = (g(q, k, v, padding, height, width) for g in (compiled, f))
        close(out, expected)
        close(torch.autograd.grad(out.sum(), q)[0], torch.autograd.grad(expected.sum(), q)[0])


def test_compiles_whole_with_dropout(backend):
    torch._dynamo.reset()
    arguments = example()

    def f(q, dropout_p):
        return rpe_attention(q, *arguments[1:], height=2, width=3, dropout_p=dropout_p, backend=backend)

    assert torch.compile(f, fullgraph=True, backend="eager", dynamic=True)(arguments[0], 0.5).shape == (2, 2, 7, 4)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_function_transforms(transform):
    q, k, v, *encodings = example(dtype=torch.float64)

    def f(q, backend="auto"):
        return rpe_attention(q, k, v, *encodings, height=2, width=3, backend=backend)

    if transform == "grad":
        expected = torch.autograd.grad(f(q.requires_grad_(), "eager").sin().sum(), q)[0]
        ours = torch.func.grad(lambda x: f(x).sin().sum())(q.detach())
    elif transform == "vmap":
        expected, ours = torch.stack([f(q, "eager"), f(q + 1, "eager")]), torch.func.vmap(f)(torch.stack([q, q + 1]))
    else:
        ours = torch.func.jvp(f, (q,), (q.cos(),))[1]
        expected = (f(q + 1e-6 * q.cos(), "eager") - f(q - 1e-6 * q.cos(), "eager")) / 2e-6
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-7)


Q = torch.zeros(2, 2, 7, 4)
WRONG = {
    "rank": (lambda: rpe_attention(Q[0], Q[0], Q[0]), "expected q, k, v of shape (B, H, L, D), got q (2, 7, 4)"),
    "cross": (lambda: rpe_attention(Q, Q[:, :, :5], Q), "must be the same tokens of one grid (see docs/equip.md"),
    "dtype": (lambda: rpe_attention(Q, Q.half(), Q), "one floating-point dtype, got torch.float32, torch.float16"),
    "dtype of values": (lambda: rpe_attention(Q, Q, Q.half()), "got torch.float32, torch.float32, torch.float16"),
    "integers": (lambda: rpe_attention(Q.long(), Q.long(), Q.long()), "must share one floating-point dtype"),
    "eight bits": (lambda: rpe_attention(*[Q.to(torch.float8_e4m3fn)] * 3),
                   "torch.float8_e4m3fn; expected torch.float32 or"),
    "list": (lambda: rpe_attention(Q, Q.tolist(), Q), "k must be a dense tensor (B, H, L, D), not list"),
    "sparse": (lambda: rpe_attention(Q, Q, Q.to_sparse()), "v must be a dense tensor (B, H, L, D), not torch.sparse"),
    "nested": (lambda: rpe_attention(*[torch.nested.nested_tensor([Q[0]])] * 3), "q must be a dense tensor"),
    "padding list": (lambda: rpe_attention(Q, Q, Q, key_padding_mask=[[True] * 7] * 2),
                     "key_padding_mask must be a dense tensor, not list"),
    "mask array": (lambda: rpe_attention(Q, Q, Q, attn_mask=np.zeros((7, 7))), "a dense tensor, not ndarray"),
    "sparse mask": (lambda: rpe_attention(Q, Q, Q, attn_mask=torch.zeros(7, 7).to_sparse()),
                    "attn_mask must be a dense tensor, not torch.sparse"),
    "learned scale": (lambda: rpe_attention(Q, Q, Q, scale=torch.ones((), requires_grad=True)),
                      "scale is a number and gets no gradient; multiply q by a learned one"),
    "no dimensions": (lambda: rpe_attention(*[Q[..., :0]] * 3), "(B, H, L, D), got q (2, 2, 7, 0)"),
    "table device": (lambda: rpe_attention(Q, Q, Q, rpe_k=example()[4].to("meta"), height=2, width=3),
                     "rpe_k: its table is on meta and its input on cpu; move one of them"),
    "device": (lambda: rpe_attention(Q, Q.to("meta"), Q), "must share one device, got cpu, meta, cpu"),
    "device of values": (lambda: rpe_attention(Q, Q, Q.to("meta")), "must share one device, got cpu, cpu, meta"),
    "dropout": (lambda: rpe_attention(Q, Q, Q, dropout_p=1.0), "dropout_p is a probability in [0, 1), not 1.0"),
    "backend": (lambda: rpe_attention(Q, Q, Q, backend="fast"),
                "unknown backend 'fast'; expected one of auto, eager, sdpa, compiled, triton"),
    "padding dtype": (lambda: rpe_attention(Q, Q, Q, key_padding_mask=torch.zeros(2, 7)),
                      "key_padding_mask must be bool (True = ignored), not torch.float32"),
    "padding shape": (lambda: rpe_attention(Q, Q, Q, key_padding_mask=torch.zeros(7, 2).bool()),
                      "key_padding_mask must be (B, L) = (2, 7), got (7, 2)"),
    "mask dtype": (lambda: rpe_attention(Q, Q, Q, attn_mask=torch.zeros(7, 7).long()),
                   "attn_mask must be bool (True = excluded) or floating point, not torch.int64"),
    "mask shape": (lambda: rpe_attention(Q, Q, Q, attn_mask=torch.zeros(4, 7, 7)),
                   "attn_mask must broadcast to (B, H, L, L) = (2, 2, 7, 7), got (4, 7, 7)"),
    "mask device": (lambda: rpe_attention(Q, Q, Q, attn_mask=torch.zeros(7, 7, device="meta")), "attn_mask is on meta"),
    "grid": (lambda: rpe_attention(*example(), height=2, width=2), "gives 4 tokens and the table expects skip=1"),
    "no grid": (lambda: rpe_attention(*example()), "L=7 minus skip=1 leading tokens is not a square grid"),
    "one side": (lambda: rpe_attention(*example(), height=2), "got height=2 and width=None"),
    "head_dim": (lambda: rpe_attention(Q, Q, Q, rpe_k=example(head_dim=8)[4], height=2, width=3),
                 "rpe_k: built for head_dim=8, got D=4 in (2, 2, 7, 4)"),
    "heads": (lambda: rpe_attention(Q, Q, Q, rpe_k=example("rpe-1.9-euc-bias-0-k", heads=3)[4], height=2, width=3),
              "rpe_k: built for 3 heads, got H=2 in (2, 2, 7, 4)"),
    "role": (lambda: rpe_attention(Q, Q, Q, rpe_k=example()[5], height=2, width=3),
             "rpe_k was given an encoding built as rpe_v"),
    "first place": (lambda: rpe_attention(Q, Q, Q, example()[4], height=2, width=3),
                    "rpe_q was given an encoding built as rpe_k"),
    "type": (lambda: rpe_attention(Q, Q, Q, rpe_k=lambda x: x, height=2, width=3), "rpe_k must come from build_rpe"),
    "table dtype": (lambda: rpe_attention(Q, Q, Q, rpe_k=example(dtype=torch.float64)[4], height=2, width=3),
                    "rpe_k: its table is torch.float64, its input torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_say_what_is_wrong(case):
    call, words = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


@pytest.mark.parametrize("backend", ["eager", "sdpa", "compiled", "auto"])
@pytest.mark.parametrize("change", [{"dtype": torch.float16}, {"dtype": torch.float64}, {"device": "meta"}])
def test_every_backend_refuses_the_same_tables(backend, change):
    if backend != "auto" and module_of(backend).missing():
        pytest.skip(module_of(backend).missing())
    with pytest.raises(ValueError, match="rpe_k: its table is "):
        rpe_attention(Q, Q, Q, rpe_k=example()[4].to(**change), height=2, width=3, backend=backend)


@pytest.fixture
def fake_backend(monkeypatch):
    """A compiled backend whose results the test sets: ``missing``, ``why_not``; ``attention`` returns sevens."""
    module = types.ModuleType("irpe_ops.backends.compiled")
    module.answers = {"missing": None, "why_not": None}
    module.missing = lambda: module.answers["missing"]
    module.why_not = lambda call: module.answers["why_not"]
    module.attention = lambda call: torch.full_like(call.q, 7.0)
    monkeypatch.setitem(sys.modules, "irpe_ops.backends.compiled", module)
    monkeypatch.setattr(sys.modules["irpe_ops.backends"], "compiled", module, raising=False)
    return module.answers


def test_auto_takes_a_fast_backend_where_it_can(fake_backend):
    assert (rpe_attention(Q, Q, Q) == 7).all()
    assert (rpe_attention(Q, Q, Q, backend="eager") == 0).all()
    fake_backend["why_not"] = "head dimension 3 is odd"
    assert (rpe_attention(Q, Q, Q) == 0).all()
    fake_backend.update(why_not=None, missing="not installed: pip install ./rpe_ops_cuda")
    assert (rpe_attention(Q, Q, Q) == 0).all()


def test_a_named_backend_never_falls_back(fake_backend):
    assert (rpe_attention(Q, Q, Q, backend="compiled") == 7).all()
    fake_backend["why_not"] = "head dimension 3 is odd"
    with pytest.raises(ValueError, match="backend='compiled' cannot run this call: head dimension 3 is odd"):
        rpe_attention(Q, Q, Q, backend="compiled")
    fake_backend["missing"] = "not installed: pip install ./rpe_ops_cuda"
    with pytest.raises(ImportError, match="not installed: pip install ./rpe_ops_cuda .python -m irpe_ops.info"):
        rpe_attention(Q, Q, Q, backend="compiled")


@pytest.mark.parametrize("name", ["compiled", "triton"])
def test_a_missing_backend_says_why(name):
    reason = module_of(name).missing()
    if reason is None:
        pytest.skip(f"{name} exists here")
    with pytest.raises(ImportError, match=re.escape(f"backend='{name}' is not available here: {reason}")):
        rpe_attention(Q, Q, Q, backend=name)


@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-1-qkv", "rpe-1.9-cross-bias-0-k"])
def test_shapes_can_be_had_without_memory(spec):
    encodings = [None if rpe is None else rpe.to("meta") for rpe in build_rpe(parse_rpe_spec(spec, 1), 8, 2)]
    q, k, v = torch.empty(3, 2, 2, 17, 8, device="meta", requires_grad=True)
    out = rpe_attention(q, k, v, *encodings, height=4, width=4)
    assert out.shape == (2, 2, 17, 8) and out.device.type == "meta"


def test_shapes_alone_on_a_gpu_that_is_not_here(backend):
    """As in planning a run's memory; also if rpe_ops_cuda has CUDA code but there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with FakeTensorMode(), torch.device("cuda"):
        encodings = build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-qkv", 1), 8, 2)
        q = torch.empty(2, 2, 13, 8)
        out = rpe_attention(q, q, q, *encodings, height=3, width=4, backend=backend)
    assert out.shape == (2, 2, 13, 8) and out.device.type == "cuda"
