# SPDX-License-Identifier: Apache-2.0
"""The flags of detection: training, then predict, export and check. Importing this does not import PyTorch."""

import argparse
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

FIRST = "config", "coco_path", "output_dir", "enc_rpe2d", "backbone", "batch_size", "epochs", "lr", "finetune", "resume"
BACKENDS = ("auto", "eager", "sdpa", "compiled", "triton")  # of irpe_ops, which would import PyTorch
# A checkpoint may come from anyone, so only its flags that describe the network are read.
MODEL_FLAGS = (
    *("backbone", "dilation", "position_embedding", "enc_layers", "dec_layers", "dim_feedforward", "hidden_dim"),
    *("nheads", "num_queries", "pre_norm", "masks", "enc_rpe2d", "dataset_file", "image_size"),
)
EXPORT = """A trained DETR as ONNX, torch.export or safetensors.

The exported network takes images and their padding, and returns logits and boxes; the image size may vary. Its metadata
holds categories, image size, mean, standard deviation and encoding. predict also runs the ONNX file.
"""
CHECK = "Find mistakes in a data set before training on it."
PREDICT = """Detect objects in your own images: pictures with boxes (and masks), and the same as JSON.

    irpe detect predict IMG... --resume X.pth --out DIR [--attention]

IMG is a file, a folder (with all folders in it) or a pattern such as "photos/*.jpg".

Writes DIR/NAME.png and DIR/NAME.json for each image; boxes are [x0, y0, x1, y1] in pixels, categories have the ids
and names of the data set the checkpoint was trained on. A photograph is rotated by its EXIF orientation, as people see
it, and "frame" in the JSON says so. --annotations draws the ground truth beside the prediction, in the frame of its
height and width. --attention adds DIR/NAME_attention.png, the last encoder layer's attention at chosen points.
--attention, or --tables, which needs no image, adds DIR/tables.png, what the encodings learned for each offset.
"""


def get_args_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m detr_irpe``."""
    what = "Train and evaluate DETR with image relative position encoding."
    parser = FlagParser("python -m detr_irpe", first=FIRST, description=what)

    data = parser.add_argument_group("data").add_argument
    data("--dataset_file", default="coco", choices=("coco", "coco_panoptic"), help="kind of annotations")
    data("--coco_path", metavar="DIR", help="holds annotations/ and train2017/, val2017/ (or .zip of each)")
    data("--coco_panoptic_path", metavar="DIR", help="holds annotations/panoptic_*.json and panoptic_*2017/ (or .zip)")
    data("--remove_difficult", action="store_true", help="no effect, as published")
    data("--num_classes", default="auto", type=_auto_or_positive_int, metavar="N", help="largest category id plus one")
    data("--image_size", default=800, type=positive_int, metavar="PIXELS", help="short side; all sizes scale with it")
    data("--augment", default="published", choices=("published", "none"), help="none: images as in evaluation")
    data("--eval_batch_size", default=1, type=positive_int, help="images per process; above 1 scores change slightly")

    model = parser.add_argument_group("model").add_argument
    spec = "rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}"
    model("--enc_rpe2d", default="", type=_spec, metavar="SPEC", help=f"encoding {spec}; empty or none: without")
    model("--backbone", default="resnet50", help="a torchvision ResNet, or resnet_micro for the demo")
    model("--backbone_weights", default="imagenet", metavar="imagenet|none|FILE", help="if no checkpoint is loaded")
    model("--dilation", action="store_true", help="no stride in the backbone's last stage (DC5)")
    model("--position_embedding", default="sine", choices=("sine", "learned"), help="for image features")
    model("--enc_layers", default=6, type=nonnegative_int, help="encoder layers")
    model("--dec_layers", default=6, type=positive_int, help="decoder layers")
    model("--dim_feedforward", default=2048, type=positive_int, help="hidden width of the feed-forward blocks")
    model("--hidden_dim", default=256, type=positive_int, help="width of the transformer")
    model("--dropout", default=0.1, type=fraction, help="in the transformer")
    model("--nheads", default=8, type=positive_int, help="attention heads")
    model("--num_queries", default=100, type=positive_int, help="largest number of objects per image")
    model("--pre_norm", action="store_true", help="normalise before each block, not after")
    model("--masks", action="store_true", help="train the segmentation head")
    model("--frozen_weights", metavar="FILE", help="a trained detector: only the segmentation head is trained on it")
    model("--finetune", default="", metavar="FILE", help="initial weights; only classes, queries and masks may differ")
    model("--pretrained", default="", metavar="NAME", help="start from (or --eval) a published checkpoint of the zoo")
    model("--attn-backend", default="auto", choices=BACKENDS, help="backend for the encoder's attention")

    loss = parser.add_argument_group("losses").add_argument
    loss("--no_aux_loss", dest="aux_loss", action="store_false", help="loss only on the last decoder layer")
    loss("--set_cost_class", default=1, type=nonnegative_float, help="weight of the class in matching")
    loss("--set_cost_bbox", default=5, type=nonnegative_float, help="weight of the L1 distance in matching")
    loss("--set_cost_giou", default=2, type=nonnegative_float, help="weight of the generalised IoU in matching")
    loss("--mask_loss_coef", default=1, type=nonnegative_float, help="weight of the mask's focal loss")
    loss("--dice_loss_coef", default=1, type=nonnegative_float, help="weight of the mask's dice loss")
    loss("--bbox_loss_coef", default=5, type=nonnegative_float, help="weight of the L1 loss")
    loss("--giou_loss_coef", default=2, type=nonnegative_float, help="weight of the generalised IoU loss")
    loss("--eos_coef", default=0.1, type=positive_float, help="weight of the class 'no object'")

    train = parser.add_argument_group("training").add_argument
    train("--lr", default=1e-4, type=nonnegative_float, help="learning rate of all but the backbone; never scaled")
    train("--lr_backbone", default=1e-5, type=nonnegative_float, help="learning rate of the backbone; 0 freezes it")
    train("--batch_size", default=2, type=positive_int, help="images per process and step")
    train("--weight_decay", default=1e-4, type=nonnegative_float, help="on everything, encodings included")
    train("--epochs", default=300, type=positive_int, help="total epochs")
    train("--lr_drop", default=200, type=positive_int, help="epochs after which both learning rates fall to a tenth")
    train("--clip_max_norm", default=0.1, type=nonnegative_float, help="largest norm of the gradient; 0 does not clip")

    add_runtime_arguments(parser, seed=42, num_workers=4, amp="none")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError if flags contradict each other, and says what to change."""
    if not args.coco_path:
        raise ValueError("--coco_path is needed: the folder that holds annotations/, train2017/ and val2017/")
    if args.dataset_file == "coco_panoptic" and not args.coco_panoptic_path:
        raise ValueError("--dataset_file coco_panoptic needs --coco_panoptic_path: the folder of its annotations")
    if args.frozen_weights and not args.masks:
        raise ValueError("--frozen_weights trains only the segmentation head: add --masks")
    if args.dropout == 1:
        raise ValueError("--dropout 1 leaves nothing: give a fraction below 1")
    if args.enc_rpe2d and not args.enc_layers:
        raise ValueError(f"--enc_rpe2d {args.enc_rpe2d}: --enc_layers 0 leaves no encoder for it; leave one out")
    if args.pretrained and args.finetune:
        raise ValueError("--pretrained and --finetune both say what to start from; give one")
    if args.expect is not None and not args.eval:
        raise ValueError("--expect compares an evaluation with the published figures: add --eval")


