# SPDX-License-Identifier: Apache-2.0
"""DETR's optimizer: the backbone has its own learning rate."""

import argparse

import torch
from torch import nn

from irpe_train.errors import blamed_on


def build_optimizer(args: argparse.Namespace, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over all trained parameters: first those outside the backbone, then those in it."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if "backbone" not in name]},
        {"params": [p for name, p in trained if "backbone" in name], "lr": args.lr_backbone},
    ]
    # fused: several times faster on the CPU; on GPUs PyTorch's default, which suits loss scaling and old checkpoints.
    fused = True if device.type == "cpu" else None
    with blamed_on("--lr, --lr_backbone, --weight_decay"):
        return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=fused)
