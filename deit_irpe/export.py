"""Export a trained DeiT: ``python -m deit_irpe.export --model NAME --resume best.pth --out deit.onnx``."""

import argparse

import torch

from deit_irpe.args import image_size
from deit_irpe.models import create_model
from irpe_train.checkpoint import load_weights, model_weights, read_checkpoint
from irpe_train.export import add_export_arguments, export_model
from irpe_train.launch import launch


def main(args: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(args.resume)
    weights = model_weights(checkpoint, source=args.resume, key="model_ema" if args.eval_ema else "model")
    trained = checkpoint.get("args", argparse.Namespace())
    name = args.model or getattr(trained, "model", None)
    if name is None:
        raise ValueError(f"{args.resume} does not say which model it is: add --model NAME (and --rpe SPEC)")
    size = image_size(getattr(trained, "input_size", 224))
    height, width = (size, size) if isinstance(size, int) else size
    options = {"pos_embed": "none"} if getattr(trained, "no_abs_pos", False) else {}
    model = create_model(name, args.rpe or getattr(trained, "rpe", None), img_size=size,
                         num_classes=weights["head.weight"].shape[0], **options)
    load_weights(model, weights, source=args.resume)

    examples = [(torch.randn(batch, 3, height, width),) for batch in (2, 3)]
    differences = export_model(model, examples, args.out, formats=args.formats, dynamic=[{0: "batch"}],
                               input_names=["images"], output_names=["logits"])
    for format, difference in differences.items():
        print(f"{format}: {height} x {width} pixels, any batch; "
              f"largest difference {difference:.1e} of the largest logit")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m deit_irpe.export", description=__doc__, allow_abbrev=False)
    add_export_arguments(parser)
    parser.add_argument("--model", help="default: what the checkpoint was trained as")
    parser.add_argument("--rpe", metavar="SPEC", help="default: what the checkpoint was trained with")
    parser.add_argument("--eval-ema", action="store_true", help="export the moving average of the weights")
    return parser


if __name__ == "__main__":
    launch(main, get_args_parser())
