# SPDX-License-Identifier: Apache-2.0
"""Puts relative position encoding into models from other libraries: one function, one file for each library."""

from torch import nn

from irpe_ops.attention import BACKENDS
from irpe_ops.config import RPEConfig, parse_rpe_spec
from irpe_ops.equip import hugging_face, multihead, timm_vit
from irpe_ops.equip.token_grid import HELP, TokenGrid
from irpe_ops.methods import whole_number

__all__ = ["TokenGrid", "equip"]


def equip(
    model: nn.Module, spec_or_config: str | RPEConfig, *, backend: str = "auto", grid: tuple[int, int] | None = None
) -> nn.Module:
    """Put iRPE into every self-attention over patches, in place.

    Args:
        model: a timm ``VisionTransformer`` or ``Eva`` (rotary positions; class, distillation and register tokens, or
            none; any grid); a Hugging Face ``transformers`` ViT, DeiT, DINOv2, DETR or RT-DETR (its encoder);
            torchvision's ``VisionTransformer``; or a ``torch.nn.TransformerEncoder`` over a grid of tokens.
        spec_or_config: a spec string or a config; its ``skip`` is replaced by the model's number of leading tokens, if
            it has one (a ``TransformerEncoder`` does not).
        backend: of `rpe_attention`; every attention keeps it as ``attn_backend``.
        grid: height and width in tokens, for a ``TransformerEncoder`` alone (default: square). If sizes change, call
            ``model.token_grid.remember(height, width)`` before each forward pass.
    Returns: ``model``. Its weights, their names and its outputs do not change (tables start at zero). Each attention
        gets ``rpe_{q,k,v}`` after its other weights, with their dtype and device.
    Raises: TypeError: for a model or spec of another type; ValueError: for a malformed spec, a model that already has
        iRPE, or one with an unknown attention (named).
    """
    config = parse_rpe_spec(spec_or_config) if isinstance(spec_or_config, str) else spec_or_config
    if not isinstance(config, RPEConfig):
        raise TypeError(f"equip: expected a spec string or a config, not a {type(config).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"equip: expected a model (torch.nn.Module), not a {type(model).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"equip: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    inner = getattr(model, "_orig_mod", model)  # the model inside torch.compile's wrapper
    name, part = next((found for found in inner.named_modules() if _is_known(found[1])), ("", None))
    if name and not hasattr(inner, "blocks"):  # with blocks, timm_vit says what is wrong with them
        raise ValueError(
            f"equip: a {type(inner).__name__} is not equipped as a whole; call equip on its {type(part).__name__}, "
            f"model.get_submodule({name!r}), before DDP wraps it"
        )
    if any(hasattr(module, "rpe_k") for module in inner.modules()):
        raise ValueError("equip: this model has iRPE already; equip a fresh model")
    if grid is not None:
        if not isinstance(inner, nn.TransformerEncoder):
            kind = type(inner).__name__
            raise ValueError(
                f"equip: grid is for a torch.nn.TransformerEncoder, not for a {kind}; leave it out. {HELP}"
            )
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            raise ValueError(f"equip: grid is (height, width) in tokens, not {grid!r}")
        grid = tuple(whole_number("equip: a side of grid", size, 1) for size in grid)
    if isinstance(inner, nn.TransformerEncoder):
        multihead.equip_encoder(inner, config, backend, grid)
    elif multihead.is_torchvision_vit(inner):
        multihead.equip_torchvision_vit(inner, config, backend)
    elif hugging_face.is_pretrained_model(inner):
        hugging_face.equip(inner, config, backend)
    else:
        timm_vit.equip(inner, config, backend)
    return model


def _is_known(model: nn.Module) -> bool:
    of_timm = {kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("timm.")}
    others = isinstance(model, nn.TransformerEncoder) or multihead.is_torchvision_vit(model)
    return others or hugging_face.is_pretrained_model(model) or not of_timm.isdisjoint(("VisionTransformer", "Eva"))
