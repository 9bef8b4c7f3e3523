"""The backend sdpa against the definition: every mode and mask, gradients, and rows that its kernel need not copy."""

import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention
from irpe_ops.backends import sdpa
from tests import oracles

rpe_index = sys.modules["irpe_ops.rpe_index"]  # the package has a function of this name


def example(spec="rpe-1.9-product-ctx-1-qk", grid=(2, 3), skip=1, dtype=torch.float64):
    encodings = build_rpe(parse_rpe_spec(spec, skip), 4, 2)
    for seed, rpe in enumerate(encodings):
        if rpe is not None:
            oracles.fill_tables(rpe.to(dtype), seed)
    generator = torch.Generator().manual_seed(1)
    length = grid[0] * grid[1] + skip
    packed = torch.randn(2, length, 3, 2, 4, generator=generator, dtype=torch.float64).to(dtype)
    return packed.requires_grad_(), encodings, {"height": grid[0], "width": grid[1]}


def results(packed, encodings, options, backend):
    """The output, and the gradients of everything that has one."""
    out = rpe_attention(*packed.permute(2, 0, 3, 1, 4), *encodings, **options, backend=backend)
    leaves = [packed, *(part.table for rpe in encodings if rpe for part in rpe.parts)]
    mask = options.get("attn_mask")
    leaves += [mask] if mask is not None and mask.requires_grad else []
    return [out, *torch.autograd.grad(out.float().sin().sum(), leaves, allow_unused=True)]


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3])},
    "no key": {"key_padding_mask": torch.tensor([[False] * 7, [True] * 7])},
    "bool": {"attn_mask": torch.eye(7, dtype=torch.bool)},
    "float": {"attn_mask": torch.linspace(-1, 1, 7)},
    "gradient": {"attn_mask": torch.ones(1, 2, 7, 7, dtype=torch.float64, requires_grad=True)},
    "row excluded": {"attn_mask": torch.zeros(7, 7).index_fill(0, torch.tensor([3]), -math.inf)},
    "both bool": {
        "key_padding_mask": torch.tensor([[False] * 6 + [True]] * 2),
        "attn_mask": torch.ones(7, 7, dtype=torch.bool).triu(1),
    },
    "both": {
        "key_padding_mask": torch.tensor([[False] * 6 + [True]] * 2),
        "attn_mask": torch.full((2, 1, 1, 7), 0.5, dtype=torch.float64),
    },
}
SPECS = ["", "rpe-1.9-product-ctx-1-qk", "rpe-1.9-cross-ctx-0-q", "rpe-1.9-euc-bias-1-k", "rpe-1.9-quant-bias-0-qk"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_the_definition_forward_and_backward(spec, mask):
    packed, encodings, options = example(spec or SPECS[1])
    options |= MASKS[mask]
    if not spec:
        encodings = (None, None, None)
    before = {name: value.clone() for name, value in MASKS[mask].items()}
    ours, exact = (results(packed, encodings, options, backend) for backend in ("sdpa", "eager"))
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        assert x.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in MASKS[mask].items())  # never written to


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", [True, False])
def test_half_precision_is_as_accurate_as_the_definition(dtype, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(rpe_index, "compiled_devices", ())
    packed, encodings, options = example("rpe-1.0-euc-ctx-1-qk", grid=(12, 12), dtype=dtype)
    ours, plain = (results(packed, encodings, options, backend) for backend in ("sdpa", "eager"))
    wide = [rpe and rpe.double() for rpe in encodings]
    exact = results(packed.detach().double().requires_grad_(), wide, options, "eager")
    for x, y, answer in zip(ours, plain, exact, strict=True):
        oracles.assert_as_accurate_as_torch(x, y, answer)


@pytest.mark.parametrize("kernels", [True, False])
def test_sums_by_bucket_are_in_fp32_where_no_kernel_makes_them_so(kernels, monkeypatch):
    """The backward pass of a plain gather adds in the dtype of its input, on a GPU hundreds of keys in bf16."""
    if kernels and "cpu" not in rpe_index.compiled_devices:
        pytest.skip("rpe_ops_cuda is not built")
    if not kernels:
        monkeypatch.setattr(rpe_index, "compiled_devices", ())
    seen, real = [], sdpa.rpe_index
    monkeypatch.setattr(sdpa, "rpe_index", lambda input, index: seen.append(input.dtype) or real(input, index))
    results(*example(dtype=torch.bfloat16), "sdpa")
    assert seen == [torch.bfloat16 if kernels else torch.float32] * 2


@pytest.mark.parametrize("masks", ["none", "padding"])
@pytest.mark.parametrize("spec", SPECS[1:])
def test_rows_of_the_mask_start_at_multiples_of_eight(spec, masks, monkeypatch):
    """PyTorch's memory-efficient kernel needs it, or it copies the mask. Lookups too, for faster products."""
    packed, encodings, options = example(spec, dtype=torch.float32)
    seen, lookups, index = [], [], sdpa.rpe_index
    monkeypatch.setattr(sdpa, "rpe_index", lambda input, ids: lookups.append(input.shape[3]) or index(input, ids))
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        sdpa.F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k["attn_mask"]) or real(*a, **k)
    )
    results(packed, encodings, options | MASKS[masks], "sdpa")
    (mask,) = seen
    assert mask.shape == (2, 2, 7, 7)
    assert lookups and all(columns % 8 == 0 for columns in lookups)
    if "bias" not in spec or masks == "none":
        assert mask.stride(-1) in (1, 8) and all(stride % 8 == 0 for stride in mask.stride()[:2])
    if "q" not in spec.split("-")[-1] or "k" in spec.split("-")[-1]:
        assert mask.stride(-2) == 8 or "bias" in spec


