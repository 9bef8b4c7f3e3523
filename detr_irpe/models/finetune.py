# SPDX-License-Identifier: Apache-2.0
"""Start a DETR from a checkpoint of another data set: all but the class head, and as many queries as fit."""

from pathlib import Path

import torch
from torch import Tensor, nn

from irpe_train.checkpoint import load_matching

QUERIES = "query_embed.weight"
MAY_START_FRESH = ("class_embed.", "bbox_attention.", "mask_head.")


def load_for_finetuning(
    model: nn.Module, weights: dict[str, Tensor], *, source: str | Path, same_classes: bool = True
) -> dict[str, str]:
    """Fill ``model`` with the ``weights`` that fit, and report on the rest.

    * The class head starts fresh if the classes, or their number, differ.
    * The first queries are kept if there are fewer now; additional ones start fresh.
    * Lookup tables that the checkpoint lacks start at zero: the model computes the same as without them.
    * A mask head that the checkpoint lacks starts fresh; keys may or may not have the prefix ``detr.`` of ``--masks``.

    Args:
        weights: state dict of a DETR.
        source: where it is from, for messages.
        same_classes: whether each class here has the same number there.
    Returns: a note on each key that was not simply copied; see ``load_matching``.
    Raises: BadCheckpoint: any other key does not fit; nothing is loaded then.
    """
    own = model.state_dict()
    ours = {key.removeprefix("detr."): key for key in own}
    weights = {ours.get(bare := key.removeprefix("detr."), bare): value for key, value in weights.items()}
    report = {}
    if not same_classes:
        head = [key for key in own if key.removeprefix("detr.").startswith("class_embed.")]
        weights = {key: value for key, value in weights.items() if key not in head}
        report = dict.fromkeys(head, "starts fresh: different classes there")
    queries = ours[QUERIES]
    given, here = weights.get(queries), own[queries]
    if given is not None and given.shape != here.shape and given.shape[1:] == here.shape[1:]:
        kept = min(len(given), len(here))
        weights[queries] = torch.cat([given[:kept].to(here), here[kept:]])
        report[queries] = f"keeps the first {kept} of {len(given)} queries there, {len(here)} here"
        report[queries] += ", others start fresh" if len(here) > kept else ""
    for key, value in own.items():
        if "lookup_table" in key and key not in weights:
            weights[key] = torch.zeros_like(value)
            report[key] = "starts at zero: not in the checkpoint"

    def fresh(key: str) -> bool:
        return key.removeprefix("detr.").startswith(MAY_START_FRESH)

    return load_matching(model, weights, source=source, may_start_fresh=fresh) | report
