# SPDX-License-Identifier: Apache-2.0
"""Hugging Face ``transformers`` models (5.9 or later; DINOv2: 5.19), through the library's own attention interface.

An equipped model asks for the attention implementation ``irpe``. Attention without encodings that shares the model's
config (a decoder's) goes to PyTorch's fused attention, as before.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from irpe_ops.attention import rpe_attention
from irpe_ops.config import RPEConfig
from irpe_ops.equip.token_grid import HELP, TokenGrid, add_encodings, why_changed
from irpe_ops.modules import IRPE, build_rpe

# Class names begin with these. The first have patches and leading tokens, the others a feature map.
_VITS = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters")
_DETRS = ("Detr", "RTDetr")


def is_pretrained_model(model: nn.Module) -> bool:
    """Whether it is a ``transformers`` model; ``transformers`` is not imported."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def equip(model: nn.Module, config: RPEConfig, backend: str) -> None:
    """Encodings for the encoder of a ViT, DeiT, DINOv2, DETR or RT-DETR, with or without its head."""
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 9):
        here = transformers.__version__
        raise ValueError(f"equip: needs transformers 5.9 or later, and {here} is here; pip install -U transformers")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("irpe", irpe_attention)
    AttentionMaskInterface.register("irpe", sdpa_mask)
    names = {type(module).__name__: module for module in model.modules()}
    family = next((name for name in (*_VITS, *_DETRS) if f"{name}Embeddings" in names or f"{name}Model" in names), "")
    family = "RTDetr" if "RTDetrAIFILayer" in names else family
    if not family:
        known = f"known are {', '.join((*_VITS, *_DETRS))}. {HELP}"
        raise ValueError(f"equip: unknown transformers model {type(model).__name__}; {known}")
    if sum(type(module).__name__.removesuffix("Embeddings") in _VITS for module in model.modules()) > 1:
        raise ValueError(f"equip: {type(model).__name__} holds several vision transformers; equip each by itself")
    # For each encoder: the module that takes its image or feature map, and its patch size.
    layer, attention, skip = f"{family}EncoderLayer", f"{family}SelfAttention", 0
    if family in _VITS:
        embeddings = names[f"{family}Embeddings"]
        tokens = [getattr(embeddings, name, None) for name in ("cls_token", "distillation_token", "register_tokens")]
        skip = sum(token.shape[1] for token in tokens if token is not None)
        layer, attention = f"{family}Layer", f"{family}Attention"
        encoders = [(model, embeddings.patch_embeddings, embeddings.patch_embeddings.patch_size)]
    elif family == "Detr":
        encoders = [(names["DetrEncoder"], names["DetrModel"].input_projection, (1, 1))]
    else:  # one for each scale that has attention
        encoders = [(part, part, (1, 1)) for part in model.modules() if type(part).__name__ == "RTDetrAIFILayer"]
    for encoder, given, patch_size in encoders:
        grid = TokenGrid(skip, varies=True)
        _add_to_layers(encoder, layer, attention, dataclasses.replace(config, skip=skip), grid, backend)
        given.register_forward_pre_hook(functools.partial(_remember, grid, patch_size))
    if not any(hasattr(module, "rpe_k") for module in model.modules()):
        raise ValueError(f"equip: this {type(model).__name__} has no {layer} to equip")
    for part in model.modules():
        if is_pretrained_model(part) and part.device.type == "meta":  # equipped inside from_pretrained
            part._init_weights = functools.partial(_init_weights, part._init_weights)
    model.set_attn_implementation({"": "irpe"})


def _add_to_layers(
    model: nn.Module, layer_name: str, attention_name: str, config: RPEConfig, grid: TokenGrid, backend: str
) -> None:
    found = {}
    for layer in model.modules():
        if any(kind.__name__ == layer_name for kind in type(layer).__mro__):
            inside = [module for module in layer.modules() if type(module).__name__ == attention_name]
            reason = why_changed(inside[0]) if len(inside) == 1 else f"expected one {attention_name}, got {len(inside)}"
            if not reason and not hasattr(inside[0], "o_proj"):
                reason = "it has no o_proj, as it has in transformers 5.19 and later; pip install -U transformers"
            elif not reason and not isinstance(inside[0].o_proj.weight, Tensor):
                reason = f"its o_proj is not a torch.nn.Linear but of {type(inside[0].o_proj).__module__}"
            if reason:
                raise ValueError(f"equip: the attention of a {type(layer).__name__}: {reason}. {HELP}")
            found[layer] = inside[0]
    for layer, attention in found.items():
        grid.follow(layer)
        heads = attention.o_proj.in_features // attention.head_dim
        add_encodings(attention, attention.o_proj.weight, build_rpe(config, attention.head_dim, heads), grid, backend)
        attention.config._attn_implementation = {"": "irpe"}  # a ViT inside another model has its own config
        attention.register_forward_pre_hook(_refuse_other_attention)


def _refuse_other_attention(attention: nn.Module, inputs: tuple) -> None:
    """Any other attention function of ``transformers`` would silently drop the encodings."""
    if (name := attention.config._attn_implementation) != "irpe":
        raise ValueError(
            f"equipped attention: the model was set to the attention implementation {name!r}, which leaves encodings "
            "out; call set_attn_implementation({'': 'irpe'})"
        )


def irpe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of ``transformers``: three ``(B, H, L, D)`` to one ``(B, L, H, D)``, and no weights."""
    if not hasattr(module, "rpe_k"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    height, width = module.grid.of(query.shape[2])
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = ~attention_mask  # True is *kept* there
    encodings = (module.rpe_q, module.rpe_k, module.rpe_v)
    options = dict(attn_mask=attention_mask, dropout_p=dropout, scale=scaling, backend=module.attn_backend)
    out = rpe_attention(query, key, value, *encodings, height=height, width=width, **options)
    return out.transpose(1, 2).contiguous(), None


def _init_weights(others: Callable[[nn.Module], None], module: nn.Module) -> None:
    """``from_pretrained`` calls this for modules that the checkpoint lacks; it would leave tables uninitialized."""
    if isinstance(module, IRPE):
        module.reset_parameters()
    else:
        others(module)


def _remember(grid: TokenGrid, patch_size: tuple[int, int], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of a module that takes ``(B, C, height, width)``: remember its grid of patches."""
    grid.remember(*(side // of for side, of in zip(inputs[0].shape[-2:], patch_size, strict=True)))
