"""The modules called by hand: every method, mode and place against the loops; names, shapes and refusals."""

import copy
import itertools
import re

import pytest
import torch

from irpe_ops import build_rpe, get_rpe_config, parse_rpe_spec
from irpe_ops.modules import IRPE, IRPESum
from tests import oracles

METHODS, GRIDS = ("euc", "quant", "cross", "product"), [(2, 3, 0), (3, 2, 1), (1, 4, 2), (4, 1, 0)]
SPECS = [
    f"rpe-{ratio}-{method}-{mode}-{shared}-{on}"
    for ratio, method, (mode, on), shared in itertools.product(
        (1.0, 1.9), METHODS, (("ctx", "qkv"), ("bias", "qk")), (0, 1)
    )
]


def build(spec, skip=0, dtype=torch.float64, head_dim=3, heads=2):
    encodings = build_rpe(parse_rpe_spec(spec, skip), head_dim, heads)
    for seed, rpe in enumerate(encodings):
        if rpe is not None:
            oracles.fill_tables(rpe.to(dtype), seed)
    return encodings


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("height", "width", "skip"), GRIDS)
def test_by_hand_equals_the_loops(spec, height, width, skip):
    length, scale = height * width + skip, 3**-0.5
    q, k, v = torch.randn(3, 2, 2, length, 3, dtype=torch.float64)
    rpe_q, rpe_k, rpe_v = build(spec, skip)
    # As the published tutorial writes it: q is scaled first, and results are added in place.
    q = q * scale
    attn = q @ k.transpose(2, 3)
    attn += rpe_k(q, height=height, width=width)
    attn += rpe_q(k * scale, height=height, width=width).transpose(2, 3)
    attn = attn.softmax(-1)
    out = attn @ v
    if rpe_v is not None:
        out += rpe_v(attn, height=height, width=width)
    expected = oracles.attention(q / scale, k, v, rpe_q, rpe_k, rpe_v, height, width)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("rpe_on", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_encodings_are_where_they_were_requested(rpe_on):
    encodings = build_rpe(get_rpe_config(rpe_on=rpe_on), 4, 2)
    assert [rpe is not None for rpe in encodings] == [place in rpe_on for place in "qkv"]
    assert [rpe.role for rpe in encodings if rpe is not None] == list(rpe_on)
    assert build_rpe(None, 4, 2) == (None, None, None)


@pytest.mark.parametrize(
    ("spec", "skip", "shapes"),
    [
        ("rpe-1.9-product-ctx-1-qkv", 1, [(1, 8, 50), (1, 8, 50), (1, 50, 8)]),
        ("rpe-2.0-product-ctx-0-qkv", 0, [(4, 8, 81), (4, 8, 81), (4, 81, 8)]),
        ("rpe-20-euc-bias-0-qk", 2, [(4, 82), (4, 82)]),
        ("rpe-33-quant-bias-1-k", 1, [(1, 134)]),
        ("rpe-20-cross-ctx-1-k", 1, [(1, 8, 82), (1, 8, 82)]),
    ],
)
def test_tables_have_the_published_shapes_and_are_zero(spec, skip, shapes):
    encodings = torch.nn.ModuleList(rpe for rpe in build_rpe(parse_rpe_spec(spec, skip), 8, 4) if rpe is not None)
    tables = list(encodings.parameters())
    assert [tuple(table.shape) for table in tables] == shapes
    assert all(torch.equal(table, torch.zeros_like(table)) and table.requires_grad for table in tables)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("rpe-1.9-product-ctx-1-k", ["lookup_table_weight"]),
        ("rpe-1.9-product-bias-1-k", ["lookup_table_bias"]),
        ("rpe-1.9-cross-ctx-1-k", ["rp_rows.lookup_table_weight", "rp_cols.lookup_table_weight"]),
        ("rpe-1.9-cross-bias-1-k", ["rp_rows.lookup_table_bias", "rp_cols.lookup_table_bias"]),
    ],
)
def test_the_state_dict_has_the_published_names_and_nothing_else(spec, names):
    assert list(build_rpe(parse_rpe_spec(spec), 4, 2)[1].state_dict()) == names


def test_attributes_that_others_read():
    rpe_k = build_rpe(get_rpe_config(2.0, "quant", "bias", False, 1, "k"), 8, 4)[1]
    names = ("method", "mode", "shared_head", "skip", "ratio", "head_dim", "num_heads", "num_buckets", "role")
    assert [getattr(rpe_k, name) for name in names] == ["quant", "bias", False, 1, 2.0, 8, 4, 10, "k"]
    assert rpe_k.parts == (rpe_k,) and rpe_k.table is rpe_k.lookup_table_bias
    cross = build_rpe(get_rpe_config(method="cross"), 8, 4)[1]
    assert isinstance(cross, IRPESum) and [part.method for part in cross.parts] == ["cross_rows", "cross_cols"]
    assert "product, ctx, ratio=1.9, buckets=49, heads=shared, skip=0" in repr(build_rpe(get_rpe_config(), 8, 4)[1])


