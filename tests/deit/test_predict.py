"""Pictures of predictions, from our checkpoints and from those that keep fewer flags."""

import argparse
import json

import pytest
import torch

from deit_irpe import create_model
from deit_irpe.load_model import load_model
from deit_irpe.predict import attention_maps, get_parser, main
from tests.helpers.processes import run_ranks
from tests.helpers.tiny_images import write_images

KWARGS = ["img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
SPEC = "rpe-1.9-product-ctx-1-qkv"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint whose class token prefers the third of four classes by far."""
    torch.manual_seed(0)
    model = create_model(
        "deit_tiny_patch16_224", SPEC, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4
    )
    for name, parameter in model.named_parameters():
        if "lookup" in name:
            torch.nn.init.normal_(parameter)
    torch.nn.init.constant_(model.head.bias[2:3], 20.0)
    args = argparse.Namespace(model="deit_tiny_patch16_224", rpe=SPEC, model_kwargs=KWARGS, input_size=32, nb_classes=4)
    torch.save({"model": model.state_dict(), "args": args, "classes": ["ant", "bee", "cat", "dog"]}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def predict(tmp_path, *flags):
    return run_ranks(
        main, get_parser, [*map(str, flags), "--device", "cpu", "--out", str(tmp_path / "out")], tmp_path / "outputs"
    )[0]


def test_pictures_and_json(checkpoint, tmp_path):
    write_images(tmp_path, {"images": 2}, side=50)
    ended = predict(tmp_path, tmp_path / "images" / "0.png", "--resume", checkpoint, "--attention", "0,3")
    assert ended.code == 0, ended.text
    ended = predict(tmp_path, tmp_path / "images" / "0.png", tmp_path / "images" / "1.png", "--resume", checkpoint)
    assert ended.code == 0, ended.text
    first, second = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert first["top"][0]["class"] == "cat" and first["top"][0]["number"] == 2 and len(first["top"]) == 4
    assert first["top"][0]["probability"] > 0.99 and second["image"].endswith("1.png")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"predictions.json", "tables.png", "0.png", "1.png", "0_attention_0-3.png", "0_encoding_0-3.png"}


def test_tables_need_no_image(checkpoint, tmp_path):
    ended = predict(tmp_path, "--tables", "--resume", checkpoint)
    assert ended.code == 0 and "tables.png is in" in ended.text, ended.text
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tables.png"]
    ended = predict(tmp_path, "--resume", checkpoint)
    assert ended.code == 1 and "name images, or ask for --tables" in ended.text


def test_attention_maps_are_the_weights_that_the_block_uses(checkpoint):
    """Where only one token has a value, and that is 1, the block gives every other token its weight for that one."""
    model, _, _ = load_model(str(checkpoint))
    attn, images, got = model.blocks[-1].attn, torch.randn(1, 3, 32, 32), []
    attn.rpe_v = None
    with torch.no_grad():
        expected = attention_maps(model, images, 1, 2)  # (2, 4, 4)
        values = torch.zeros(1, 17, 32)
        values[0, 1 + 3 * 4 + 0] = 1.0  # the patch at (3, 0), behind the class token
        attn.qkv.register_forward_hook(lambda module, inputs, output: torch.cat([output[..., :64], values], dim=-1))
        attn.norm.register_forward_hook(lambda module, inputs, output: got.append(output))
        model(images)
    weights = got[0].unflatten(-1, (2, 16))[0, 1 + 1 * 4 + 2]  # (heads, 16), each the same number
    assert torch.allclose(weights, expected[:, 3, 0, None].expand(2, 16), atol=1e-6)
    on_patches = expected.sum((1, 2))
    assert (on_patches > 0).all() and (on_patches < 1).all()  # the rest is on the class token


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--attention", "9,9"), "outside the 4x4 patches"), (("--rpe", "none"), "is of another model")],
)
def test_mistakes_are_explained(checkpoint, tmp_path, flags, words):
    write_images(tmp_path, {"images": 1})
    ended = predict(tmp_path, tmp_path / "images" / "0.png", "--resume", checkpoint, *flags)
    assert ended.code == 1 and words in ended.text and "Traceback" not in ended.text


def test_a_file_that_is_no_image_is_named(checkpoint, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    ended = predict(tmp_path, tmp_path / "text.png", "--resume", checkpoint)
    assert ended.code == 1 and f"{tmp_path / 'text.png'}: this image cannot be read" in ended.text


def test_weights_alone_need_the_model_named(checkpoint, tmp_path):
    weights = torch.load(checkpoint, weights_only=False)["model"]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not say which model it is: add --model NAME"):
        load_model(str(tmp_path / "weights.pth"))
    model, _, classes = load_model(
        str(tmp_path / "weights.pth"), model="deit_tiny_patch16_224", rpe=SPEC, model_kwargs=KWARGS, input_size=32
    )
    assert classes == ["class 0", "class 1", "class 2", "class 3"] and not model.training
