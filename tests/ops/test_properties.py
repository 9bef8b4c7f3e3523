"""Properties over random shapes, dtypes, strides and values: the library against its definition."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irpe_ops import build_rpe, get_bucket_ids_2d, get_rpe_config, parse_rpe_spec, rpe_attention, rpe_index
from irpe_ops.config import RPE_ON
from irpe_ops.methods import METHODS
from irpe_ops.rpe_index import INDEX_DTYPES, rpe_index_adjoint
from tests import oracles

# The same examples at every run: a failure here depends on the code alone.
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
METHODS_OF_MAPS = ("euc", "quant", "product", "cross_rows", "cross_cols")
grids = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 5)), st.sampled_from([(1, 1), (1, 70), (70, 1), (2, 33), (1, 128)])
)


@st.composite
def layouts(draw, shape):
    """A float64 tensor of ``shape`` whose memory is contiguous, permuted, sliced or expanded."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    kind = draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded"]))
    if kind == "permuted":
        order = draw(st.permutations(range(len(shape))))
        whole = torch.randn([shape[axis] for axis in order], generator=generator, dtype=torch.float64)
        return whole.permute([order.index(axis) for axis in range(len(shape))])
    if kind == "sliced":
        whole = torch.randn([2 * n + 1 for n in shape], generator=generator, dtype=torch.float64)
        return whole[tuple(slice(1, None, 2) for _ in shape)]
    if kind == "expanded":
        kept = [n if draw(st.booleans()) else min(n, 1) for n in shape]
        return torch.randn(kept, generator=generator, dtype=torch.float64).expand(shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def poison(tensor, draw):
    """Up to two entries become infinite or NaN."""
    if tensor.numel():
        tensor = tensor.clone()
        for value in draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=2)):
            tensor[tuple(draw(st.integers(0, n - 1)) for n in tensor.shape)] = value
    return tensor


@quick
@given(st.data())
def test_lookup_and_sums_of_anything(data):
    batch, heads, queries, keys = (data.draw(st.integers(0, top)) for top in (2, 3, 6, 70))
    buckets = data.draw(st.integers(1, 140))
    dtype = data.draw(st.sampled_from(FLOATS))
    index = torch.randint(buckets, (queries, keys), generator=torch.Generator().manual_seed(0))
    index = index.to(data.draw(st.sampled_from(INDEX_DTYPES)))
    input = poison(data.draw(layouts((batch, heads, queries, buckets))).to(dtype), data.draw)
    expected = input.gather(-1, index.long().expand(batch, heads, -1, -1))
    assert torch.equal(rpe_index(input, index).nan_to_num(7), expected.nan_to_num(7))

    grad = data.draw(layouts((batch, heads, queries, keys))).to(dtype)
    wide = index.long().expand(batch, heads, -1, -1)
    zeros = torch.zeros(batch, heads, queries, buckets, dtype=dtype)
    oracles.assert_as_accurate_as_torch(
        rpe_index_adjoint(grad, index, buckets),
        zeros.scatter_add(-1, wide, grad),
        zeros.double().scatter_add(-1, wide, grad.double()),
        slack=3.0,  # not 2: in sums of a few numbers plain PyTorch is sometimes lucky
    )


@quick
@given(st.sampled_from(METHODS_OF_MAPS), grids, st.integers(0, 2), st.floats(0.5, 40))
def test_bucket_ids_of_any_grid_fit_their_table(method, grid, skip, ratio):
    ids, buckets = get_bucket_ids_2d(method, *grid, skip, ratio, 2 * ratio, 8 * ratio)
    length = grid[0] * grid[1] + skip
    assert ids.shape == (length, length) and ids.min() >= 0 and ids.max() < buckets
    if length <= 26:
        assert torch.equal(ids.long(), oracles.bucket_ids(method, *grid, skip, ratio))


