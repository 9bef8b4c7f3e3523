"""python -m detr_irpe.export: one file for every batch and image size."""

import re

import pytest
import torch
from safetensors import safe_open
from torch.export import Dim

from detr_irpe.args import get_args_parser as training_parser
from detr_irpe.export import get_export_parser, main
from detr_irpe.load_model import load_model
from detr_irpe.models import build_model
from detr_irpe.models.transformer import Transformer
from irpe_train.config import parse_args

SMALL = [
    "--coco_path",
    "x",
    "--backbone",
    "resnet_micro",
    "--backbone_weights",
    "none",
    "--hidden_dim",
    "16",
    "--nheads",
    "2",
    "--enc_layers",
    "1",
    "--dec_layers",
    "1",
    "--dim_feedforward",
    "16",
    "--num_queries",
    "3",
    "--enc_rpe2d",
    "rpe-2.0-product-ctx-1-k",
]


def write_checkpoint(path, *flags):
    args = parse_args(training_parser(), [*SMALL, *flags])
    args.num_classes = 4
    model, *_ = build_model(args)
    torch.save({"model": model.state_dict(), "args": args}, path)
    return path


def run(*flags):
    main(parse_args(get_export_parser(), [str(flag) for flag in flags]))


def test_safetensors_holds_the_same_network_with_its_flags_and_categories(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "x.pth", "--dilation", "--enc_rpe2d", "rpe-2.1-product-ctx-1-k")
    torch.save(torch.load(path, weights_only=False) | {"categories": {2: "hat"}}, path)
    run("--resume", path, "--out", tmp_path / "detr", "--formats", "safetensors")
    assert "by at most 0.0e+00 of" in capsys.readouterr().out
    (model, _, flags, names), (same, _, same_flags, same_names) = map(load_model, (path, tmp_path / "detr.safetensors"))
    assert vars(flags) == vars(same_flags) and flags.dilation and names == same_names == {2: "hat"}
    with safe_open(tmp_path / "detr.safetensors", "pt") as file:
        told = file.metadata()
    assert (told["enc_rpe2d"], told["image_size"]) == ("rpe-2.1-product-ctx-1-k", "800")
    assert (told["mean"], told["std"]) == ("[0.485, 0.456, 0.406]", "[0.229, 0.224, 0.225]")
    image = torch.rand(3, 64, 96)
    assert torch.equal(model([image])["pred_boxes"], same([image])["pred_boxes"])


def test_the_transformer_is_traced_for_any_batch_and_grid():
    """The part of an export whose sizes our code computes; the whole one is slow."""
    model = Transformer(8, 2, 1, 1, 8, enc_rpe2d="rpe-2.0-product-ctx-1-k").eval()
    src, mask, queries = torch.randn(2, 8, 4, 5), torch.zeros(2, 4, 5, dtype=torch.bool), torch.randn(3, 8)
    grid, batch = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: Dim.DYNAMIC}
    shapes = batch | grid, batch | {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}, None, batch | grid
    traced = torch.export.export(model, (src, mask, queries, src), dynamic_shapes=shapes).module()
    other = torch.randn(3, 8, 6, 4), torch.zeros(3, 6, 4, dtype=torch.bool)
    torch.testing.assert_close(traced(*other, queries, other[0]), model(*other, queries, other[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "formats"), [((), ("onnx", "pt2")), (("--dilation",), ("onnx", "pt2", "safetensors"))]
)
def test_exports_run_at_sizes_that_were_not_traced(tmp_path, capsys, flags, formats):
    path = write_checkpoint(tmp_path / "x.pth", *flags)
    sizes = "--height", "64", "--width", "96"
    run("--resume", path, "--out", tmp_path / "detr.onnx", *sizes, "--formats", *formats)
    assert len(re.findall("differ from the model's by at most", capsys.readouterr().out)) == len(formats)


def test_a_mask_head_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "x.pth", "--masks")
    with pytest.raises(ValueError, match="mask head, which is not exported"):
        run("--resume", path, "--out", tmp_path / "x")


def test_sizes_that_cannot_be_traced_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--height 64 --width 8: expected 64 pixels or more"):
        run("--resume", tmp_path / "x.pth", "--out", tmp_path / "x", "--height", "64", "--width", "8")
