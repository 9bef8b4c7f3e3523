# SPDX-License-Identifier: Apache-2.0
"""The flags of classification: training, then predict, export and check. Importing this does not import PyTorch."""

import argparse
import ast
import os
from pathlib import Path

from irpe_train.arguments import (
    add_export_arguments,
    add_predict_arguments,
    add_runtime_arguments,
    fraction,
    nonnegative_float,
    nonnegative_int,
    number_of_workers,
    positive_float,
    positive_int,
)
from irpe_train.flags import FlagParser

FIRST = ["config", "data-path", "output_dir", "model", "rpe", "batch-size", "epochs", "lr", "finetune", "resume"]
BACKENDS = ("auto", "eager", "sdpa", "compiled", "triton")  # of irpe_ops, which would import PyTorch
SETS = ("CIFAR", "IMNET", "INAT", "INAT19", "WDS", "HFDS")
FILTERS = ("random", "bilinear", "bicubic", "lanczos", "hamming")  # published: any other word is bilinear
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
EXPORT = """A trained DeiT as ONNX, torch.export or safetensors.

The metadata holds classes, image size, mean, standard deviation and encoding as JSON. predict also runs the ONNX file.
"""
CHECK = "Find mistakes in a data set before training on it."
PREDICT = """The five most likely classes of images, as pictures and JSON.

    irpe classify predict IMG... --resume X.pth --out DIR [--attention [ROW,COL ...]]

IMG is a file, a folder (with all folders in it) or a pattern such as "photos/*.jpg". The model is built from the flags
in the checkpoint; --model and --rpe give them if it has none; an ONNX file needs none.

Writes DIR/<image>.png and DIR/predictions.json. --attention adds what the chosen patches attend to
(<image>_attention_ROW-COL.png) and what their encodings add to the scores (<image>_encoding_ROW-COL.png).
--attention, or --tables, which needs no image, adds the learned tables (tables.png). If two images have the same
name, their results are named after their folders too. predict never replaces a file that it did not write, or
that it wrote for another image.
"""