@st.composite
def calls(draw):
    """An `rpe_attention` call in float64: (q, k, v, encodings, options)."""
    height, width = draw(grids)
    skip = draw(st.integers(0, 2))
    mode, rpe_on = draw(st.sampled_from([pair for pair in itertools.product(("ctx", "bias"), RPE_ON)
                                         if pair[0] == "ctx" or "v" not in pair[1]]))  # fmt: skip
    shared = draw(st.booleans())
    batch, heads, head_dim = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 20]))
    ratio = draw(st.sampled_from([0.5, 1.9, 2.0, 7.0]))
    config = get_rpe_config(ratio, draw(st.sampled_from(sorted(METHODS))), mode, shared, skip, rpe_on)
    encodings = build_rpe(config, head_dim, heads)
    for rpe in encodings:
        if rpe is not None:
            oracles.fill_tables(rpe.double())
    length = height * width + skip
    qkv = [draw(layouts((batch, heads, length, head_dim))) for _ in range(3)]
    generator, options = torch.Generator().manual_seed(draw(st.integers(0, 9))), {"height": height, "width": width}
    masks = draw(st.sets(st.sampled_from(["padding", "bool", "float"])))
    if "padding" in masks:
        options["key_padding_mask"] = torch.rand(batch, length, generator=generator) < 0.4
    if "bool" in masks:
        options["attn_mask"] = torch.rand(length, length, generator=generator) < 0.4
    elif "float" in masks:
        options["attn_mask"] = torch.randn(heads, 1, length, generator=generator, dtype=torch.float64)
    return qkv, encodings, options


def run(call, dtype, backend):
    qkv, encodings, options = call
    options = {name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
               for name, value in options.items()}  # fmt: skip
    qkv = [x.to(dtype).requires_grad_() for x in qkv]
    modules = [rpe.to(dtype) for rpe in encodings if rpe is not None]
    tables = [table for rpe in modules for table in rpe.parameters()]
    out = rpe_attention(*qkv, *encodings, **options, backend=backend)
    grads = torch.autograd.grad(out.sin().sum(), [*qkv, *tables], allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


@quick
@given(calls())
def test_attention_and_its_gradients_of_anything(call):
    ours = run(call, torch.float32, "auto")
    eager, exact = run(call, torch.float32, "eager"), run(call, torch.float64, "eager")
    # Rounding steps of the largest value of all: a gradient may be the small difference of large terms.
    step = torch.finfo(torch.float32).eps * max((x.abs().max() for x in exact if x.numel()), default=0)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if c.numel():
            assert (a - c).abs().max() <= 4 * ((b - c).abs().max() + step)


@quick
@given(calls(), st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from("qkv"), st.data())
def test_a_bad_value_stays_in_its_image_and_head(call, value, where, data):
    qkv, encodings, options = call
    batch, heads, length, head_dim = qkv[0].shape
    if batch == 0:
        return
    sick = [x.clone() for x in qkv]
    b, h = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, heads - 1))
    sick["qkv".index(where)][b, h, data.draw(st.integers(0, length - 1)), 0] = value
    healthy, poisoned = (run((x, encodings, options), torch.float32, "auto")[0] for x in (qkv, sick))
    elsewhere = torch.ones(batch, heads, dtype=torch.bool)
    elsewhere[b, h] = False
    assert torch.equal(healthy[elsewhere], poisoned[elsewhere])


@quick
@given(st.one_of(st.text(max_size=30), st.from_regex(r"rpe-[0-9.e+-]{1,6}-[a-z]{2,8}-[a-z]{2,6}-[0-9]-[qkvQKVx]{1,4}")))
def test_any_text_is_a_spec_or_one_clear_error(text):
    try:
        config = parse_rpe_spec(text)
    except ValueError as error:
        assert "rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}" in str(error) and repr(text) in str(error)
    else:
        assert parse_rpe_spec(config.spec) == config


@quick
@given(st.lists(st.integers(-2, 9), min_size=0, max_size=5), st.sampled_from([*FLOATS, torch.int64, torch.bool]))
def test_any_tensors_are_taken_or_refused_by_name(sizes, dtype):
    """Tensors of any rank and dtype, grids of any sign: a result of the right shape, or our own ValueError."""
    x = torch.zeros([abs(n) for n in sizes], dtype=dtype)
    height, width = (sizes + [0, 0])[:2]
    rpe_k = build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-k"), 4, 2)[1]
    try:
        out = rpe_attention(x, x, x, None, rpe_k, None, height=height, width=width)
    except ValueError as error:
        assert str(error).startswith(("rpe_attention: ", "rpe_k: "))
    else:
        assert out.shape == x.shape


@pytest.mark.parametrize("grid", [(0, 3), (3, 0), (-1, 2), (2.0, 2), (True, 2), ("2", 2)])
def test_impossible_grids_are_refused(grid):
    with pytest.raises(ValueError, match="height|width"):
        get_bucket_ids_2d("product", *grid, 0, 1.9, 3.8, 15.2)
    x, rpe_k = torch.zeros(1, 1, 6, 4), build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-k"), 4, 1)[1]
    with pytest.raises(ValueError, match="height|width"):
        rpe_attention(x, x, x, None, rpe_k, None, height=grid[0], width=grid[1])
