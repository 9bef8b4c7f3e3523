# SPDX-License-Identifier: Apache-2.0
"""The detector of a checkpoint, built from the flags it was trained with."""

import argparse

import torch
from torch import Tensor, nn

from detr_irpe.args import MODEL_FLAGS, get_args_parser
from detr_irpe.classes import categories_of, classes_in
from detr_irpe.models import build_model
from irpe_train.checkpoint import load_matching, model_weights, read_checkpoint
from irpe_train.errors import BadCheckpoint, first_line

LARGEST_IMAGE_SIZE = 10_000  # pixels; a larger photo does not fit in memory


def load_model(source: str) -> tuple[nn.Module, dict[str, nn.Module], argparse.Namespace, dict[int, str]]:
    """The trained model of a checkpoint, in evaluation mode, on the CPU. Nothing but the checkpoint is downloaded.

    Args: source: path or address.
    Returns: model (without auxiliary outputs), post-processors, the flags it was built from, and its categories.
    Raises: BadCheckpoint: it does not say how its model was built, or its weights belong to another model.
    """
    checkpoint = read_checkpoint(source)
    weights = model_weights(checkpoint, source=source)
    args = _flags(checkpoint, weights, source)
    try:
        with torch.device("meta"):  # allocates nothing, whatever the flags ask for
            shapes = build_model(args)[0]
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise BadCheckpoint(f"checkpoint {source}: its flags do not describe a DETR ({first_line(error)})") from error
    load_matching(shapes, {key: value.to("meta") for key, value in weights.items()}, source=source)
    model, _, postprocessors = build_model(args)
    load_matching(model, weights, source=source)
    return model.eval(), postprocessors, args, categories_of(checkpoint, weights, source=source)


def _flags(checkpoint: dict, weights: dict[str, Tensor], source: str) -> argparse.Namespace:
    trained = checkpoint.get("args")
    if not isinstance(trained, argparse.Namespace) or not hasattr(trained, "backbone"):  # the published ones have it
        why = "these say how to build the model. Use one that training a DETR wrote; a classifier is for irpe classify"
        raise BadCheckpoint(f"checkpoint {source} has no 'args' with the flags of a DETR: {why}")
    args = get_args_parser().parse_args([])
    for name in MODEL_FLAGS:
        default, value = getattr(args, name), getattr(trained, name, getattr(args, name))
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise BadCheckpoint(f"checkpoint {source}: its flag {name} is {value!r:.80}, not {type(default).__name__}")
        setattr(args, name, value)
    if not 0 < args.image_size <= LARGEST_IMAGE_SIZE:
        raise BadCheckpoint(f"checkpoint {source}: its flag image_size is {args.image_size}, larger than any photo")
    if args.enc_layers + args.dec_layers > len(weights):
        raise BadCheckpoint(f"checkpoint {source}: its flags name more layers than it has weights")
    args.eval, args.aux_loss = True, False  # no backbone weights are downloaded; only the last decoder layer
    args.num_classes = classes_in(weights, source=source)
    return args
