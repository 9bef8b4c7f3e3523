"""DeiT with iRPE: ``create_model``, and the registration of our names with timm."""

import dataclasses

import timm
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
from torch import nn

from deit_irpe.models.finetune import load_pretrained_weights
from deit_irpe.models.names import DEMO_SIZES, RPE_MODELS
from irpe_ops import equip
from irpe_ops.equip import RPEAttention
from irpe_train.checkpoint import read_weights
from irpe_train.zoo import fetch, read_zoo


def create_model(
    name: str, rpe=None, *, rpe_config=None, attn_backend: str = "auto", pretrained: bool = False, **timm_kwargs
) -> nn.Module:
    """A DeiT, or any other timm model, with any relative position encoding or with none.

    Args:
        name: a name of ``RPE_MODELS`` or ``DEMO_SIZES``, or any model that timm knows
            (``deit_small_distilled_patch16_224``); an encoding needs a Vision Transformer.
        rpe: spec string or config; ``None`` keeps the encoding of the name (a plain name has none), ``"none"`` removes
            it.
        rpe_config: the published name of ``rpe``.
        attn_backend: passed to every attention layer (``auto``, ``eager``, ``sdpa``, ``compiled``, ``triton``).
        pretrained: start from the published checkpoint of that name; a head of other classes starts fresh.
        timm_kwargs: ``num_classes``, ``img_size`` (int or (height, width)), ``pos_embed="none"``, ...; with
            ``features_only=True`` the feature maps of blocks ``out_indices`` (default: the last three), as timm has it.
    Raises: ValueError: unknown name, malformed spec, a checkpoint that does not fit; UnknownArgument: it is a TypeError
        too: an argument that timm's model does not take.
    """
    if rpe is not None and rpe_config is not None:
        raise ValueError(f"model {name!r}: rpe={rpe!r} and rpe_config={rpe_config!r} are the same argument; give one")
    rpe = rpe_config if rpe is None else rpe
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
            raise ValueError(
                f"--rpe {spec}: model {name!r} is a {type(model).__name__}; iRPE needs a Vision Transformer"
            )
        model = equip(model, spec, backend=attn_backend)
    if from_zoo:
        path = fetch(name)
        load_pretrained_weights(model, read_weights(path), source=path)
    return model if wanted_features is None else FeatureGetterNet(model, wanted_features)


class UnknownArgument(ValueError, TypeError):
    """A wrong value of --model-kwargs, and the TypeError that callers of ``timm.create_model`` expect."""


def _plain_model(name: str, *, pretrained: bool, **timm_kwargs) -> nn.Module:
    size = DEMO_SIZES.get(name, {})
    base = "deit_tiny_patch16_224" if size else name
    if not timm.is_model(base):
        known = ", ".join([*RPE_MODELS, *DEMO_SIZES])
        raise ValueError(
            f"model {name!r}: unknown; expected one of {known}, or a model of timm such as "
            "deit_small_patch16_224 (with --rpe SPEC for an encoding)"
        )
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
    return dataclasses.replace(
        get_pretrained_cfg(base), url=published.url if published else None, hf_hub_id=None, tag=None, **crop
    )


default_cfgs = generate_default_cfgs({name: _timm_config(name) for name in [*RPE_MODELS, *DEMO_SIZES]})  # timm's name


def _entrypoint(name: str):
    def build(pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        model = create_model(name, pretrained=pretrained, **kwargs)
        vit = model.model if isinstance(model, FeatureGetterNet) else model
        vit.pretrained_cfg = vit.default_cfg = model.pretrained_cfg = get_pretrained_cfg(name).to_dict()
        return model

    build.__name__ = name
    build.__module__ = __name__
    build.__doc__ = f"{name}: see the tables in deit_irpe/models/registration.py."
    return build


for _name in [*RPE_MODELS, *DEMO_SIZES]:
    register_model(_entrypoint(_name))
register_notrace_module(RPEAttention)  # one node of a torch.fx graph: its kernels take tensors, not proxies
