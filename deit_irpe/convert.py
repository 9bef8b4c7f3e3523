# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint from other code: rename its entries, and check them against the model.

    python -m deit_irpe.convert theirs.pth ours.pth --model deit_tiny_patch16_224 --rpe SPEC [--prefix backbone.]
    python -m deit_irpe.convert ours.pth plain.pth --model deit_tiny_patch16_224 --drop-zero-tables

For code with the published encoding in its own DeiT or timm ViT: only names change.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deit_irpe.args import image_size, image_size_text
from deit_irpe.data.classes import stored_classes
from deit_irpe.models import create_model
from deit_irpe.models.finetune import head_prefixes
from irpe_train.checkpoint import Checkpoint, load_matching, write_checkpoint
from irpe_train.errors import BadCheckpoint, some
from irpe_train.flags import FlagParser
from irpe_train.launch import launch
from irpe_train.outputs import refuse_existing


def convert(
    weights: Mapping[str, Tensor],
    *,
    source: str | Path = "given as a dict",
    prefix: str = "",
    renames: Sequence[tuple[str, str]] = (),
    drop_zero_tables: bool = False,
) -> dict[str, Tensor]:
    """Rename the entries of a state dict; those without ``prefix`` are left out.

    Args:
        source: where they are from, for messages. prefix: cut off the front of each name.
        renames: (old, new) parts of names, replaced in this order, after the prefix.
        drop_zero_tables: leave out the encodings. Their tables must be zero, so that the plain model computes the same.
    Raises: BadCheckpoint: nothing has the prefix, two entries get the same name, or a table is not zero.
    """
    converted = {}
    for name, value in weights.items():
        if not name.startswith(prefix):
            continue
        new = name.removeprefix(prefix)
        for old, by in renames:
            new = new.replace(old, by)
        if drop_zero_tables and ".lookup_table_" in new:
            if value.any():
                raise BadCheckpoint(f"checkpoint {source}: {name} is not zero: the plain model would differ")
            continue
        if new in converted:
            raise BadCheckpoint(
                f"checkpoint {source}: two entries would be called {new}, the second is {name}; change --rename"
            )
        converted[new] = value
    if not converted:
        raise BadCheckpoint(f"checkpoint {source}: no entry begins with {prefix!r}; there are {some(weights)}")
    return converted


def main(args: argparse.Namespace) -> None:
    """Convert a file and write it, with the flags that build its model. Raises RunError: the file exists already."""
    refuse_existing(args.out, "OURS.pth")
    checkpoint = Checkpoint.read(args.source)
    stored = checkpoint.weights(args.key)
    how = dict(prefix=args.prefix, renames=args.rename, drop_zero_tables=args.drop_zero_tables)
    weights = convert(stored, source=args.source, **how)
    size = image_size(args.input_size)
    with torch.device("meta"):
        head = f"{head_prefixes(create_model(args.model, args.rpe, img_size=size))[0]}weight"
    if head not in weights or weights[head].ndim != 2:
        raise BadCheckpoint(f"checkpoint {args.source}: no class head ({head}) in it; expected a classifier")
    num_classes = len(weights[head])
    model = create_model(args.model, args.rpe, num_classes=num_classes, img_size=size)
    load_matching(model, weights, source=args.source)
    flags = argparse.Namespace(model=args.model, rpe=args.rpe, input_size=args.input_size, nb_classes=num_classes)
    classes = stored_classes(checkpoint)
    write_checkpoint({"model": weights, "args": flags} | ({"classes": classes} if classes else {}), args.out)
    tables = sum(".lookup_table_" in name for name in weights)
    print(f"{args.out}: {len(weights)} of {len(stored)} entries, {tables} of them tables; they fit {args.model}")


def _rename(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (equals and old):
        raise argparse.ArgumentTypeError(f"expected OLD=NEW, got {text!r}")
    return old, new


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser("python -m deit_irpe.convert", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="THEIRS.pth", help="a state dict, or a checkpoint that holds one")
    add("out", type=Path, metavar="OURS.pth")
    add("--model", required=True, metavar="NAME", help="which model it is")
    add("--rpe", default=None, metavar="SPEC", help="its encoding, if the model name does not say")
    add("--input-size", default=224, type=image_size_text, metavar="N|HxW", help="pixels it was trained on")
    add("--key", default="model", help="the checkpoint's key for the weights (default: model)")
    add("--prefix", default="", help="cut off the front of each name, e.g. backbone.")
    add("--rename", action="append", default=[], type=_rename, metavar="OLD=NEW", help="edit names; may be repeated")
    add("--drop-zero-tables", action="store_true", help="make it a plain model; refused if a table was trained")
    return parser


if __name__ == "__main__":
    launch(main, get_args_parser())
