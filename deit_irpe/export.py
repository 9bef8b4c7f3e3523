# SPDX-License-Identifier: Apache-2.0
"""Export a trained DeiT: ``python -m deit_irpe.export --model NAME --resume best.pth --out deit.onnx``.

Classes, image size, mean, deviation and encoding stand in its metadata, each as JSON; ``deit_irpe.predict`` runs the
ONNX file too.
"""

import argparse
import json

import torch

from deit_irpe.args import image_size
from deit_irpe.data.transforms import MEAN, STD
from deit_irpe.load_model import load_model
from deit_irpe.models import RPE_MODELS
from irpe_train.export import add_export_arguments, export_model
from irpe_train.flags import FlagParser
from irpe_train.launch import launch


def main(args: argparse.Namespace) -> None:
    model, trained, classes = load_model(args.resume, ema=args.eval_ema, model=args.model, rpe=args.rpe)
    size = image_size(trained.input_size)
    height, width = (size, size) if isinstance(size, int) else size

    examples = [(torch.randn(batch, 3, height, width),) for batch in (2, 3)]
    differences = export_model(
        model,
        examples,
        args.out,
        formats=args.formats,
        dynamic=[{0: "batch"}],
        input_names=["images"],
        output_names=["logits"],
        metadata={
            key: json.dumps(value)
            for key, value in (
                ("classes", classes),
                ("input_size", trained.input_size),
                ("mean", MEAN),
                ("std", STD),
                ("model", trained.model),
                ("rpe", trained.rpe or RPE_MODELS.get(trained.model, (None, ""))[1]),
            )
        },
    )
    for format, difference in differences.items():
        print(
            f"{format}: {height} x {width} pixels, any batch; largest difference {difference:.1e} of the largest logit"
        )


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser("python -m deit_irpe.export", description=__doc__, allow_abbrev=False)
    add_export_arguments(parser)
    parser.add_argument("--model", help="default: what the checkpoint was trained as")
    parser.add_argument("--rpe", metavar="SPEC", help="default: what the checkpoint was trained with")
    parser.add_argument("--eval-ema", action="store_true", help="export the moving average of the weights")
    return parser


if __name__ == "__main__":
    launch(main, get_args_parser())
