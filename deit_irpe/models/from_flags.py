# SPDX-License-Identifier: Apache-2.0
"""The model that a command line stands for."""

import argparse
import inspect

from timm.models import VisionTransformer
from torch import nn

from deit_irpe.args import get_args_parser, image_size, keywords
from deit_irpe.models.registration import UnknownArgument, create_model

FLAGS = {"drop_path_rate": "--drop-path", "pos_drop_rate": "--drop", "proj_drop_rate": "--drop"}  # of timm's arguments
OTHERWISE = {  # what --model-kwargs may not say, because it is said elsewhere
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
SWITCHES = {
    name for name, one in inspect.signature(VisionTransformer).parameters.items() if isinstance(one.default, bool)
}


def build_model(args: argparse.Namespace, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """The model of the flags ``args``; those that are missing have their default.

    Raises: ValueError: see ``create_model``; a flag that this model has no use for.
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
        raise ValueError("--model-kwargs global_pool='': without pooling there is one answer a patch, not an image")
    size = image_size(args.input_size)
    if extra.get("img_size", size) != size:
        raise ValueError(f"--model-kwargs img_size={extra['img_size']}: give --input-size, here {args.input_size}")
    options = dict(num_classes=num_classes, img_size=size, drop_path_rate=args.drop_path or None)
    if args.drop:  # where DeiT has it: after the positions, and after both layers of attention and MLP
        options |= dict(pos_drop_rate=args.drop, proj_drop_rate=args.drop)
    if args.no_abs_pos:
        options["pos_embed"] = "none"
    try:
        return create_model(
            args.model, args.rpe, attn_backend=args.attn_backend, pretrained=pretrained, **options | extra
        )
    except UnknownArgument as error:
        if error.argument in extra or error.argument not in FLAGS:
            raise ValueError(f"--model-kwargs: {error}") from error
        flag = FLAGS[error.argument]
        raise ValueError(f"{flag}: model {args.model!r} has no such dropout; give {flag} 0") from error
