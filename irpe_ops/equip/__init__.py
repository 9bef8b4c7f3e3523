# SPDX-License-Identifier: Apache-2.0
"""Puts relative position encoding into models from other libraries: one function, one file for each library."""

from torch import nn

from irpe_ops.attention import BACKENDS
from irpe_ops.config import RPEConfig, parse_rpe_spec
from irpe_ops.equip import hugging_face, multihead, timm_vit
from irpe_ops.equip.token_grid import TokenGrid

__all__ = ["TokenGrid", "equip"]


def equip(
    model: nn.Module, spec_or_config: str | RPEConfig, *, backend: str = "auto", grid: tuple[int, int] | None = None
) -> nn.Module:
    """Put iRPE into every self-attention over patches, in place.

    Args:
        model: a timm ``VisionTransformer`` or ``Eva`` (rotary positions; class, distillation and register tokens, or
            none; any grid); of Hugging Face ``transformers`` ViT, DeiT, DINOv2, DETR and RT-DETR (their encoders); of
            torchvision ``VisionTransformer``; or a ``torch.nn.TransformerEncoder`` over a grid of tokens.
        spec_or_config: a spec string or a config; its ``skip`` gives way to the model's number of leading tokens, where
            the model has such a number (a ``TransformerEncoder`` has none).
        backend: of `rpe_attention`; every attention keeps it as ``attn_backend``.
        grid: height and width in tokens, for a ``TransformerEncoder`` alone (default: square). Where sizes change, tell
            ``model.token_grid.remember(height, width)`` before each forward pass.
    Returns: ``model``. Weights, their names and (tables start at zero) outputs are what they were; the tables come as
        ``rpe_{q,k,v}`` of each attention, after its other weights, with their dtype and device.
    Raises: TypeError: for a spec of another type; ValueError: for a malformed spec, a model with iRPE already in it,
        and models with an unknown attention, which it names.
    """
    config = parse_rpe_spec(spec_or_config) if isinstance(spec_or_config, str) else spec_or_config
    if not isinstance(config, RPEConfig):
        raise TypeError(f"equip: expected a spec string or a config, not a {type(config).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"equip: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    inner = getattr(model, "_orig_mod", model)  # of a model that torch.compile has wrapped
    if grid is not None and not isinstance(inner, nn.TransformerEncoder):
        raise ValueError(f"equip: grid is for a torch.nn.TransformerEncoder, not for a {type(inner).__name__}")
    if grid is not None:
        sizes = grid if isinstance(grid, (tuple, list)) else ()
        if [type(size) for size in sizes] != [int, int] or min(sizes) < 1:
            raise ValueError(f"equip: grid is (height, width) in tokens, not {grid!r}")
    if isinstance(inner, nn.TransformerEncoder):
        multihead.equip_encoder(inner, config, backend, grid)
    elif multihead.is_torchvision_vit(inner):
        multihead.equip_torchvision_vit(inner, config, backend)
    elif hugging_face.is_pretrained_model(inner):
        hugging_face.equip(inner, config, backend)
    else:
        timm_vit.equip(inner, config, backend)
    return model
