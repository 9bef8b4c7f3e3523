# SPDX-License-Identifier: Apache-2.0
"""``irpe classify export``: a trained DeiT for other programs."""

import argparse
import json

import torch

from deit_irpe.args import get_export_parser, image_size
from deit_irpe.data.transforms import MEAN, STD
from deit_irpe.load_model import MODEL_FLAGS, load_model
from deit_irpe.models import RPE_MODELS
from irpe_train.export import export_model
from irpe_train.launch import launch


def main(args: argparse.Namespace) -> None:
    model, trained, classes = load_model(args.resume, ema=args.eval_ema, model=args.model, rpe=args.rpe)
    height, width = image_size(trained.input_size)
    examples = [(torch.randn(batch, 3, height, width),) for batch in (2, 3)]
    facts = {"classes": classes, "mean": MEAN, "std": STD} | {name: getattr(trained, name) for name in MODEL_FLAGS}
    facts["rpe"] = trained.rpe or RPE_MODELS.get(trained.model, (None, None))[1]
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    export_model(
        model,
        examples,
        args.out,
        formats=args.formats,
        inputs={"images": {0: "batch"}},
        outputs=["logits"],
        metadata=metadata,
    )


if __name__ == "__main__":
    launch(main, get_export_parser())