def test_none_is_the_square_grid():
    _, rpe_k, _ = build("rpe-1.9-product-ctx-1-k", skip=1)
    x = torch.randn(1, 2, 10, 3, dtype=torch.float64)
    assert torch.equal(rpe_k(x), rpe_k(x, 3, 3))


def test_sizes_change_from_call_to_call():
    _, rpe_k, rpe_v = build("rpe-1.9-product-ctx-1-kv", skip=1)
    for height, width in [(2, 3), (3, 2), (3, 3), (2, 3), (1, 7)]:
        length = height * width + 1
        x = torch.randn(1, 2, length, 3, dtype=torch.float64)
        torch.testing.assert_close(rpe_k(x, height, width), oracles.encode(rpe_k, x, height, width))
        weights = torch.rand(1, 2, length, length, dtype=torch.float64)
        torch.testing.assert_close(rpe_v(weights, height, width), oracles.encode(rpe_v, weights, height, width))


def test_a_batch_equals_its_rows_and_may_be_empty():
    _, rpe_k, rpe_v = build("rpe-1.9-product-ctx-0-kv")
    x, weights = torch.randn(3, 2, 4, 3, dtype=torch.float64), torch.rand(3, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(rpe_k(x), torch.cat([rpe_k(x[i : i + 1]) for i in range(3)]))
    torch.testing.assert_close(rpe_v(weights), torch.cat([rpe_v(weights[i : i + 1]) for i in range(3)]))
    assert rpe_k(x[:0]).shape == (0, 2, 4, 4) and rpe_v(weights[:0]).shape == (0, 2, 4, 3)


def test_bias_broadcasts():
    for shared, heads in ((1, 1), (0, 2)):
        _, rpe_k, _ = build(f"rpe-1.9-cross-bias-{shared}-k")
        assert rpe_k(torch.randn(5, 2, 4, 3, dtype=torch.float64)).shape == (1, heads, 4, 4)


@pytest.mark.parametrize("spec", ["rpe-1.5-cross-ctx-0-qkv", "rpe-1.5-product-bias-1-qk", "rpe-1.5-euc-ctx-1-v"])
def test_gradients_numerically(spec):
    for rpe in build(spec, skip=1):
        if rpe is None:
            continue
        x = torch.rand(1, 2, 5, 5 if rpe.role == "v" else 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *tables, rpe=rpe: rpe(x).sin(), (x, *rpe.parameters()))


def test_the_unused_half_of_a_euc_table_gets_no_gradient():
    _, rpe_k, _ = build("rpe-1.9-euc-ctx-1-k")
    rpe_k(torch.ones(1, 2, 9, 3, dtype=torch.float64)).sum().backward()
    assert (rpe_k.table.grad[..., :3] == 0).all() and (rpe_k.table.grad[..., 3:6] != 0).all()


def test_the_value_encoding_never_stores_a_vector_per_pair():
    # (H, L, L, D) would be 16 million elements here; the largest that may appear is (B, H, L, L).
    length, head_dim = 256, 256
    _, _, rpe_v = build("rpe-1.9-product-ctx-1-v", dtype=torch.float32, head_dim=head_dim, heads=1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in [t for t in (out if isinstance(out, tuple) else [out]) if isinstance(t, torch.Tensor)]:
                largest = max(largest, tensor.numel())
            return out

    weights = torch.rand(1, 1, length, length, requires_grad=True)
    with Watch():
        rpe_v(weights).sum().backward()
    assert largest == length * length


@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-1-k", "rpe-1.9-cross-ctx-0-v", "rpe-2.0-euc-bias-0-k"])
def test_copies_compute_the_same(spec):
    rpe = next(rpe for rpe in build(spec, skip=1) if rpe is not None)
    x = torch.rand(1, 2, 5, 5 if rpe.role == "v" else 3, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(rpe)(x), rpe(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    _, rpe_k, rpe_v = build("rpe-1.9-product-ctx-1-kv", dtype=dtype)
    x, weights = torch.randn(1, 2, 9, 3, dtype=dtype), torch.rand(1, 2, 9, 9, dtype=dtype)
    assert rpe_k(x).dtype == rpe_v(weights).dtype == dtype
    torch.testing.assert_close(rpe_k(x).double(), oracles.encode(rpe_k, x, 3, 3), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(rpe_v(weights).double(), oracles.encode(rpe_v, weights, 3, 3), rtol=2e-2, atol=4e-2)


def test_autocast_looks_up_in_fp32():
    _, rpe_k, _ = build("rpe-1.9-product-ctx-1-k", dtype=torch.float32)
    x = torch.randn(1, 2, 9, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rpe_k(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), oracles.encode(rpe_k, x, 3, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("skip", "shape", "grid", "words"),
    [
        (1, (1, 2, 196, 3), (14, 14), "height=14, width=14 gives 196 tokens and the table expects skip=1 leading ones; "
                                      "got L=196, not 197"),
        (0, (1, 2, 7, 3), (2, 3), "the table expects skip=0 leading ones; got L=7, not 6"),
        (1, (1, 2, 11, 3), (None, None), "L=11 minus skip=1 leading tokens is not a square grid"),
        (0, (1, 2, 10, 3), (None, None), "L=10 minus skip=0 leading tokens is not a square grid"),
        (1, (1, 2, 16, 3), (None, None), "pass height and width (equip: grid=(height, width)), or build the"),
        (2, (1, 2, 2, 3), (None, None), "L=2 minus skip=2 leading tokens is not a square grid"),
        (0, (1, 2, 6, 3), (2, None), "got height=2 and width=None; give both, or neither for a square grid"),
        (0, (1, 2, 6, 3), (None, 3), "got height=None and width=3"),
        (0, (1, 2, 6, 3), (-2, -3), "height must be an integer of at least 1, not -2"),
        (0, (1, 2, 4, 5), (2, 2), "built for head_dim=3, got D=5 in (1, 2, 4, 5)"),
        (0, (1, 3, 4, 3), (2, 2), "built for 2 heads, got H=3 in (1, 3, 4, 3)"),
        (0, (2, 4, 3), (2, 2), "expected (B, H, L, D), got (2, 4, 3)"),
    ],
)  # fmt: skip
def test_wrong_input_says_what_is_wrong(skip, shape, grid, words):
    _, rpe_k, _ = build("rpe-1.9-product-ctx-0-k", skip)
    with pytest.raises(ValueError, match="rpe_k: .*" + re.escape(words)):
        rpe_k(torch.zeros(shape, dtype=torch.float64), *grid)


def test_wrong_dtype_device_and_weights_say_what_is_wrong():
    _, rpe_k, rpe_v = build("rpe-1.9-product-ctx-0-kv", dtype=torch.float32)
    with pytest.raises(ValueError, match="rpe_k: its table is torch.float32, its input torch.bfloat16; cast one"):
        rpe_k(torch.zeros(1, 2, 4, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="rpe_k: its table is on cpu and its input on meta; move one of them"):
        rpe_k(torch.zeros(1, 2, 4, 3, device="meta"))
    with pytest.raises(ValueError, match=re.escape("rpe_v: expected a dense tensor, not list")):
        rpe_v([[1.0]])
    with pytest.raises(ValueError, match=re.escape("rpe_v: expected (B, H, L, L), got (1, 2, 4, 3)")):
        rpe_v(torch.zeros(1, 2, 4, 3))


@pytest.mark.parametrize(
    ("head_dim", "heads", "words"),
    [(0, 2, "head_dim must be"), (True, 2, "head_dim must be"), (4, 1.5, "num_heads must be")],
)
def test_build_refuses_impossible_sizes(head_dim, heads, words):
    with pytest.raises(ValueError, match=words):
        build_rpe(get_rpe_config(), head_dim, heads)


def test_tables_made_without_memory_are_zero_once_they_have_some():
    with torch.device("meta"):
        rpes = build_rpe(get_rpe_config(rpe_on="qkv"), 4, 2)
    for rpe in rpes:
        assert rpe.table.is_meta
        torch.nn.init.ones_(rpe.to_empty(device="cpu").table)
        rpe.reset_parameters()  # what FSDP calls for every module with parameters of its own
        assert not rpe.table.any() and rpe.table.requires_grad


def test_build_needs_a_config():
    with pytest.raises(TypeError, match=re.escape("expected get_rpe_config(...) or parse_rpe_spec(...), got 'rpe-")):
        build_rpe("rpe-2.0-product-ctx-1-k", 4, 2)


@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-1-v", "rpe-1.9-euc-ctx-1-k"])
def test_compiles_whole_with_sizes_that_change(spec):
    torch._dynamo.reset()
    for rpe in build(spec, skip=1):
        if rpe is None:
            continue
        compiled = torch.compile(rpe, fullgraph=True, backend="aot_eager", dynamic=True)
        for height, width in [(2, 3), (3, 5)]:
            length = height * width + 1
            x = torch.rand(1, 2, length, length if rpe.role == "v" else 3, dtype=torch.float64)
            assert torch.equal(compiled(x, height, width), rpe(x, height, width))


def test_exports():
    _, rpe_k, _ = build("rpe-1.9-product-ctx-1-k", skip=1)
    x = torch.randn(1, 2, 10, 3, dtype=torch.float64)
    for strict in (False, True):
        assert torch.equal(torch.export.export(rpe_k, (x,), strict=strict).module()(x), rpe_k(x))
    assert isinstance(rpe_k, IRPE)


def test_a_model_saved_whole_by_an_earlier_version_runs():
    """Such a module has the attributes of that version, and no others."""
    plain = {"method", "mode", "shared_head", "skip", "ratio", "head_dim", "num_heads", "role", "num_buckets"}
    for spec in ("rpe-1.9-product-ctx-1-k", "rpe-1.9-cross-ctx-1-k"):
        _, rpe_k, _ = build(spec)
        for part in {rpe_k, *rpe_k.parts}:
            assert vars(part).keys() - vars(torch.nn.Module()).keys() <= plain | {"_coefficients"}