def get_args_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m deit_irpe``."""
    what = "Train and evaluate DeiT with image relative position encoding."
    parser = FlagParser("python -m deit_irpe", first=FIRST, description=what)
    on_off = argparse.BooleanOptionalAction  # a flag --x and its opposite --no-x
    add_runtime_arguments(parser, seed=0, num_workers=10, amp="fp16")  # fp16 autocast on CUDA, as published

    add = parser.add_argument_group("length and learning rate").add_argument
    add("--batch-size", default=64, type=positive_int, help="images per process; evaluation takes 1.5 times as many")
    add("--epochs", default=300, type=positive_int, help="epochs")
    add("--sched", default="cosine", type=schedule, metavar="{cosine,tanh,step}", help="learning-rate schedule")
    add("--lr", default=5e-4, type=nonnegative_float, help="learning rate at 512 images per update; scales with them")
    add("--lr-noise", type=fraction, nargs="+", metavar="FRACTION", help="add noise between these points of the run")
    add("--lr-noise-pct", default=0.67, type=nonnegative_float, metavar="P", help="limit, as a fraction of the rate")
    add("--lr-noise-std", default=1.0, type=nonnegative_float, metavar="STD", help="standard deviation of the noise")
    add("--warmup-lr", default=1e-6, type=nonnegative_float, help="rate at the start of warm-up; not scaled")
    add("--min-lr", default=1e-5, type=nonnegative_float, help="rate at the end of the schedule; not scaled")
    add("--decay-epochs", default=30, type=positive_float, metavar="N", help="step schedule: epochs between decays")
    add("--warmup-epochs", default=5, type=nonnegative_int, metavar="N", help="epochs of linear warm-up")
    add("--cooldown-epochs", default=10, type=nonnegative_int, metavar="N", help="no effect, as published")
    add("--patience-epochs", default=10, type=nonnegative_int, metavar="N", help="no effect, as published")
    add("--decay-rate", "--dr", default=0.1, type=fraction, help="step schedule: factor of each decay")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="deit_base_patch16_224", metavar="NAME", help="from deit_irpe.models, or any timm model")
    add("--rpe", metavar="SPEC", help="rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on} or none; default: by --model")
    add("--no-abs-pos", action="store_true", help="no absolute position embedding")
    add("--attn-backend", default="auto", choices=BACKENDS, help="backend for encoded attention (irpe info)")
    add("--model-kwargs", default=[], nargs="*", type=_keyword, metavar="KEY=VALUE", help="passed to timm's model")
    add("--input-size", default=224, type=image_size_text, metavar="N|HxW", help="image size in pixels")
    add("--drop", default=0.0, type=fraction, help="dropout")
    add("--drop-path", default=0.1, type=fraction, help="stochastic depth rate of the last block")
    add("--model-ema", default=True, action=on_off, help="keep a moving average of the weights")
    add("--model-ema-decay", default=0.99996, type=fraction, help="decay of the average per update")
    add("--model-ema-force-cpu", action="store_true", help="keep the average on the CPU")
    add("--eval-ema", action="store_true", help="evaluate the moving average instead of the weights")
    add("--pretrained", action="store_true", help="start from (or evaluate) the published weights of --model")
    add("--finetune", default="", metavar="PATH|URL", help="initial weights; heads and tables that differ start fresh")
    add(
        "--train-mode",
        default=True,
        action=on_off,
        help="train with dropout and stochastic depth; with --finetune, the published code has neither",
    )

    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", help="any timm optimizer")
    add("--opt-eps", default=1e-8, type=nonnegative_float, help="epsilon of the optimizer")
    add("--opt-betas", type=float, nargs="+", metavar="BETA", help="default: the optimizer's own")
    add("--clip-grad", type=clipping_norm, metavar="NORM", help="clip the gradient to this norm")
    add("--momentum", default=0.9, type=nonnegative_float, help="momentum of sgd")
    add("--weight-decay", default=0.05, type=nonnegative_float, help="skips vectors, biases, class token, positions")

    add = parser.add_argument_group("data").add_argument
    add("--data-path", default="/datasets01/imagenet_full_size/061417/", metavar="DIR", help="holds train/ and val/")
    add(
        "--data-set",
        default="IMNET",
        choices=SETS,
        help="IMNET: any image folder; CIFAR: CIFAR-100; WDS: WebDataset shards; HFDS: a folder of Hugging Face "
        "datasets (docs/data.md)",
    )
    add("--val-split", type=fraction, metavar="FRACTION", help="share of every class to hold out if there is no val/")
    add("--inat-category", default="name", choices=INAT_CATEGORIES, help="iNaturalist: the rank to classify")
    add("--load-tar", action="store_true", help="read train.tar and val.tar in --data-path")
    add("--dist-eval", default=True, action=on_off, help="each process evaluates its share, not everything")
    add("--pin-mem", default=True, action=on_off, help="pinned memory for batches")
    add("--repeated-aug", default=True, action=on_off, help="three augmented copies of an image per update, not one")

    add = parser.add_argument_group("augmentation (training)").add_argument
    add("--color-jitter", default=0.4, type=nonnegative_float, help="used if --aa is off")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="AutoAugment policy of timm; none for none")
    add("--smoothing", default=0.1, type=fraction, help="label smoothing")
    add("--train-interpolation", default="bicubic", choices=FILTERS, help="for crops")
    add("--no-aug", action="store_true", help="training images as in evaluation: no crop, flip, policy or erasing")
    add("--hflip", default=0.5, type=fraction, help="probability of a horizontal flip")
    add("--reprob", default=0.25, type=fraction, help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="how to fill the erased area")
    add("--recount", default=1, type=positive_int, help="number of areas to erase")
    add("--resplit", action="store_true", help="no effect, as published")
    add("--mixup", default=0.8, type=nonnegative_float, help="alpha; 0 for none")
    add("--cutmix", default=1.0, type=nonnegative_float, help="alpha; 0 for none")
    add("--cutmix-minmax", type=fraction, nargs=2, metavar=("MIN", "MAX"), help="area range, instead of alpha")
    add("--mixup-prob", default=1.0, type=fraction, help="probability of Mixup or CutMix")
    add("--mixup-switch-prob", default=0.5, type=fraction, help="probability of CutMix if both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="which images share one draw")

    add = parser.add_argument_group("distillation").add_argument
    add("--distillation-type", default="none", choices=("none", "soft", "hard"), help="soft or hard teacher labels")
    add("--teacher-model", default="regnety_160", metavar="NAME", help="a timm model")
    add("--teacher-path", default="", metavar="PATH|URL", help="its weights")
    add("--distillation-alpha", default=0.5, type=fraction, help="weight of the teacher's loss")
    add("--distillation-tau", default=1.0, type=positive_float, help="temperature for soft")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError if flags contradict each other."""
    if mixes(args) and args.batch_size % 2 and not args.eval:
        why = "Mixup and CutMix pair the images of a batch, so it must be even (or use --mixup 0 --cutmix 0)"
        raise ValueError(f"--batch-size {args.batch_size}: {why}")
    if args.val_split is not None and (args.data_set != "IMNET" or args.load_tar):
        raise ValueError("--val-split is for folders of images: leave out --data-set and --load-tar")
    out, data = (Path(os.path.realpath(place)) for place in (args.output_dir, args.data_path))
    flat = args.val_split is not None and not (data / "train").is_dir()
    of_classes = [data] if flat else [data / "train", data / "val"]
    folders = args.data_set == "IMNET" and not args.load_tar
    if args.output_dir and folders and any(folder in (out, *out.parents) for folder in of_classes):
        where = f"among the classes of {args.data_path}, so it would become one; choose a folder beside them"
        raise ValueError(f"--output_dir {args.output_dir}: {where}")
    keywords(args.model_kwargs)
    if args.smoothing >= 1:
        raise ValueError(f"--smoothing {args.smoothing:g}: nothing would be left of the label; give less than 1")
    if args.lr_noise and args.lr_noise_pct <= args.lr_noise_std / 1000:  # timm draws until it is within the limit
        raise ValueError(f"--lr-noise-pct {args.lr_noise_pct:g}: expected more than a thousandth of --lr-noise-std")
    low, high = args.cutmix_minmax or (0, 1)
    if any(int(side * low) >= int(side * high) for side in image_size(args.input_size)):
        wanted = f"expected the smaller one first, a pixel apart in images of {args.input_size}"
        raise ValueError(f"--cutmix-minmax {low:g} {high:g}: {wanted}")
    if args.distillation_type != "none" and not args.teacher_path:
        raise ValueError(f"--distillation-type {args.distillation_type} needs --teacher-path FILE or URL")
    if args.distillation_type != "none" and not args.train_mode:
        raise ValueError("--no-train-mode averages the two heads that --distillation-type needs separately; give one")
    if args.eval_ema and not (args.model_ema or args.eval):
        raise ValueError("--eval-ema evaluates the moving average, and --no-model-ema switches it off")
    if args.eval_ema and args.eval and not args.resume:
        raise ValueError("--eval --eval-ema evaluates the moving average in a checkpoint; name it with --resume")
    if args.eval_ema and args.model_ema_force_cpu and not args.eval:
        raise ValueError("--eval-ema needs the moving average beside the model; leave out --model-ema-force-cpu")
    if args.pretrained and args.finetune:
        raise ValueError("--pretrained and --finetune both say what to start from; give one")
    if args.expect is not None and not args.eval:
        raise ValueError("--expect compares an evaluation with the published figures: add --eval")


