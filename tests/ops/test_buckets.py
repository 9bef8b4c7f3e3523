"""Bucket ids, number by number: the published tables (computed with the published code), then properties."""

import gc
import re
import types
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from irpe_ops import buckets, build_rpe, get_bucket_ids_2d, get_rpe_config
from irpe_ops.buckets import _cached_map, bucket_map, piecewise_index, traced_bucket_map
from irpe_ops.methods import bucket_map_named
from tests import oracles

CPU = torch.device("cpu")
MAPS = ("euc", "quant", "product", "cross_rows", "cross_cols")
RATIOS = (1.0, 1.5, 1.9, 2.0, 2.5, 3.0, 20.0, 33.0)

# The first distance of each id, as the published code gives it.
FIRST_DISTANCE = {
    1.0: {0: 0, 1: 1, 2: 3},
    1.5: {0: 0, 1: 1, 2: 2, 3: 7},
    1.9: {0: 0, 1: 1, 2: 2, 3: 4},
    2.0: {0: 0, 1: 1, 2: 2, 3: 4, 4: 10},
    2.5: {0: 0, 1: 1, 2: 2, 3: 3, 4: 6, 5: 14},
    3.0: {0: 0, 1: 1, 2: 2, 3: 3, 4: 5, 5: 9, 6: 17},
    20.0: {**{i: i for i in range(21)}, 21: 22, 22: 24, 23: 26, 24: 29, 25: 32, 26: 36, 27: 40, 28: 44, 29: 49, 30: 54,
           40: 152},
    33.0: {**{i: i for i in range(34)}, 34: 35, 35: 37, 36: 39, 37: 42, 38: 44, 39: 47, 40: 50, 66: 256},
}  # fmt: skip


def piecewise(distance, ratio):
    return piecewise_index(distance, ratio, 2 * ratio, 8 * ratio)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("sign", [1, -1])
def test_first_distances_are_the_published_ones(ratio, sign):
    ids = (sign * piecewise(sign * torch.arange(400), ratio)).tolist()
    for bucket, first in FIRST_DISTANCE[ratio].items():
        assert ids.index(bucket) == first
    assert max(ids) == int(2 * ratio)
    assert ids == sorted(ids)


@pytest.mark.parametrize(("ratio", "distance", "bucket"), [(1.5, 6, 2), (0.75, 6, 1), (1.25, 10, 2), (2.25, 18, 4)])
def test_exact_ties_round_half_to_even(ratio, distance, bucket):
    # 5/3 of 1.5 is 2.5; twice 0.75, 1.25 and 2.25 are 1.5 (to 2, clipped to 1.5, truncated to 1), 2.5 and 4.5.
    assert piecewise(torch.tensor([distance, -distance]), ratio).tolist() == [bucket, -bucket]
    assert oracles.piecewise(distance, ratio) == bucket


@pytest.mark.parametrize("ratio", RATIOS)
def test_fp32_agrees_with_fp64_loops(ratio):
    distances = torch.cat([torch.arange(300), torch.arange(300, 28800, 7)])
    assert piecewise(distances, ratio).tolist() == [oracles.piecewise(x, ratio) for x in distances.tolist()]


def test_float_distances_round_half_to_even():
    assert piecewise(torch.tensor([0.5, 1.5, -1.5, 2.5]), 3.0).tolist() == [0, 2, -2, 2]


