"""torch.hub finds the models of both trees in a checkout."""

from pathlib import Path

import pytest
import torch

from deit_irpe.models import RPE_MODELS

REPO = Path(__file__).resolve().parents[2]


def load(entry, *args, **kwargs):
    return torch.hub.load(str(REPO), entry, *args, source="local", **kwargs)


def test_every_published_model_is_an_entry_point():
    assert all(load(name, num_classes=2, depth=1).num_classes == 2 for name in RPE_MODELS)


def test_deit_by_its_published_name():
    model = load("deit_tiny_patch16_224_ctx_product_50_shared_k", num_classes=7)
    assert model.head.out_features == 7
    assert model.blocks[0].attn.rpe_k.num_buckets == 50


def test_deit_with_any_encoding():
    model = load("deit", "deit_tiny_patch16_224", "rpe-2.0-euc-bias-0-k", depth=1)
    assert model.blocks[0].attn.rpe_k.lookup_table_bias.shape == (3, 10)


def test_detr_counts_what_is_published():
    model = load("detr_resnet50")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41317920


def test_an_unpublished_checkpoint_names_the_known_ones():
    with pytest.raises(ValueError, match="rpe-2.0-product-ctx-1-k_300epochs"):
        load("detr_resnet50", pretrained="no-such-checkpoint")


def test_published_weights_of_a_detr_without_encoding_are_refused():
    for enc_rpe2d in (None, ""):
        with pytest.raises(ValueError, match="model zoo: no published checkpoint 'none'"):
            load("detr_resnet50", pretrained=True, enc_rpe2d=enc_rpe2d)