@pytest.mark.parametrize("mask", ["none", "padding", "bool"])
@pytest.mark.parametrize("spec", SPECS[1:3])
def test_the_gradient_of_the_mask_is_summed_as_it_comes(spec, mask):
    """Not copied into padded rows, and not filled with zeros for masked weights: each such pass costs as much."""
    packed, encodings, options = example(spec)
    out = rpe_attention(*packed.permute(2, 0, 3, 1, 4), *encodings, **options, **MASKS[mask], backend="sdpa")
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function.overloadpacket.__name__, getattr(args[0], "shape", ())))
            return function(*args, **kwargs or {})

    with Seen():
        out.sum().backward()
    assert "slice_backward" not in dict(seen)
    assert not [shape for name, shape in seen if name.startswith("masked_fill") and shape == (2, 2, 7, 7)]


def test_second_derivatives():
    packed, encodings, options = example()
    function = lambda x: rpe_attention(*x.permute(2, 0, 3, 1, 4), *encodings, **options, backend="sdpa")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, packed)


@pytest.mark.parametrize("mask", ["none", "padding", "no key"])
def test_tables_alone_are_trained(mask, monkeypatch):
    """PyTorch's CUDA kernel saves what backward reads only if q, k or v needs a gradient, even if the mask does."""
    packed, encodings, options = example()
    q, k, v = packed.detach().permute(2, 0, 3, 1, 4)
    asked, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        asked.append(any(x.requires_grad for x in (q, k, v)))
        return real(q, k, v, **options)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", spy)
    grads = []
    for backend in ("sdpa", "eager"):
        out = rpe_attention(q, k, v, *encodings, **options, **MASKS[mask], backend=backend)
        grads.append(torch.autograd.grad(out.sin().sum(), [rpe.table for rpe in encodings[:2]]))
    assert asked == [True]
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_dropout_is_seeded_and_off_when_not_training():
    packed, encodings, options = example()
    options["dropout_p"] = 0.5
    torch.manual_seed(0)
    first, second = (results(packed, encodings, options, "sdpa")[0] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(results(packed, encodings, options, "sdpa")[0], first) and not torch.equal(first, second)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    ("spec", "masks"),
    [("rpe-1.9-product-ctx-1-k", ("none", "padding", "float")), *((spec, ("float",)) for spec in SPECS[1:])],
)
def test_compiles_whole(spec, masks, trains):
    torch._dynamo.reset()
    packed, encodings, options = example(spec)
    for rpe in filter(None, encodings):
        rpe.requires_grad_(trains)
    function = torch.compile(rpe_attention, backend="eager", fullgraph=True)
    inputs = packed.detach().permute(2, 0, 3, 1, 4)
    for mask in masks:
        torch.testing.assert_close(
            function(*inputs, *encodings, **options, **MASKS[mask], backend="sdpa"),
            rpe_attention(*inputs, *encodings, **options, **MASKS[mask], backend="eager"),
        )


def test_what_it_cannot_do_is_refused():
    packed, _, options = example()
    encodings = example("rpe-1.9-product-ctx-1-v")[1]
    with pytest.raises(ValueError, match="backend='sdpa' cannot run this call: it has no encoding on values"):
        rpe_attention(*packed.permute(2, 0, 3, 1, 4), *encodings, **options, backend="sdpa")
    q = torch.randn(2, 2, 7, 4)
    with pytest.raises(ValueError, match="torch.func and forward-mode differentiation need plain PyTorch"):
        torch.func.grad(lambda x: rpe_attention(x, q, q, backend="sdpa").sum())(q)
