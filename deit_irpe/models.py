"""DeiT with iRPE: the table of names, create_model, and weights that come from another run."""

import dataclasses
import math
from collections.abc import Mapping

import timm
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import (
    VisionTransformer,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model_in_modules,
    register_model,
    register_notrace_module,
)
from timm.models._features import FeatureGetterNet  # what timm itself wraps a ViT with for features_only
from torch import Tensor, nn

from irpe_ops import equip
from irpe_ops.equip import RPEAttention
from irpe_train.checkpoint import model_weights, read_checkpoint
from irpe_train.zoo import fetch, read_zoo

# Every published name in full: the plain DeiT it starts from and the encoding it carries.
RPE_MODELS = {
    # 7 x 7 buckets and one for the class token = 50
    "deit_tiny_patch16_224_ctx_product_50_shared_k": ("deit_tiny_patch16_224", "rpe-1.9-product-ctx-1-k"),
    "deit_tiny_patch16_224_ctx_product_50_shared_qk": ("deit_tiny_patch16_224", "rpe-1.9-product-ctx-1-qk"),
    "deit_tiny_patch16_224_ctx_product_50_shared_qkv": ("deit_tiny_patch16_224", "rpe-1.9-product-ctx-1-qkv"),
    "deit_small_patch16_224_ctx_product_50_shared_k": ("deit_small_patch16_224", "rpe-1.9-product-ctx-1-k"),
    "deit_small_patch16_224_ctx_product_50_shared_qk": ("deit_small_patch16_224", "rpe-1.9-product-ctx-1-qk"),
    "deit_small_patch16_224_ctx_product_50_shared_qkv": ("deit_small_patch16_224", "rpe-1.9-product-ctx-1-qkv"),
    "deit_base_patch16_224_ctx_product_50_shared_k": ("deit_base_patch16_224", "rpe-1.9-product-ctx-1-k"),
    "deit_base_patch16_224_ctx_product_50_shared_qk": ("deit_base_patch16_224", "rpe-1.9-product-ctx-1-qk"),
    "deit_base_patch16_224_ctx_product_50_shared_qkv": ("deit_base_patch16_224", "rpe-1.9-product-ctx-1-qkv"),
    # 20, 51 and 56 are the buckets that a 14 x 14 grid really uses; the tables have 82, 134 and 2 x 82 rows
    "deit_small_patch16_224_ctx_euc_20_shared_k": ("deit_small_patch16_224", "rpe-20-euc-ctx-1-k"),
    "deit_small_patch16_224_ctx_quant_51_shared_k": ("deit_small_patch16_224", "rpe-33-quant-ctx-1-k"),
    "deit_small_patch16_224_ctx_cross_56_shared_k": ("deit_small_patch16_224", "rpe-20-cross-ctx-1-k"),
}

# Sizes that timm does not know: the model of the embedded demo data (8 x 8 tokens, trains in minutes on two cores).
DEMO_SIZES = {
    "deit_demo_patch4_32": dict(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4),
}

HEADS = ("head.", "head_dist.")


def create_model(name: str, rpe=None, *, attn_backend: str = "auto", pretrained: bool = False,
                 **timm_kwargs) -> nn.Module:
    """A DeiT, or any other timm model, with any relative position encoding or with none.

    Args:
        name: a name of ``RPE_MODELS`` or ``DEMO_SIZES``, or any model that timm knows
            (``deit_small_distilled_patch16_224``); an encoding needs a Vision Transformer.
        rpe: spec string or config; ``None`` keeps the encoding of the name (a plain name has none), ``"none"`` removes
            it.
        attn_backend: passed to every attention layer (``auto``, ``eager``, ``compiled``, ``triton``).
        pretrained: start from the published checkpoint of that name; a head of other classes starts fresh.
        timm_kwargs: ``num_classes``, ``img_size`` (int or (height, width)), ``pos_embed="none"``, ...; with
            ``features_only=True`` the feature maps of blocks ``out_indices`` (default: the last three), as timm has it.
    Raises: ValueError: unknown name, malformed spec, a checkpoint that does not fit; UnknownArgument: it is a TypeError
        too: an argument that timm's model does not take.
    """
    base, named_rpe = RPE_MODELS.get(name, (name, None))
    from_zoo = pretrained and name in RPE_MODELS
    timm_kwargs = {key: value for key, value in timm_kwargs.items() if value is not None}
    wanted_features = None
    if timm_kwargs.get("features_only") and name in RPE_MODELS | DEMO_SIZES:  # wrapped when its weights are loaded
        del timm_kwargs["features_only"]
        wanted_features = timm_kwargs.pop("out_indices", 3)
    model = _plain_model(base, pretrained=pretrained and not from_zoo, **timm_kwargs)
    spec = named_rpe if rpe is None else rpe
    if spec not in (None, "none"):
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"--rpe {spec}: model {name!r} is a {type(model).__name__}; iRPE needs a Vision "
                             "Transformer")
        model = equip(model, spec, backend=attn_backend)
    if from_zoo:
        path = fetch(name)
        load_pretrained_weights(model, model_weights(read_checkpoint(path), source=path))
    return model if wanted_features is None else FeatureGetterNet(model, wanted_features)


