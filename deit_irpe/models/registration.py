# SPDX-License-Identifier: Apache-2.0
"""DeiT with iRPE: ``create_model``, and the registration of our names with timm."""

import contextlib
import dataclasses
import difflib
import re

import timm
import torch
from timm.layers import build_sincos2d_pos_embed, to_2tuple, trunc_normal_
from timm.models import (
    Eva,
    VisionTransformer,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model_in_modules,
    model_entrypoint,
    register_model,
    register_notrace_module,
)
from timm.models._builder import resolve_pretrained_cfg  # how timm itself merges its two arguments of this name
from timm.models._features import FeatureGetterNet  # timm's own wrapper for features_only
from torch import nn

from deit_irpe.models.finetune import load_pretrained_weights, resample_positions
from deit_irpe.models.names import DEMO_SIZES, RPE_MODELS
from irpe_ops import equip
from irpe_ops.equip.timm_vit import RPEAttention
from irpe_ops.methods import import_plugins
from irpe_train.checkpoint import load_matching, read_weights
from irpe_train.errors import in_one_line
from irpe_train.logger import logger
from irpe_train.zoo import Entry, fetch, read_zoo


def create_model(
    name: str, rpe=None, *, rpe_config=None, attn_backend: str = "auto", pretrained: bool = False, **timm_kwargs
) -> nn.Module:
    """A DeiT, or any other timm model, with any relative position encoding or none.

    Args:
        name: a name of ``RPE_MODELS`` or ``DEMO_SIZES``, or any model that timm knows
            (``deit_small_distilled_patch16_224``, ``local-dir:FOLDER``); an encoding needs a Vision Transformer.
        rpe: spec string or config; ``None`` keeps the encoding of the name (a plain name has none), ``"none"`` removes
            it.
        rpe_config: the published name of ``rpe``.
        attn_backend: passed to every attention layer (``auto``, ``eager``, ``sdpa``, ``compiled``, ``triton``).
        pretrained: start from the published checkpoint of that name, or from the one in timm's ``pretrained_cfg`` or
            ``pretrained_cfg_overlay``; a head with other classes starts fresh.
        timm_kwargs: ``num_classes``, ``img_size`` (int or (height, width)), ``pos_embed="none"`` or ``"sincos"``, ...;
            ``checkpoint_path`` for weights of exactly this model; with ``features_only=True`` the feature maps of
            blocks ``out_indices`` (default: the last three), as in timm.
    Raises: ValueError: unknown name, malformed spec, a checkpoint that does not fit, a size that the model cannot take;
        UnknownArgument (also a TypeError): an argument that timm's model does not take.
    """
    if rpe is not None and rpe_config is not None:
        raise ValueError(f"model {name!r}: rpe={rpe!r} and rpe_config={rpe_config!r} are the same argument; give one")
    import_plugins()  # they may register models with timm
    rpe = rpe_config if rpe is None else rpe
    base, named_rpe = RPE_MODELS.get(name, (name, None))
    timm_kwargs = {key: value for key, value in timm_kwargs.items() if value is not None}
    checkpoint_path = timm_kwargs.pop("checkpoint_path", None)
    registered = name in RPE_MODELS or name in DEMO_SIZES
    wanted_features, config, cache_dir = None, None, None
    if registered:  # timm's builder does this for its own names; ours need the encoding in place first
        if timm_kwargs.pop("features_only", False):
            wanted_features = timm_kwargs.pop("out_indices", 3)
        given = [timm_kwargs.pop(key, None) for key in ("pretrained_cfg", "pretrained_cfg_overlay")]
        config = resolve_pretrained_cfg(name, *given).to_dict()
        cache_dir = timm_kwargs.pop("cache_dir", None)
    model = _plain_model(base, pretrained=pretrained and not registered, **timm_kwargs)
    spec = named_rpe if rpe is None else rpe
    if spec is not None and any(isinstance(module, RPEAttention) for module in model.modules()):  # saved in a folder
        raise ValueError(f"--rpe {spec}: model {name!r} has an encoding of its own; leave out --rpe")
    if spec not in (None, "none"):
        if not isinstance(model, (VisionTransformer, Eva)):  # Eva has rotary positions
            kind = type(model).__name__
            raise ValueError(f"--rpe {spec}: model {name!r} is a {kind}; iRPE needs a Vision Transformer")
        model = equip(model, spec, backend=attn_backend)
    if registered:
        model.pretrained_cfg = model.default_cfg = config
        if pretrained:
            _load_named_weights(model, name, config, cache_dir)
    if checkpoint_path is not None:
        load_matching(model, read_weights(checkpoint_path), source=checkpoint_path)
    if wanted_features is not None:
        with _named(name, {"out_indices": wanted_features}):
            model = FeatureGetterNet(model, wanted_features)
        model.pretrained_cfg = model.default_cfg = config
    return model