def test_default_dtype_does_not_change_ids():
    before = piecewise(torch.arange(300), 1.5)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(piecewise(torch.arange(300), 1.5), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_published_example():
    ids, num_buckets = get_bucket_ids_2d("product", 2, 3, 0, 1.9, 3.8, 15.2)
    assert num_buckets == 49 and ids.dtype == torch.int64
    assert ids[0].tolist() == [24, 23, 22, 17, 16, 15]
    assert ids[-1].tolist() == [33, 32, 31, 26, 25, 24]


@pytest.mark.parametrize(
    ("method", "ratio", "skip", "num_buckets"),
    [("product", 1.9, 0, 49), ("product", 1.5, 0, 49), ("product", 2.0, 0, 81), ("product", 2.5, 0, 121),
     ("product", 3.0, 0, 169), ("product", 1.9, 1, 50), ("product", 1.9, 2, 50), ("euc", 20.0, 1, 82),
     ("quant", 33.0, 1, 134), ("cross_rows", 20.0, 1, 82), ("cross_cols", 20.0, 5, 82)],
)  # fmt: skip
def test_numbers_of_buckets_are_the_published_ones(method, ratio, skip, num_buckets):
    ids, count = get_bucket_ids_2d(method, 14, 14, skip, ratio, 2 * ratio, 8 * ratio)
    assert count == bucket_map_named(method).buckets(ratio, skip) == num_buckets
    assert ids.shape == (196 + skip, 196 + skip)
    assert ids.min() >= 0 and ids.max() < num_buckets


@pytest.mark.parametrize(("method", "ratio", "used"), [("euc", 20.0, 20), ("quant", 33.0, 51), ("product", 1.9, 50)])
def test_names_count_the_buckets_a_14x14_grid_uses(method, ratio, used):
    assert get_bucket_ids_2d(method, 14, 14, 1, ratio, 2 * ratio, 8 * ratio)[0].unique().numel() == used


def test_cross_56_is_28_rows_and_28_columns():
    for method in ("cross_rows", "cross_cols"):
        assert get_bucket_ids_2d(method, 14, 14, 1, 20.0, 40.0, 160.0)[0].unique().numel() == 28


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("ratio", [1.0, 1.9, 20.0])
@pytest.mark.parametrize(("height", "width", "skip"), [(1, 1, 0), (1, 5, 2), (5, 1, 1), (3, 4, 0), (2, 7, 3)])
def test_maps_equal_the_nested_loops(method, ratio, height, width, skip):
    ids, _ = get_bucket_ids_2d(method, height, width, skip, ratio, 2 * ratio, 8 * ratio)
    assert torch.equal(ids, oracles.bucket_ids(method, height, width, skip, ratio))


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("height", "width", "skip"), [(14, 14, 1), (3, 40, 0), (19, 2, 5)])
def test_the_traced_map_equals_the_eager_one(method, ratio, height, width, skip):
    eager = bucket_map(method, ratio, height, width, skip, CPU)
    text, beta, gamma = build_rpe(get_rpe_config(ratio, "euc"), 1, 1)[1]._coefficients
    traced = traced_bucket_map(method, text, beta, gamma, height, width, skip, CPU)
    assert traced.dtype == eager.dtype and torch.equal(traced, eager)


@pytest.mark.parametrize("method", MAPS)
def test_equal_offsets_share_a_bucket(method):
    ids, num_buckets = get_bucket_ids_2d(method, 5, 6, 1, 1.9, 3.8, 15.2)
    grid = ids[1:, 1:].view(5, 6, 5, 6)
    assert torch.equal(grid[:-1, :, :-1, :], grid[1:, :, 1:, :])
    assert torch.equal(grid[:, :-1, :, :-1], grid[:, 1:, :, 1:])
    assert (ids[0] == num_buckets - 1).all() and (ids[:, 0] == num_buckets - 1).all()
    assert (ids[1:, 1:] < num_buckets - 1).all()
    assert torch.equal(ids, ids.T) == (method in ("euc", "quant"))


def test_returned_ids_are_yours():
    first, _ = get_bucket_ids_2d("product", 3, 3, 0, 1.9, 3.8, 15.2)
    kept = bucket_map("product", 1.9, 3, 3, 0, CPU).clone()
    expected = first.clone()
    first.zero_()
    assert torch.equal(get_bucket_ids_2d("product", 3, 3, 0, 1.9, 3.8, 15.2)[0], expected)
    assert torch.equal(bucket_map("product", 1.9, 3, 3, 0, CPU), kept)


def test_one_map_for_all_layers():
    config = get_rpe_config(skip=1, rpe_on="qkv")
    layers = [rpe for _ in range(3) for rpe in build_rpe(config, 8, 2)]
    assert len({id(rpe.bucket_ids(10, *grid, CPU)) for rpe in layers for grid in [(3, 3), (None, None)]}) == 1


def test_the_cache_is_bounded():
    for width in range(1, 200):
        bucket_map("product", 1.9, 1, width, 0, CPU)
    assert _cached_map.cache_info().currsize <= 32


def test_maps_are_compact():
    assert bucket_map("product", 3.0, 4, 4, 0, CPU).dtype == torch.uint8  # 169 buckets
    assert bucket_map("product", 20.0, 4, 4, 0, CPU).dtype == torch.int32  # 6,561 buckets
    assert bucket_map("euc", 63.9, 2, 2, 1, CPU).dtype == torch.uint8  # 256 buckets, that of the leading token included
    assert bucket_map("euc", 64.0, 2, 2, 0, CPU).dtype == torch.int32  # 257


