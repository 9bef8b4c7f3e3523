"""python -m deit_irpe.export: the encoding leaves as plain gathers, and the file computes the same."""

import argparse
import json

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deit_irpe.args import get_args_parser as training_flags
from deit_irpe.data.classes import stored_classes
from deit_irpe.export import get_export_parser, main
from deit_irpe.load_model import load_model
from deit_irpe.models import create_model
from irpe_train.checkpoint import Checkpoint
from irpe_train.config import parse_args

SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = create_model("deit_demo_patch4_32", "rpe-1.9-product-ctx-1-k", num_classes=3, **SMALL)
    torch.nn.init.normal_(model.blocks[0].attn.rpe_k.lookup_table_weight)
    path = tmp_path / "best.pth"
    flags = parse_args(
        training_flags(),
        [
            "--model",
            "deit_demo_patch4_32",
            "--rpe",
            "rpe-1.9-product-ctx-1-k",
            "--input-size",
            "32",
            "--model-kwargs",
            *(f"{name}={value}" for name, value in SMALL.items()),
        ],
    )
    torch.save({"model": model.state_dict(), "args": flags}, path)
    return path


def run(*flags):
    main(parse_args(get_export_parser(), [str(flag) for flag in flags]))


def test_onnx_holds_gathers_and_no_operator_of_ours(checkpoint, tmp_path, capsys):
    run("--resume", checkpoint, "--out", tmp_path / "deit.onnx")
    nodes = onnx.load(tmp_path / "deit.onnx").graph.node
    assert any(node.op_type == "GatherElements" for node in nodes)
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert "deit.onnx: its outputs differ from the model's by at most" in capsys.readouterr().out


def test_a_bare_state_dict_needs_the_model_name(checkpoint, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save({"model": torch.load(checkpoint, weights_only=False)["model"]}, bare)
    with pytest.raises(ValueError, match="--model NAME"):
        run("--resume", bare, "--out", tmp_path / "x")


def test_the_average_of_a_model_for_oblong_images_and_what_a_user_must_know(tmp_path):
    name, sizes = "deit_tiny_patch16_224_ctx_product_50_shared_k", dict(depth=1, num_classes=2, img_size=(32, 48))
    weights, average = (create_model(name, **sizes).state_dict() for _ in range(2))
    flags = argparse.Namespace(model=name, rpe=None, model_kwargs=["depth=1"], input_size="32x48")
    contents = {"model": weights, "model_ema": average, "args": flags, "classes": ["ant", "bee"]}
    torch.save(contents, tmp_path / "best.pth")
    run("--resume", tmp_path / "best.pth", "--out", tmp_path / "x", "--formats", "safetensors", "--eval-ema")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("head.weight"), average["head.weight"])
        told = {key: json.loads(value) for key, value in file.metadata().items()}
    assert (told["classes"], told["input_size"], told["model"]) == (["ant", "bee"], "32x48", name)
    assert told["rpe"] == "rpe-1.9-product-ctx-1-k"
    assert (told["mean"], told["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    (tmp_path / "x.safetensors").rename(tmp_path / "X.SAFETENSORS")  # as another system may rename it
    model, _, classes = load_model(str(tmp_path / "X.SAFETENSORS"))
    assert classes == ["ant", "bee"] and torch.equal(model.head.weight, average["head.weight"])
    assert stored_classes(Checkpoint.read(tmp_path / "X.SAFETENSORS")) == classes


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"classes": "[" * 5000}, {"classes": '"a"'}])
def test_safetensors_of_others_name_no_model(tmp_path, metadata):
    save_file({"head.bias": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=r"x\.safetensors.* (does not say which model it is|damaged or truncated)"):
        load_model(str(tmp_path / "x.safetensors"))
