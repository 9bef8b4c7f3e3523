"""Start a DETR from a checkpoint of another data set: all but the class head, and the queries as far as they go."""

import torch
from torch import Tensor, nn

from irpe_train.errors import BadCheckpoint

CLASS_HEAD = ("class_embed.weight", "class_embed.bias")
QUERIES = "query_embed.weight"


def load_for_finetuning(model: nn.Module, weights: dict[str, Tensor], *, source: str = "--finetune") -> list[str]:
    """Fill ``model`` with what of ``weights`` fits it, and say what became of the rest.

    * The class head starts fresh when the number of classes differs.
    * Of the queries the first ones are taken when there are fewer of them now; further ones start fresh.
    * Lookup tables that the checkpoint lacks start at zero: the model computes what it did without them.
    * A mask head that the checkpoint lacks starts fresh; keys may or may not have the prefix ``detr.`` of ``--masks``.

    Args:
        weights: state dict of a DETR.
    Returns: one line for each key that was not simply copied, and one that counts those that were.
    Raises: BadCheckpoint: any other key is missing or has another shape; nothing is loaded then.
    """
    own = model.state_dict()
    weights = {key.removeprefix("detr."): value for key, value in weights.items()}
    filled, report, wrong = {}, [], []
    for key, value in own.items():
        name = key.removeprefix("detr.")
        given = weights.pop(name, None)
        if given is not None and given.shape == value.shape:
            filled[key] = given
        elif given is not None and name in CLASS_HEAD:
            report.append(f"{key}: starts fresh, {value.shape[0]} outputs here and {given.shape[0]} in the checkpoint")
        elif given is not None and name == QUERIES and given.shape[1] == value.shape[1]:
            kept = min(len(given), len(value))
            filled[key] = torch.cat([given[:kept].to(value), value[kept:]])
            report.append(f"{key}: the first {kept} of {len(given)} queries in the checkpoint, {len(value)} here")
        elif given is None and "lookup_table" in name:
            filled[key] = torch.zeros_like(value)
            report.append(f"{key}: not in the checkpoint, starts at zero")
        elif given is None and name.startswith(("bbox_attention.", "mask_head.")):
            report.append(f"{key}: not in the checkpoint, starts fresh")
        else:
            there = "nothing" if given is None else tuple(given.shape)
            wrong.append(f"{key}: {tuple(value.shape)} here, {there} there")
    if wrong:
        raise BadCheckpoint(
            f"{source}: {len(wrong)} entries of the checkpoint do not fit, the first: "
            f"{'; '.join(wrong[:5])}. Only classes and queries may differ: give the flags it was "
            "trained with (--backbone, --hidden_dim, --enc_rpe2d, ...)."
        )
    report += [f"{key}: in the checkpoint only, left out" for key in weights if not key.endswith("num_batches_tracked")]
    model.load_state_dict(own | filled)
    return [f"{len(filled)} of {len(own)} entries taken from {source}", *report]
