# SPDX-License-Identifier: Apache-2.0
"""Builds the model, its initial weights and its teacher from the flags."""

import argparse
import inspect

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer
from timm.utils import ModelEmaV2
from torch import nn

from deit_irpe.args import get_args_parser, image_size, keywords
from deit_irpe.data.classes import check_same_classes, stored_classes
from deit_irpe.models.finetune import fit_classes, head_prefixes, resample_positions, start_from, trained_grid
from deit_irpe.models.names import RPE_MODELS
from deit_irpe.models.registration import UnknownArgument, create_model
from irpe_train.checkpoint import Checkpoint, load_matching
from irpe_train.errors import BadCheckpoint
from irpe_train.logger import logger
from irpe_train.zoo import fetch

FLAGS = {"drop_path_rate": "--drop-path", "pos_drop_rate": "--drop", "proj_drop_rate": "--drop"}  # by timm's argument
OTHERWISE = {  # not allowed in --model-kwargs, and what to use instead
    "pretrained": "give --pretrained",
    "pretrained_cfg": "give --finetune FILE",
    "pretrained_cfg_overlay": "give --finetune FILE",
    "checkpoint_path": "give --finetune FILE",
    "num_classes": "the data say how many classes there are",
    "in_chans": "images have three channels",
    "features_only": "a classifier is trained",
    "name": "give --model",
    "model_name": "give --model",
    "rpe": "give --rpe",
    "rpe_config": "give --rpe",
    "attn_backend": "give --attn-backend",
}
SWITCHES = {name for name, p in inspect.signature(VisionTransformer).parameters.items() if isinstance(p.default, bool)}


