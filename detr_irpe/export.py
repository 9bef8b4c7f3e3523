# SPDX-License-Identifier: Apache-2.0
"""``irpe detect export``: a trained DETR for other programs."""

import argparse
import json

import torch
from torch import Tensor, nn

from detr_irpe.args import MODEL_FLAGS, get_export_parser
from detr_irpe.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from detr_irpe.load_model import load_model
from detr_irpe.nested_tensor import NestedTensor
from irpe_train.export import export_model
from irpe_train.launch import launch

SMALLEST = 64  # pixels: the second example is 32 narrower


class TensorsInOut(nn.Module):
    """DETR with plain tensors: images ``(B, 3, H, W)``, padding ``(B, H, W)`` (True = padded) to logits and boxes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(NestedTensor(images, padding))
        return outputs["pred_logits"], outputs["pred_boxes"]


def main(args: argparse.Namespace) -> None:
    if min(args.height, args.width) < SMALLEST:
        raise ValueError(f"--height {args.height} --width {args.width}: expected {SMALLEST} pixels or more")
    model, _, trained, categories = load_model(args.resume)
    if trained.masks:
        raise ValueError(f"{args.resume} has a mask head, which is not exported; export the detector it was trained on")

    examples = []
    for batch, height, width in ((2, args.height, args.width), (3, args.height + 64, args.width - 32)):
        padding = torch.zeros(batch, height, width, dtype=torch.bool)
        padding[-1, :, width - 16 :] = True
        examples.append((torch.randn(batch, 3, height, width), padding))
    facts = {"categories": categories, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    facts |= {name: getattr(trained, name) for name in MODEL_FLAGS}
    export_model(
        TensorsInOut(model),
        examples,
        args.out,
        formats=args.formats,
        inputs={"images": {0: "batch", 2: "height", 3: "width"}, "padding": {0: "batch", 1: "height", 2: "width"}},
        outputs=["pred_logits", "pred_boxes"],
        metadata={name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()},
    )


if __name__ == "__main__":
    launch(main, get_export_parser())
