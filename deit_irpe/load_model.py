"""The model of a checkpoint, built from the flags it was trained with."""

import argparse

import torch
from timm.data import ImageNetInfo
from torch import nn

from deit_irpe.args import get_args_parser, image_size, model_options
from deit_irpe.models import create_model
from irpe_train.checkpoint import load_matching, model_weights, read_checkpoint


def load_model(source: str, *, ema: bool = False, **flags) -> tuple[nn.Module, argparse.Namespace, list[str]]:
    """The trained model of a checkpoint, in evaluation mode.

    Args:
        source: path or address; ema: its moving average.
        flags: ``model``, ``rpe``, ``input_size``, ... that win over those in the checkpoint, unless None.
    Returns: model, all flags, class names.
    Raises: ValueError: neither the checkpoint nor ``flags`` name a model.
    """
    checkpoint = read_checkpoint(source)
    weights = model_weights(checkpoint, source=source, key="model_ema" if ema else "model")
    known = vars(checkpoint.get("args", argparse.Namespace()))
    given = {name: value for name, value in flags.items() if value is not None}
    if "model" not in known | given:
        raise ValueError(f"{source} does not say which model it is: add --model NAME (and --rpe SPEC)")
    args = argparse.Namespace(**vars(get_args_parser().parse_args([])) | known | given)
    num_classes = known.get("nb_classes") or len(weights.get("head.bias", torch.empty(1000)))
    model = create_model(args.model, args.rpe, **model_options(args, image_size(args.input_size), num_classes))
    load_matching(model, weights, source=source)
    return model.eval(), args, checkpoint.get("classes") or class_names(num_classes)


def class_names(count: int) -> list[str]:
    """Names for classes that a checkpoint does not name: ImageNet's for 1000 of them, else numbers."""
    if count != 1000:
        return [f"class {number}" for number in range(count)]
    imagenet = ImageNetInfo("imagenet-1k")
    return [imagenet.index_to_description(number) for number in range(count)]
