"""A mode is one row: one added here works in every backend that takes lookups, and is refused by name in the other."""

import pytest
import torch
from torch import nn

from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention
from irpe_ops.attention import missing_backend
from irpe_ops.modes import MODES, Mode

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
    if missing_backend("compiled"):
        pytest.skip(missing_backend("compiled"))
    with pytest.raises(ValueError, match="it knows the modes ctx and bias, not 'both'; use backend='eager'"):
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
