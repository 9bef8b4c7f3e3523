"""The nested loops themselves, against numbers computed by hand on a 2 x 2 grid."""

import math

import pytest
import torch

from irpe_ops import build_rpe, get_rpe_config
from tests import oracles


@pytest.mark.parametrize(
    ("method", "skip", "expected"),
    [
        # Tokens 0 1 / 2 3; ratio 1: b = 2, so an offset of 0 has bucket 2, of +1 bucket 3 and of -1 bucket 1.
        ("cross_rows", 0, [[2, 2, 1, 1], [2, 2, 1, 1], [3, 3, 2, 2], [3, 3, 2, 2]]),
        ("cross_cols", 0, [[2, 1, 2, 1], [3, 2, 3, 2], [2, 1, 2, 1], [3, 2, 3, 2]]),
        # 5 * row bucket + column bucket.
        ("product", 0, [[12, 11, 7, 6], [13, 12, 8, 7], [17, 16, 12, 11], [18, 17, 13, 12]]),
        # Squared distances 0, 1, 2: 2 is past alpha, 1 + log8(2) = 1.33 rounds to 1. The root of 2 rounds to 1.
        ("quant", 0, [[2, 3, 3, 3], [3, 2, 3, 3], [3, 3, 2, 3], [3, 3, 3, 2]]),
        ("euc", 0, [[2, 3, 3, 3], [3, 2, 3, 3], [3, 3, 2, 3], [3, 3, 3, 2]]),
        ("cross_rows", 1, [[5, 5, 5, 5, 5], [5, 2, 2, 1, 1], [5, 2, 2, 1, 1], [5, 3, 3, 2, 2], [5, 3, 3, 2, 2]]),
    ],
)
def test_bucket_ids_by_hand(method, skip, expected):
    assert oracles.bucket_ids(method, 2, 2, skip, ratio=1.0).tolist() == expected


def test_lookup_and_sum_by_hand():
    index = torch.tensor([[0, 1], [1, 1]])
    assert oracles.lookup(torch.tensor([[[[5.0, 6.0], [7.0, 8.0]]]]), index).tolist() == [[[[5, 6], [8, 8]]]]
    assert oracles.sum_into_buckets(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), index, 3).tolist() == [
        [[[1, 2, 0], [0, 7, 0]]]
    ]


def test_encode_by_hand():
    rpe_q, rpe_k, rpe_v = build_rpe(get_rpe_config(ratio=1.0, method="cross", rpe_on="qkv"), head_dim=1, num_heads=1)
    rpe_k.rp_rows.table.data[0, 0] = torch.tensor([0.0, 1, 2, 3, 0])
    rpe_k.rp_cols.table.data[0, 0] = torch.tensor([0.0, 10, 20, 30, 0])
    x = torch.tensor([1.0, 2.0, 1.0, 1.0]).view(1, 1, 4, 1)
    # Token 1 (row 0, column 1, vector 2): to 0: row 2 + column 30, doubled; to 1: 2 + 20; to 2: 1 + 30; to 3: 1 + 20.
    assert oracles.encode(rpe_k, x, 2, 2)[0, 0, 1].tolist() == [64, 44, 62, 42]
    rpe_v.rp_rows.table.data[0, :, 0] = torch.tensor([0.0, 1, 2, 3, 0])
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0, 0] = torch.tensor([0.5, 0.0, 0.25, 0.25])
    # Token 0 sees itself (bucket 2, value 2) with a half and the row below (bucket 1, value 1) with a half.
    assert oracles.encode(rpe_v, weights, 2, 2)[0, 0, 0].tolist() == [1.5]


def test_attention_by_hand():
    # One bias of log 2 on the pair (query 0, key 1) of a 1 x 2 grid; everything else scores 0.
    _, rpe_k, _ = build_rpe(get_rpe_config(ratio=1.0, method="cross", mode="bias"), head_dim=1, num_heads=1)
    rpe_k.rp_cols.table.data[0, 1] = math.log(2)
    zeros, values = torch.zeros(1, 1, 2, 1), torch.tensor([3.0, 6.0]).view(1, 1, 2, 1)
    out = oracles.attention(zeros, zeros, values, None, rpe_k, None, 1, 2)
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0, 4.5], dtype=torch.float64))
    # The encoding on queries is looked up from the key's side: there 1 is the key and 0 the query after it.
    rpe_q, _, _ = build_rpe(get_rpe_config(ratio=1.0, method="cross", mode="bias", rpe_on="q"), 1, 1)
    rpe_q.rp_cols.table.data[0, 1] = math.log(2)
    out = oracles.attention(zeros, zeros, values, rpe_q, None, None, 1, 2)
    torch.testing.assert_close(out.flatten(), torch.tensor([4.5, 4.0], dtype=torch.float64))
    excluded = torch.tensor([[True, True], [False, True]]).view(1, 1, 2, 2)
    out = oracles.attention(zeros, zeros, values, None, rpe_k, None, 1, 2, excluded=excluded)
    assert out.flatten().tolist() == [0.0, 3.0]


def test_tolerance_can_fail():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    oracles.assert_as_accurate_as_torch(exact.float(), exact.float(), exact)
    with pytest.raises(AssertionError, match="error 1.0"):
        oracles.assert_as_accurate_as_torch((exact + 1e-5).float(), exact.float(), exact.float().double())