def build_model(args: argparse.Namespace, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """The model of the flags ``args``; missing flags take their defaults.

    Raises: ValueError: see ``create_model``; a flag that this model cannot use.
    """
    args = argparse.Namespace(**vars(get_args_parser().parse_args([])) | vars(args))
    extra = keywords(args.model_kwargs)
    if wrong := extra.keys() & OTHERWISE.keys():
        name = min(wrong)
        raise ValueError(f"--model-kwargs {name}=...: {OTHERWISE[name]}")
    for name, value in extra.items():
        if name in SWITCHES and not isinstance(value, bool):
            raise ValueError(f"--model-kwargs {name}={value}: expected true or false")
    if extra.get("global_pool", "token") == "":
        raise ValueError("--model-kwargs global_pool='': without pooling there is one output per patch, not per image")
    height, width = image_size(args.input_size)
    size = height if height == width else (height, width)
    if extra.get("img_size", size) != size:
        raise ValueError(f"--model-kwargs img_size={extra['img_size']}: give --input-size, here {args.input_size}")
    options = dict(num_classes=num_classes, img_size=size, drop_path_rate=args.drop_path or None, pretrained=pretrained)
    if args.drop:  # as in DeiT: after the positions, and after both layers of attention and MLP
        options |= dict(pos_drop_rate=args.drop, proj_drop_rate=args.drop)
    if args.no_abs_pos:
        options["pos_embed"] = "none"
    try:
        return create_model(args.model, args.rpe, attn_backend=args.attn_backend, **options | extra)
    except UnknownArgument as error:
        if error.argument in extra or error.argument not in FLAGS:
            raise ValueError(f"--model-kwargs: {error}") from error
        flag = FLAGS[error.argument]
        raise ValueError(f"{flag}: model {args.model!r} has no such dropout; give {flag} 0") from error


def model_of_flags(args: argparse.Namespace, classes: list[str], *, weights: bool) -> nn.Module:
    """The model of ``--model`` and ``--rpe``; with ``weights``, it starts from ``--pretrained`` or ``--finetune``.

    Raises: ValueError: ``--eval`` would evaluate a class head that starts fresh.
    """
    from_timm = weights and args.pretrained and args.model not in RPE_MODELS
    model = build_model(args, len(classes), pretrained=from_timm)
    fresh = []
    if from_timm:
        names = list(model.pretrained_cfg.get("label_names") or classes)  # as in models on the Hugging Face hub
        if (trained_on := model.pretrained_cfg["num_classes"]) != len(classes):
            fresh = [f"--pretrained has {trained_on} classes, the data have {len(classes)}"]
        elif set(names) != set(classes):
            fresh = [f"--pretrained has the classes {names[0]}, ..., the data have {classes[0]}, ..."]
        else:
            reordered, notes = fit_classes(model, model.state_dict(), names, classes)
            model.load_state_dict(reordered)
            for key, what in notes.items():
                logger.info(f"--pretrained: {key} {what}")
        own = tuple(tuple(model.pretrained_cfg[name]) for name in ("mean", "std"))
        if own != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
            logger.warning(f"--pretrained: trained on pixels with mean and std {own}; here they have ImageNet's")
    elif weights and (source := starting_weights(args)):
        for key, what in start_from(model, source, classes).items():
            note = f"{'--pretrained' if args.pretrained else '--finetune'}: {key} {what}"
            logger.info(note)
            if key.startswith(head_prefixes(model)) and "starts fresh" in what:
                fresh.append(note)
    if fresh and args.eval:
        raise ValueError(f"--eval: the class head was never trained: {fresh[0]}; leave out --eval to train it")
    if hasattr(model, "set_distilled_training"):  # otherwise training would average both heads, as evaluation does
        model.set_distilled_training(args.distillation_type != "none")
    return model


def starting_weights(args: argparse.Namespace) -> str:
    """The file of ``--pretrained`` or ``--finetune``; empty for neither, and for weights that timm downloads."""
    return str(fetch(args.model)) if args.pretrained and args.model in RPE_MODELS else args.finetune


def load_classifier(model: nn.Module, checkpoint: Checkpoint, number: int, *, flag: str, key: str = "model") -> None:
    """Load all weights of a checkpoint; positions are resampled to the model's grid, and ``flag`` named in the log.

    Raises: BadCheckpoint: the class head in it has not ``number`` outputs, or a key does not fit.
    """
    source, weights = checkpoint.source, checkpoint.weights(key)
    for prefix in head_prefixes(model):
        bias = weights.get(f"{prefix}bias")
        if bias is not None and bias.numel() != number:
            has = f"its head has {bias.numel()} outputs without class names"
            more = bias.numel() > number and flag != "--teacher-path"
            how = ". To evaluate on some of its classes, put their names into it (docs/evaluate.md)" if more else ""
            raise BadCheckpoint(f"checkpoint {source}: {has}; the data have {number}{how}")
    weights, notes = resample_positions(model, weights, trained_grid(model, checkpoint), source=source)
    load_matching(model, weights, source=source)
    for key, note in notes.items():
        logger.info(f"{flag}: {key} {note}")


def build_ema(args: argparse.Namespace, model: nn.Module) -> ModelEmaV2 | None:
    """The moving average of the weights; None without ``--model-ema``."""
    if not args.model_ema:
        return None
    return ModelEmaV2(model, args.model_ema_decay, "cpu" if args.model_ema_force_cpu else None)


def build_teacher(args: argparse.Namespace, classes: list[str], device: torch.device) -> nn.Module | None:
    """The frozen ``--teacher-model`` with the weights of ``--teacher-path``, its positions resampled to the image size;
    None without distillation.
    """
    if args.distillation_type == "none":
        return None
    checkpoint = Checkpoint.read(source := args.teacher_path)
    taught = stored_classes(checkpoint)
    if taught is not None and taught != list(classes):
        check_same_classes(taught, classes, (f"--teacher-path {source}", "the training data"))
        raise ValueError(f"--teacher-path {source}: the training data have its classes in another order")
    teacher = create_model(args.teacher_model, num_classes=len(classes), img_size=image_size(args.input_size))
    load_classifier(teacher, checkpoint, len(classes), flag="--teacher-path")
    return teacher.to(device).eval().requires_grad_(False)