class UnknownArgument(ValueError, TypeError):
    """timm's model does not take this argument. A ValueError, as for any flag, and the TypeError that timm raises."""

    def __init__(self, message: str, argument: str | None):
        super().__init__(message)
        self.argument = argument


def _plain_model(name: str, *, pretrained: bool, **timm_kwargs) -> nn.Module:
    size = DEMO_SIZES.get(name, {})
    base = "deit_tiny_patch16_224" if size else name
    elsewhere = ":" in base  # local-dir:FOLDER, hf-hub:NAME
    if not elsewhere and not timm.is_model(base):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {close[0]}? Expected" if close else "expected"
        raise ValueError(
            f"model {name!r}: unknown; {hint} a timm model, such as deit_small_patch16_224 (with --rpe SPEC "
            f"for an encoding), one of IRPE_PLUGINS, or one of {', '.join([*RPE_MODELS, *DEMO_SIZES])}"
        )
    may_lack = is_model_in_modules(base, ("deit", "vision_transformer")) and "distilled" not in base
    of_plugin = not elsewhere and not model_entrypoint(base).__module__.startswith("timm.")  # it may handle this itself
    if timm_kwargs.get("pos_embed") == "none" and not may_lack and not of_plugin:
        raise ValueError(f"model {name!r}: timm cannot build it without its position embedding (--no-abs-pos)")
    fixed = timm_kwargs.get("pos_embed") == "sincos"
    if fixed:
        timm_kwargs = timm_kwargs | {"pos_embed": "learn"}
    with _named(name, size | timm_kwargs):
        model = _build(base, pretrained, size | timm_kwargs)
    if timm_kwargs.get("num_classes") and getattr(model, "num_classes", None) == 0:
        raise ValueError(f"model {name!r}: it has no class head to train; choose a model with one")
    if hasattr(model, "blocks") and not len(model.blocks):
        raise ValueError(f"model {name!r}: depth=0 leaves no block")
    if 0 in (getattr(getattr(model, "patch_embed", None), "grid_size", None) or ()):
        raise ValueError(f"model {name!r}: images of {timm_kwargs.get('img_size')} pixels are smaller than its patches")
    if base.startswith("deit_") and not pretrained:
        if getattr(model, "cls_token", None) is not None:
            trunc_normal_(model.cls_token, std=0.02)  # as DeiT was trained; timm starts at 1e-6
        if size and model.pos_embed is not None:
            # DeiT's 0.02 is tiny beside the patch embedding, and a demo has only hundreds of steps to grow it.
            trunc_normal_(model.pos_embed, std=0.5)
    if fixed:
        _fix_positions(model)
    return model


@contextlib.contextmanager
def _named(name: str, arguments: dict):
    try:
        yield
    except (UnknownArgument, ImportError, MemoryError):
        raise
    except OSError as error:  # huggingface_hub does not say what it could not load
        raise OSError(f"model {name!r}: {in_one_line(error)}") from error
    except Exception as error:  # timm's models raise AssertionError and others for sizes that do not fit
        given = ", ".join(f"{key}={value!r:.50}" for key, value in arguments.items())
        raise ValueError(
            f"model {name!r} cannot be built with these arguments ({given}): {in_one_line(error)}"
        ) from error


