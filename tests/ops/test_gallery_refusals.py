"""What equip refuses, and what it says."""

import re

import numpy as np
import pytest
import timm
import torch
from torch import nn

from irpe_ops import build_rpe, equip, parse_rpe_spec
from tests.helpers.gallery import (
    SPEC,
    attentions,
    encoder,
    hugging_face,
    hugging_face_detr,
    hugging_face_rt_detr,
    make,
    rotary,
    torchvision_vit,
)


class TransformerEncoder(nn.Module):
    """Of the same name as torch's, as DETR has it."""


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: hugging_face("BeitForImageClassification"), "unknown transformers model BeitForImageClassification"),
        (
            lambda: torch.ao.quantization.quantize_dynamic(hugging_face("ViTForImageClassification"), {nn.Linear}),
            "its o_proj is not a torch.nn.Linear but of torch.ao.nn.quantized",
        ),
        (lambda: hugging_face_detr().model.encoder, "unknown transformers model DetrEncoder"),
        (lambda: hugging_face("ViTForImageClassification", num_hidden_layers=0), "has no ViTLayer to equip"),
        (lambda: hugging_face_rt_detr(encoder_layers=0), "has no RTDetrEncoderLayer to equip"),
        (lambda: nn.TransformerEncoder(nn.Identity(), 1), "a layer is a Identity, not a torch.nn.TransformerEncoder"),
        (
            lambda: nn.Transformer(16, 2),
            r"a Transformer is not equipped as a whole; call equip on its TransformerEncoder, .*\('encoder'\)",
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2), torchvision_vit()), r"its VisionTransformer, .*get_submodule\('1'\)"),
        (lambda: nn.Sequential(TransformerEncoder()), "Sequential has no blocks"),
        (lambda: timm.create_model("resnet18"), "ResNet has no blocks"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer has no blocks"),
    ],
)
def test_what_cannot_be_equipped_says_why(build, words):
    with pytest.raises(ValueError, match=words):
        equip(build(), SPEC)


def test_an_older_transformers_is_told(monkeypatch):
    model = hugging_face("ViTForImageClassification")
    attention = next(module for module in model.modules() if type(module).__name__ == "ViTAttention")
    attention.projection = attention._modules.pop("o_proj")  # as it was
    with pytest.raises(ValueError, match="attention of a ViTLayer: it has no o_proj.*pip install -U transformers"):
        equip(model, SPEC)
    monkeypatch.setattr("transformers.__version__", "5.8.1")
    with pytest.raises(ValueError, match="needs transformers 5.9 or later, and 5.8.1 is here; pip install -U"):
        equip(hugging_face("ViTForImageClassification"), SPEC)


@pytest.mark.parametrize("grid", [3, "34", (3, 4, 1)])
def test_a_grid_is_two_numbers_of_tokens(grid):
    with pytest.raises(ValueError, match=re.escape(f"equip: grid is (height, width) in tokens, not {grid!r}")):
        equip(encoder(), SPEC, grid=grid)


@pytest.mark.parametrize("side", [0, 3.0, True, "3", np.float64(3), np.array([3, 4]), torch.tensor(3.0)])
def test_sides_of_a_grid_are_whole_numbers(side):
    wanted = re.escape(f"must be an integer of at least 1, not {side!r}")
    with pytest.raises(ValueError, match=f"equip: a side of grid {wanted}"):
        equip(encoder(), SPEC, grid=(side, 4))
    with pytest.raises(ValueError, match=f"rpe_k: height {wanted}"):
        build_rpe(parse_rpe_spec(SPEC), 8, 2)[1](torch.zeros(1, 2, 12, 8), side, 4)


def test_an_encoder_without_layers_is_refused():
    empty = torchvision_vit()
    empty.encoder.layers = nn.Sequential()
    for model in (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16), 0), empty):
        with pytest.raises(ValueError, match="this model has no layers"):
            equip(model, SPEC)


def test_attention_with_a_learned_key_is_refused():
    model = encoder()
    model.layers[1].self_attn = nn.MultiheadAttention(16, 2, add_bias_kv=True, batch_first=True)
    with pytest.raises(ValueError, match="it attends to a learned or zero key"):
        equip(model, SPEC)
    assert not attentions(model)  # refused before anything was changed
    with pytest.raises(
        ValueError, match="grid is for a torch.nn.TransformerEncoder, not for a VisionTransformer; leave it out"
    ):
        equip(torchvision_vit(), SPEC, grid=(4, 4))


def hooked(attention):
    attention.register_forward_hook(lambda module, inputs, output: None)


def replaced(attention):
    attention.forward = lambda *args, **kwargs: args[0]


def subclassed(attention):
    """With the same class name, as people choose."""
    kind = type(attention)
    attention.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x, *args, **kwargs: x})


@pytest.mark.parametrize(
    ("change", "words"),
    [(hooked, "it has hooks; equip the model first"), (replaced, "its forward was replaced"), (subclassed, " is a ")],
)
@pytest.mark.parametrize("name", ["timm DeiT", "transformers ViT", "torchvision ViT", "TransformerEncoder"])
def test_attention_that_computes_something_else_is_refused(name, change, words):
    if name == "transformers ViT" and change is subclassed:
        pytest.skip("its attention stays, whatever it computes")
    model = rotary("deit_tiny_patch16_224") if name == "timm DeiT" else make(name)[0]
    named = ("Attention", "ViTAttention", "MultiheadAttention")
    change([module for module in model.modules() if type(module).__name__ in named][-1])
    with pytest.raises(ValueError, match=words):
        equip(model, SPEC)
    assert not attentions(model)  # refused before anything was changed
