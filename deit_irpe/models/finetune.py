"""Weights that come from another run: other resolution, other classes, other encoding."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor

HEADS = ("head.", "head_dist.")


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


def load_pretrained_weights(
    model: VisionTransformer, weights: Mapping[str, Tensor], old_grid: tuple[int, int] | None = None
) -> list[str]:
    """Start ``model`` from the weights of another run: other resolution, other classes, other encoding.

    The position embedding is resampled; a head with other classes and encodings with other tables start fresh.

    Args:
        weights: a state dict; unchanged.
        old_grid: patch grid (height, width) the weights were trained on; ``None`` for a square one.
    Returns: one line for each thing that did not carry over as it was.
    Raises: ValueError: anything else is missing, left over or of another shape; the keys are named.
    """
    own = model.state_dict()
    weights = dict(weights)
    notes = []
    if "pos_embed" in weights and "pos_embed" in own:
        new_grid = tuple(model.patch_embed.grid_size)
        tokens = weights["pos_embed"].shape[1] - model.num_prefix_tokens
        if old_grid is None or math.prod(old_grid) != tokens:
            old_grid = new_grid if tokens == math.prod(new_grid) else (math.isqrt(max(tokens, 0)),) * 2
        if math.prod(old_grid) != tokens:
            raise ValueError(
                f"pos_embed has {weights['pos_embed'].shape[1]} tokens: with {model.num_prefix_tokens} "
                "leading token(s) that is no square grid; was it trained as another model?"
            )
        if old_grid != new_grid:
            notes.append(f"pos_embed resampled from {old_grid[0]}x{old_grid[1]} to {new_grid[0]}x{new_grid[1]} patches")
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], old_grid, new_grid)
    other_shape = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    for key in filter(_may_start_fresh, other_shape):
        notes.append(f"{key} starts fresh: {tuple(weights.pop(key).shape)} there, {tuple(own[key].shape)} here")

    missing = [key for key in own if key not in weights]
    left_over = [key for key in weights if key not in own]
    wrong = [key for key in other_shape + missing + left_over if not _may_start_fresh(key)]
    if wrong:
        shown = ", ".join(wrong[:6]) + (f", ... ({len(wrong)} in all)" if len(wrong) > 6 else "")
        raise ValueError(f"these weights belong to another model; keys that differ: {shown}")
    notes += [f"{key} starts fresh: not in the weights" for key in missing if not _noted(key, notes)]
    notes += [f"{key} is not used" for key in left_over]
    model.load_state_dict({key: weights.get(key, own[key]) for key in own})
    return notes


def _may_start_fresh(key: str) -> bool:
    return key.startswith(HEADS) or ".lookup_table_" in key


def _noted(key: str, notes: list[str]) -> bool:
    return any(note.startswith(f"{key} ") for note in notes)