def get_predict_parser() -> argparse.ArgumentParser:
    """The parser of ``irpe detect predict`` and ``python -m detr_irpe.predict``."""
    parser = FlagParser("python -m detr_irpe.predict", description=PREDICT, allow_abbrev=False)
    add_predict_arguments(parser)
    add = parser.add_argument
    add("--threshold", type=fraction, default=0.5, help="lowest score shown (default 0.5)")
    add("--annotations", type=Path, metavar="FILE", help="COCO annotations of the images: ground truth on the left")
    add("--attention", action="store_true", help="also draw encoder attention and the learned encodings")
    add("--point", type=_point, action="append", metavar="X,Y", help="query pixel (default: best detections)")
    return parser


def get_export_parser() -> argparse.ArgumentParser:
    """The parser of ``irpe detect export`` and ``python -m detr_irpe.export``."""
    parser = FlagParser("python -m detr_irpe.export", description=EXPORT, allow_abbrev=False)
    add_export_arguments(parser)
    parser.add_argument("--height", type=int, default=256, help="pixels of the traced example; any size runs later")
    parser.add_argument("--width", type=int, default=320, help="pixels of the traced example")
    return parser


def get_check_parser() -> argparse.ArgumentParser:
    """The parser of ``irpe detect check`` and ``python -m detr_irpe.check_data``."""
    parser = FlagParser("python -m detr_irpe.check_data", description=CHECK)
    parser.add_argument("--coco_path", required=True, metavar="DIR", help="as for training")
    parser.add_argument("--coco_panoptic_path", metavar="DIR", help="check the panoptic annotations there instead")
    parser.add_argument("--splits", nargs="+", default=["train2017", "val2017"], help="which to check, training first")
    parser.add_argument("--num_classes", type=positive_int, help="as for training, if given there")
    parser.add_argument("--masks", action="store_true", help="as for training: every object needs a mask")
    parser.add_argument("--max-bad", default=0.001, type=fraction, metavar="FRACTION", help="as for training")
    parser.add_argument("--num_workers", default=2, type=number_of_workers, help="processes that decode images")
    return parser


def _auto_or_positive_int(text: str) -> int | str:
    return text if text == "auto" else positive_int(text)


def _spec(text: str) -> str:
    return "" if text == "none" else text  # as in --rpe of classification


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected X,Y in pixels, got {text!r}") from None
    return x, y
