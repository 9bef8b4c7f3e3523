"""The MACs column of the published table, and what our value encoding needs."""

import pytest
import torch

from deit_irpe import create_model, model_stats
from irpe_train.metrics import count_parameters

PUBLISHED_MACS = {  # millions, as printed in the published table
    "deit_tiny_patch16_224_ctx_product_50_shared_k": (1284, 5.76),
    "deit_small_patch16_224_ctx_product_50_shared_k": (4659, 22.09),
    "deit_small_patch16_224_ctx_product_50_shared_qk": (4706, 22.13),
    "deit_small_patch16_224_ctx_product_50_shared_qkv": (4885, 22.17),
    "deit_base_patch16_224_ctx_product_50_shared_k": (17684, 86.61),
    "deit_base_patch16_224_ctx_product_50_shared_qkv": (18137, 86.68),
}


def on_meta(name, rpe=None):
    with torch.device("meta"):
        return create_model(name, rpe)


@pytest.mark.parametrize(("name", "expected"), PUBLISHED_MACS.items())
def test_the_published_columns(name, expected):
    model = on_meta(name)
    assert (round(model_stats.macs(model) / 1e6), round(count_parameters(model) / 1e6, 2)) == expected


@pytest.mark.parametrize(("size", "macs"), [("tiny", 1260.603), ("small", 4612.722), ("base", 17591.506)])
def test_plain_models_by_the_same_rule(size, macs):
    assert round(model_stats.macs(on_meta(f"deit_{size}_patch16_224")) / 1e6, 3) == macs


def test_the_value_encoding_by_buckets_costs_less():
    """Small, 6 heads, 197 tokens, 50 buckets, 12 blocks: H L L + H L N D instead of H L L D + H L N."""
    model = on_meta("deit_small_patch16_224_ctx_product_50_shared_qkv")
    saved = model_stats.macs(model) - model_stats.macs(model, values_by_bucket=True)
    assert saved == 12 * 6 * 197 * (197 * 64 + 50 - 197 - 50 * 64)
    keys_only = on_meta("deit_small_patch16_224_ctx_product_50_shared_k")
    assert model_stats.macs(keys_only) == model_stats.macs(keys_only, values_by_bucket=True)


def test_a_bias_costs_nothing_and_cross_has_two_tables():
    plain, bias, cross = (
        on_meta("deit_small_patch16_224", rpe) for rpe in (None, "rpe-1.9-product-bias-1-k", "rpe-20-cross-ctx-1-k")
    )
    assert model_stats.macs(bias) == model_stats.macs(plain)
    assert model_stats.macs(cross) - model_stats.macs(plain) == 12 * 2 * 6 * 197 * 82 * 65


def test_command_line(capsys):
    model_stats.main(["deit_tiny_patch16_224_ctx_product_50_shared_k"])
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["deit_tiny_patch16_224_ctx_product_50_shared_k", "5,755,816", "1283.652", "1283.652"]