def test_a_map_made_in_inference_mode_serves_training():
    _, rpe_k, _ = build_rpe(get_rpe_config(ratio=2.25), head_dim=2, num_heads=1)
    x = torch.randn(1, 1, 6, 2)
    with torch.inference_mode():
        rpe_k(x, 2, 3)
    rpe_k(x, 2, 3).sum().backward()
    assert rpe_k.lookup_table_weight.grad is not None
    with torch.inference_mode():
        assert not get_bucket_ids_2d("euc", 2, 3, 0, 1, 2, 8)[0].is_inference()


def test_a_map_made_for_fake_tensors_is_not_kept():
    with FakeTensorMode():
        assert type(bucket_map("product", 2.75, 3, 5, 0, CPU)) is not torch.Tensor
    assert type(bucket_map("product", 2.75, 3, 5, 0, CPU)) is torch.Tensor


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cross", 2, 2, 0, 1, 2, 8), "ask for cross_rows and cross_cols"),
        (("CROSS", 2, 2, 0, 1, 2, 8), "ask for cross_rows and cross_cols"),
        (("rows", 2, 2, 0, 1, 2, 8), "unknown method 'rows'; expected one of euc, quant, cross_rows"),
        ((None, 2, 2, 0, 1, 2, 8), "unknown method None"),
        (("euc", 0, 2, 0, 1, 2, 8), "height must be an integer of at least 1, not 0"),
        (("euc", 2, 2.0, 0, 1, 2, 8), "width must be an integer of at least 1, not 2.0"),
        (("euc", 2, 2, -1, 1, 2, 8), "skip must be an integer of at least 0, not -1"),
        (("euc", 2, 2, 0, 0, 0, 0), "expected 0 < alpha < beta < gamma, got alpha=0, beta=0, gamma=0"),
        (("euc", 2, 2, 0, -1, -2, -8), "expected 0 < alpha < beta < gamma"),
        (("euc", 2, 2, 0, 0, 2, 8), "expected 0 < alpha < beta < gamma"),
        (("euc", 2, 2, 0, 2, 2, 8), "expected 0 < alpha < beta < gamma"),
        (("euc", 2, 2, 0, 1, 2, 2), "expected 0 < alpha < beta < gamma"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        get_bucket_ids_2d(*arguments)


def test_methods_in_any_case():
    assert torch.equal(
        get_bucket_ids_2d("Cross_Rows", 2, 2, 0, 1, 2, 8)[0], get_bucket_ids_2d("cross_rows", 2, 2, 0, 1, 2, 8)[0]
    )


def test_a_map_is_sent_without_waiting_only_from_pinned_memory(monkeypatch):
    """MPS reads a copy's source later, when it may be freed. CUDA's pinned memory allocator waits for the copy."""
    sent, real = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **options: sent.append(options) or real(x, *a, **options))
    bucket_map("product", 1.9, 3, 4, 0, torch.device("meta"))
    assert sent and not any(options.get("non_blocking") for options in sent)


@pytest.mark.parametrize("own", [True, False])
def test_a_map_made_on_a_stream_of_its_own_is_waited_for(own, monkeypatch):
    made, waited = types.SimpleNamespace(device=torch.device("cuda", 0)), []
    default, side = (types.SimpleNamespace(synchronize=lambda n=n: waited.append(n)) for n in ("default", "side"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: side if own else default)
    monkeypatch.setattr(buckets, "_make_map", lambda *key: made)
    buckets._cached_map.__wrapped__()
    assert waited == (["side"] if own else [])


def test_maps_of_a_gpu_that_is_not_here():
    """Only shapes are needed, on any machine, as in planning a run's memory."""
    with FakeTensorMode():
        ids = bucket_map("product", 1.9, 3, 4, 1, torch.device("cuda", 0))
    assert ids.shape == (13, 13) and ids.device.type == "cuda"


@pytest.mark.parametrize("captures", [True, False])
def test_what_a_cuda_graph_has_read_is_kept_when_the_cache_forgets_it(captures, monkeypatch):
    with FakeTensorMode():
        made = [torch.empty(2, 2, device="cuda")]
    monkeypatch.setattr(buckets, "_cached_map", lambda *key: made.pop())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    read = weakref.ref(bucket_map("product", 1.9, 3, 4, 0, torch.device("cuda", 0)))
    gc.collect()
    assert (read() is not None) == captures
    buckets._read_by_graphs.clear()