class UnknownArgument(ValueError, TypeError):
    """A wrong value of --model-kwargs, and the TypeError that callers of ``timm.create_model`` expect."""


def _plain_model(name: str, *, pretrained: bool, **timm_kwargs) -> nn.Module:
    size = DEMO_SIZES.get(name, {})
    base = "deit_tiny_patch16_224" if size else name
    if not timm.is_model(base):
        known = ", ".join([*RPE_MODELS, *DEMO_SIZES])
        raise ValueError(f"model {name!r}: unknown; expected one of {known}, or a model of timm such as "
                         "deit_small_patch16_224 (with --rpe SPEC for an encoding)")
    is_vit = is_model_in_modules(base, ("deit", "vision_transformer"))
    if timm_kwargs.get("pos_embed") == "none" and ("distilled" in base or not is_vit):
        raise ValueError(f"model {name!r}: timm cannot build it without its position embedding (--no-abs-pos)")
    if not is_vit:
        timm_kwargs.pop("img_size", None)  # convolutions take any size
    try:
        model = timm.create_model(base, pretrained=pretrained, **(size | timm_kwargs))
    except TypeError as error:
        raise UnknownArgument(f"model {name!r}: {error} (--model-kwargs)") from error
    if base.startswith("deit_") and not pretrained:
        trunc_normal_(model.cls_token, std=0.02)  # as DeiT was trained; timm's own start is 1e-6
        if size and model.pos_embed is not None:
            # DeiT's 0.02 is lost beside the patch embedding, and a demo has hundreds of steps to mend that.
            trunc_normal_(model.pos_embed, std=0.5)
    return model


def _timm_config(name: str):
    """What timm keeps of a model beside its code: how images are prepared for it, and where its weights are."""
    base = RPE_MODELS[name][0] if name in RPE_MODELS else "deit_tiny_patch16_224"
    published = read_zoo().models.get(name)
    crop = dict(crop_pct=224 / 256) if name in RPE_MODELS else dict(crop_pct=1.0, input_size=(3, 32, 32))
    return dataclasses.replace(get_pretrained_cfg(base), url=published.url if published else None, hf_hub_id=None,
                               tag=None, **crop)


default_cfgs = generate_default_cfgs({name: _timm_config(name) for name in [*RPE_MODELS, *DEMO_SIZES]})  # timm's name


def _entrypoint(name: str):
    def build(pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        model = create_model(name, pretrained=pretrained, **kwargs)
        vit = model.model if isinstance(model, FeatureGetterNet) else model
        vit.pretrained_cfg = vit.default_cfg = model.pretrained_cfg = get_pretrained_cfg(name).to_dict()
        return model

    build.__name__ = name
    build.__module__ = __name__
    build.__doc__ = f"{name}: see the tables in deit_irpe/models.py."
    return build


for _name in [*RPE_MODELS, *DEMO_SIZES]:
    register_model(_entrypoint(_name))
register_notrace_module(RPEAttention)  # one node of a torch.fx graph: its kernels take tensors, not proxies


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


def load_pretrained_weights(model: VisionTransformer, weights: Mapping[str, Tensor],
                            old_grid: tuple[int, int] | None = None) -> list[str]:
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
            raise ValueError(f"pos_embed has {weights['pos_embed'].shape[1]} tokens: with {model.num_prefix_tokens} "
                             "leading token(s) that is no square grid; was it trained as another model?")
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
