# SPDX-License-Identifier: Apache-2.0
"""Weights from a run with another resolution, other classes or another encoding."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

from deit_irpe.args import image_size
from deit_irpe.data.classes import stored_classes
from irpe_train.checkpoint import Checkpoint, load_matching
from irpe_train.errors import BadCheckpoint


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the class heads' keys: from the model's timm config, and DeiT's second head."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return *(f"{name}." for name in ([named] if isinstance(named, str) else named)), "head_dist."


def resize_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embedding of one patch grid, resampled to another (bicubic, as DeiT does for higher resolutions).

    Args:
        pos_embed: ``(1, skip + old_height * old_width, C)``; leading tokens (class, distillation) keep theirs.
        old_grid, new_grid: (height, width) in patches.
    Returns: ``(1, skip + new_height * new_width, C)``.
    """
    if old_grid == new_grid:
        return pos_embed
    skip = pos_embed.shape[1] - math.prod(old_grid)
    leading, patches = pos_embed[:, :skip], pos_embed[:, skip:]
    patches = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, C, H, W)
    patches = F.interpolate(patches.float(), size=new_grid, mode="bicubic", align_corners=False).to(pos_embed.dtype)
    return torch.cat([leading, patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def fit_classes(
    model: nn.Module, weights: Mapping[str, Tensor], theirs: list[str] | None, ours: list[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights with class heads for the classes ``ours``, in that order; heads for other classes are left out.

    Args: theirs: the classes of ``weights``; None if unknown; the heads then stay unchanged.
    Returns: a new state dict, and a note on each changed key.
    """
    keys = [key for key in weights if key.startswith(head_prefixes(model))]
    if theirs is None or theirs == list(ours):
        return dict(weights), {}
    if set(theirs) != set(ours):
        notes = dict.fromkeys(keys, f"starts fresh: different classes, {len(theirs)} there, {len(ours)} here")
        return {key: value for key, value in weights.items() if key not in keys}, notes
    order = [theirs.index(name) for name in ours]
    keys = [key for key in keys if weights[key].shape[:1] == (len(order),)]  # others are not heads of these classes
    notes = dict.fromkeys(keys, "is reordered to match the classes of the data")
    return {key: value[order] if key in keys else value for key, value in weights.items()}, notes


def start_from(model: nn.Module, source: str, classes: list[str]) -> dict[str, str]:
    """Start ``model``, whose outputs are ``classes``, from the checkpoint ``source``: see ``load_pretrained_weights``.

    Returns: a note on each key that was not copied unchanged.
    """
    checkpoint = Checkpoint.read(source)
    weights, notes = fit_classes(model, checkpoint.weights(), stored_classes(checkpoint), classes)
    return load_pretrained_weights(model, weights, trained_grid(model, checkpoint), source=source) | notes


def trained_grid(model: nn.Module, checkpoint: Checkpoint) -> tuple[int, int] | None:
    """The patch grid (height, width) that a checkpoint was trained on; None if it, or the model, does not say."""
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        sides, patch = image_size(checkpoint.contents["args"].input_size), model.patch_embed.patch_size
        return sides[0] // patch[0], sides[1] // patch[1]
    return None


def resample_positions(
    model: nn.Module, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None = None, *, source: str | Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``weights`` with the position embedding for the grid of ``model``, and a note if it was resampled.

    Args: see ``load_pretrained_weights``.
    Raises: BadCheckpoint: the positions do not form a grid.
    """
    weights = dict(weights)
    notes = {}
    if "pos_embed" in weights and isinstance(model, (VisionTransformer, Eva)):
        new_grid = tuple(model.patch_embed.grid_size)
        leading = 0 if model.no_embed_class else model.num_prefix_tokens  # DeiT-III adds positions only to patches
        shape = tuple(weights["pos_embed"].shape)
        tokens = shape[1] - leading if len(shape) == 3 and shape[0] == 1 else 0
        if old_grid is None or min(old_grid) < 1 or math.prod(old_grid) != tokens:
            old_grid = new_grid if tokens == math.prod(new_grid) else (math.isqrt(max(tokens, 0)),) * 2
        if tokens < 1 or math.prod(old_grid) != tokens:
            why = f"with {leading} leading token(s) that is not a square grid; was it trained as another model?"
            raise BadCheckpoint(f"checkpoint {source}: pos_embed is {shape}: {why}")
        if old_grid != new_grid:
            notes["pos_embed"] = f"resampled from {old_grid[0]}x{old_grid[1]} to {new_grid[0]}x{new_grid[1]} patches"
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], old_grid, new_grid)
    return weights, notes


def load_pretrained_weights(
    model: nn.Module, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None = None, *, source: str | Path
) -> dict[str, str]:
    """Start ``model`` from a run with another resolution, other classes or another encoding.

    The position embedding is resampled, or left out where it is fixed; a head with other classes and encodings with
    other tables start fresh.

    Args:
        model: any timm model; positions are resampled for Vision Transformers.
        weights: a state dict; unchanged.
        old_grid: patch grid (height, width) the weights were trained on; ``None``: a square one.
        source: where they are from, for messages.
    Returns: a note on each key that was not copied unchanged; see ``load_matching``.
    Raises: BadCheckpoint: any other key (named) is missing, unexpected or of another shape.
    """
    weights, notes = resample_positions(model, weights, old_grid, source=source)
    positions = getattr(model, "pos_embed", None)
    fixed = isinstance(positions, nn.Parameter) and not positions.requires_grad  # pos_embed=sincos
    if fixed and weights.pop("pos_embed", None) is not None:
        notes = {"pos_embed": "is not used: the positions here are fixed"}

    def fresh(key: str) -> bool:
        return key.startswith(head_prefixes(model)) or ".lookup_table_" in key or fixed and key == "pos_embed"

    return load_matching(model, weights, source=source, may_start_fresh=fresh) | notes