def _fix_positions(model: VisionTransformer) -> None:
    """Sines and cosines of rows and columns instead of learned positions; leading tokens have none (as in MAE)."""
    if model.embed_dim % 4:
        raise ValueError(f"pos_embed=sincos: expected a width divisible by 4, got {model.embed_dim}")
    waves = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), dim=model.embed_dim)  # (height * width, C)
    model.pos_embed.requires_grad_(False).zero_()
    model.pos_embed[0, -len(waves) :] = waves


def _build(name: str, pretrained: bool, timm_kwargs: dict) -> nn.Module:
    """timm's model, without ``img_size`` if it takes none. A forward pass then checks that size: only Vision
    Transformers reject a bad one when they are built.
    """
    size = timm_kwargs.get("img_size")
    try:
        model = timm.create_model(name, pretrained=pretrained, **timm_kwargs)
    except TypeError as error:
        found = re.search(r"unexpected keyword argument(?:\(s\))?\W+(\w+)", str(error))
        argument = found and found[1]
        if argument != "img_size":
            raise UnknownArgument(f"model {name!r}: {in_one_line(error)}", argument) from error
        model = _build(name, pretrained, {key: value for key, value in timm_kwargs.items() if key != "img_size"})
    if size is not None and not isinstance(model, (VisionTransformer, Eva)):
        with torch.no_grad():
            model.eval()(torch.zeros(1, timm_kwargs.get("in_chans", 3), *to_2tuple(size)))
    return model.train()


def _load_named_weights(model: nn.Module, name: str, config: dict, cache_dir) -> None:
    """Load the weights that ``config`` names: those published under ``name``, or others that the caller put there."""
    published = read_zoo().models.get(name)
    file, elsewhere = config.get("file"), config.get("source") or config.get("state_dict") or config.get("hf_hub_id")
    if elsewhere:

        def fit(weights, model):
            return resample_positions(model, weights, source=name)[0]

        timm.models.load_pretrained(model, config, model.num_classes, config["input_size"][0], fit, cache_dir=cache_dir)
        return
    if not file and not config.get("url"):
        raise ValueError(f"model {name!r}: pretrained=True, but no weights of it were published")
    if not file:
        file = fetch(name) if published and config["url"] == published.url else config["url"]
    notes = load_pretrained_weights(model, read_weights(file), source=file)
    if notes:
        changes = "; ".join(f"{key} {note}" for key, note in list(notes.items())[:3])
        logger.warning(f"model {name!r} from {file}: {changes}" + ("; ..." if len(notes) > 3 else ""))


def _timm_config(name: str, published: Entry | None):
    """timm's config of a model: its image preprocessing, and where its weights are."""
    base = RPE_MODELS[name][0] if name in RPE_MODELS else "deit_tiny_patch16_224"
    crop = dict(crop_pct=224 / 256) if name in RPE_MODELS else dict(crop_pct=1.0, input_size=(3, 32, 32))
    where = dict(url=published.url if published else None, hf_hub_id=None, tag=None)
    return dataclasses.replace(get_pretrained_cfg(base), **where, **crop)


_published = read_zoo().models
default_cfgs = generate_default_cfgs(  # timm's name
    {name: _timm_config(name, _published.get(name)) for name in [*RPE_MODELS, *DEMO_SIZES]}
)


def _entrypoint(name: str):
    def build(pretrained: bool = False, **kwargs):
        return create_model(name, pretrained=pretrained, **kwargs)

    build.__name__ = name
    build.__module__ = __name__
    build.__doc__ = f"{name}: see the table in deit_irpe/models/names.py."
    return build


for _name in [*RPE_MODELS, *DEMO_SIZES]:
    register_model(_entrypoint(_name))
register_notrace_module(RPEAttention)  # one node of a torch.fx graph: its kernels take tensors, not proxies
