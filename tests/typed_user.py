"""A user's code for the type checker: ``tests/end_to_end/test_packaging.py`` lets mypy read this file."""

from pathlib import Path

import torch
from torch import Tensor, nn

import deit_irpe
import detr_irpe
import irpe
from deit_irpe.convert import convert
from irpe_ops import build_rpe, equip, get_bucket_ids_2d, get_rpe_config, parse_rpe_spec, rpe_attention, rpe_index
from irpe_train.checkpoint import model_weights, read_checkpoint


def encode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    config = get_rpe_config(ratio=1.9, method="product", mode="ctx", shared_head=True, skip=1, rpe_on="k")
    rpe_q, rpe_k, rpe_v = build_rpe(config, head_dim=64, num_heads=3)
    return rpe_attention(q, k, v, rpe_q, rpe_k, rpe_v, height=14, width=14, backend="auto")


def look_up(scores: Tensor) -> Tensor:
    ids, buckets = get_bucket_ids_2d("product", 14, 14, 1, 1.9, 3.8, 15.2)
    return rpe_index(scores[..., :buckets], ids)


def through_the_front_door(q: Tensor) -> Tensor:
    return irpe.rpe_attention(q, q, q, *irpe.build_rpe(irpe.get_rpe_config(), 64, 3))


def models() -> list[nn.Module]:
    vit = deit_irpe.create_model("deit_tiny_patch16_224", "rpe-1.9-product-ctx-1-k", num_classes=10)
    detr = detr_irpe.create_model("resnet50", "rpe-2.0-product-ctx-1-k", num_queries=50)
    return [vit, detr, equip(vit, parse_rpe_spec("rpe-2.0-cross-bias-0-qk", skip=1))]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return convert(model_weights(read_checkpoint(path), source=path), prefix="backbone.")