def mixes(args: argparse.Namespace) -> bool:
    """Whether images are mixed, by Mixup or CutMix; batches must then be even."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def get_predict_parser() -> argparse.ArgumentParser:
    """The parser of ``irpe classify predict`` and ``python -m deit_irpe.predict``."""
    parser = FlagParser("python -m deit_irpe.predict", description=PREDICT)
    add_predict_arguments(parser)
    add = parser.add_argument
    add("--ema", action="store_true", help="use the moving average of the weights")
    add("--attention", nargs="*", type=_point, metavar="ROW,COL", help="also draw attention (default: middle patch)")
    add("--model", help="if the checkpoint does not say")
    add("--rpe", help="if the checkpoint does not say")
    add("--input-size", type=image_size_text, metavar="N|HxW", help="pixels, if the checkpoint does not say")
    return parser


def get_export_parser() -> argparse.ArgumentParser:
    """The parser of ``irpe classify export`` and ``python -m deit_irpe.export``."""
    parser = FlagParser("python -m deit_irpe.export", description=EXPORT, allow_abbrev=False)
    add_export_arguments(parser)
    parser.add_argument("--model", help="default: what the checkpoint was trained as")
    parser.add_argument("--rpe", metavar="SPEC", help="default: what the checkpoint was trained with")
    parser.add_argument("--eval-ema", action="store_true", help="export the moving average of the weights")
    return parser


def get_check_parser() -> argparse.ArgumentParser:
    """The parser of ``irpe classify check`` and ``python -m deit_irpe.check_data``."""
    parser = FlagParser("python -m deit_irpe.check_data", description=CHECK)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="as for training")
    parser.add_argument("--data-set", default="IMNET", choices=SETS, help="as for training")
    parser.add_argument("--inat-category", default="name", choices=INAT_CATEGORIES, help="as for training")
    parser.add_argument("--load-tar", action="store_true", help="read train.tar and val.tar in --data-path")
    parser.add_argument("--val-split", type=fraction, metavar="FRACTION", help="as for training")
    parser.add_argument("--seed", default=0, type=int, help="as for training; for --val-split")
    parser.add_argument("--num_workers", default=2, type=number_of_workers, help="processes that decode images")
    return parser


def _point(text: str) -> tuple[int, int]:
    row, comma, col = text.partition(",")
    if not (comma and row.isdigit() and col.isdigit()):
        raise argparse.ArgumentTypeError(f"expected ROW,COL of a patch, got {text!r}")
    return int(row), int(col)


def schedule(text: str) -> str:
    if text == "plateau":
        why = "the published command gives it no metric and fails after warm-up; use cosine, tanh or step"
        raise argparse.ArgumentTypeError(f"plateau never worked: {why}")
    if text not in ("cosine", "tanh", "step"):
        raise argparse.ArgumentTypeError(f"expected cosine, tanh or step, got {text!r}")
    return text


def clipping_norm(text: str) -> float:
    if float(text) == 0:
        raise argparse.ArgumentTypeError(
            "0 made every gradient zero in the published code; leave --clip-grad out for no clipping"
        )
    return positive_float(text)


def image_size_text(text: str) -> int | str:
    """``224`` -> 224; ``224x320`` stays text, so that it can be saved as a flag."""
    sides = text.lower().split("x")
    if not (1 <= len(sides) <= 2 and all(side.isdigit() and 0 < int(side) < 2**16 for side in sides)):
        raise argparse.ArgumentTypeError(f"expected pixels, 224 or HEIGHTxWIDTH such as 224x320, got {text!r:.40}")
    return int(text) if len(sides) == 1 else text.lower()


def image_size(value: int | str) -> tuple[int, int]:
    """``--input-size`` as (height, width)."""
    height, _, width = str(value).partition("x")
    return int(height), int(width or height)


def _keyword(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not (equals and key.isidentifier()):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return text


def keywords(pairs: list[str]) -> dict:
    """``["depth=4", "pos_embed=none"]`` -> ``{"depth": 4, "pos_embed": "none"}``; Python literals (also ``true`` and
    ``false``), else text. Raises ValueError: a repeated key.
    """
    values = {}
    for pair in map(_keyword, pairs):
        key, _, text = pair.partition("=")
        if key in values:
            raise ValueError(f"--model-kwargs: {key} is given twice; give it once")
        try:
            values[key] = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values[key] = text
    return values
