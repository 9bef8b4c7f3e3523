"""A DETR small enough for tests, and its flags."""

from argparse import Namespace

import torch
from torch import nn

from detr_irpe import create_model
from detr_irpe.models.transformer import Transformer
from tests.oracles import fill_tables

SPECS = [
    "",
    "rpe-2.0-product-ctx-1-k",
    "rpe-1.9-product-ctx-0-qkv",
    "rpe-2.0-cross-ctx-0-qk",
    "rpe-2.0-euc-bias-0-k",
    "rpe-2.0-quant-ctx-1-v",
]
TINY = {"hidden_dim": 16, "nheads": 2, "enc_layers": 2, "dec_layers": 2, "dim_feedforward": 24, "dropout": 0.0}


def tiny_model(enc_rpe2d: str = "rpe-2.0-product-ctx-1-k", seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model("resnet_micro", enc_rpe2d, num_classes=7, num_queries=5, **TINY | {"dilation": True} | options)
    return model.eval()


def tiny_transformer(enc_rpe2d: str = "", **options) -> Transformer:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 24}
    transformer = Transformer(enc_rpe2d=enc_rpe2d, **sizes | options).eval().double()
    fill_tables(transformer)
    return transformer


def published_flags(**changes) -> Namespace:
    """The published command line, as far as the model reads it; tiny where size matters."""
    flags = {
        "backbone": "resnet_micro",
        "backbone_weights": "none",
        "dilation": False,
        "position_embedding": "sine",
        "pre_norm": False,
        "num_queries": 5,
        "enc_rpe2d": "",
        "masks": False,
        "frozen_weights": None,
        "aux_loss": True,
        "set_cost_class": 1,
        "set_cost_bbox": 5,
        "set_cost_giou": 2,
        "bbox_loss_coef": 5,
        "giou_loss_coef": 2,
        "mask_loss_coef": 1,
        "dice_loss_coef": 1,
        "eos_coef": 0.1,
        "lr_backbone": 1e-5,
        "dataset_file": "coco",
        "device": "cpu",
        "eval": False,
        "resume": "",
    }
    return Namespace(**flags | TINY | changes)


def random_targets(counts: list[int], num_classes: int = 7, size: tuple[int, int] | None = None) -> list[dict]:
    """Objects for one image per count; with masks if a size is given."""
    targets = [{"boxes": torch.rand(n, 4) * 0.4 + 0.3, "labels": torch.randint(0, num_classes, (n,))} for n in counts]
    for target, n in zip(targets, counts, strict=True):
        if size is not None:
            target["masks"] = torch.rand(n, *size) > 0.5
    return targets
