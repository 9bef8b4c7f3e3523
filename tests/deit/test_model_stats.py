"""The MACs column of the published table, and what our value encoding needs."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

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


def test_a_bias_costs_nothing_and_cross_has_two_tables():
    plain, bias, cross = (
        on_meta("deit_small_patch16_224", rpe) for rpe in (None, "rpe-1.9-product-bias-1-k", "rpe-20-cross-ctx-1-k")
    )
    assert model_stats.macs(bias) == model_stats.macs(plain)
    assert model_stats.macs(cross) - model_stats.macs(plain) == 12 * 2 * 6 * 197 * 82 * 65


def test_command_line(capsys):
    model_stats.main(["deit_tiny_patch16_224_ctx_product_50_shared_k"])
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["deit_tiny_patch16_224_ctx_product_50_shared_k", "5,755,816", "1283.652"]


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "deit_tiny_distilled_patch16_224"])
def test_nothing_that_pytorch_counts_is_left_out(name):
    model = timm.create_model(name, img_size=64).eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    products = counter.get_total_flops() / 2
    assert products <= model_stats.macs(model) < 1.05 * products  # the rule also counts biases, norms and softmax


def test_a_second_head_counts():
    plain, distilled = (on_meta(f"deit_tiny_{kind}patch16_224") for kind in ("", "distilled_"))
    one_token_more = model_stats.macs(distilled) - model_stats.macs(plain) - 1000 * 193
    assert one_token_more == (
        25 * 192  # LayerNorm
        + 12 * (192 + 12 * 192 * 192 + (3 + 1 + 4 + 1) * 192)  # linear layers with their biases, and the scaling
        + 12 * 3 * (198**2 - 197**2) * (2 * 64 + 1)  # scores, softmax, values
    )


def test_the_statistics_of_a_model_are_not_changed_by_counting():
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert model_stats.count(model)["macs_M"] > 0 and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["deit_tny"], "model 'deit_tny': unknown"),
        (["resnet18"], "model 'resnet18': the rule does not cover every part of this ResNet"),
        (["local-dir:nowhere"], "OSError: model 'local-dir:nowhere': Config file not found: nowhere/config.json"),
        (["vit_base_patch16_siglip_224"], "does not cover every part of this VisionTransformer: attention pooling"),
        (["vit_dwee_patch16_reg1_gap_256"], "of this VisionTransformer: DiffAttention"),
        (["deit_tiny_patch16_224", "--rpe", "rpe-1-euc"], "rpe spec 'rpe-1-euc'"),
    ],
)
def test_mistakes_end_in_one_line(argv, words):
    with pytest.raises(SystemExit) as ended:
        model_stats.main(argv)
    assert words in ended.value.code and len(ended.value.code.splitlines()) == 1  # printed, with exit status 1
