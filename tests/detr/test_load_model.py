"""A checkpoint is untrusted data: its flags describe a network and do nothing else."""

import argparse
import urllib.request

import pytest
import torch

from detr_irpe import build_model
from detr_irpe.load_model import load_model
from irpe_train.errors import BadCheckpoint
from tests.helpers.tiny_detr import published_flags


def write(path, *, drop=(), weights=None, **flags):
    """A tiny model's checkpoint; ``flags`` are changed after the model was built."""
    args = published_flags(enc_rpe2d="rpe-2.0-product-ctx-1-k", image_size=40)
    weights = build_model(args)[0].state_dict() | (weights or {})
    vars(args).update(flags)
    for name in drop:
        delattr(args, name)
    torch.save({"model": weights, "args": args, "categories": {3: "red"}}, path)
    return str(path)


def test_it_is_built_as_it_was_trained(tmp_path):
    path = write(tmp_path / "x.pth")
    model, postprocessors, args, names = load_model(path)
    stored = torch.load(path, weights_only=False)["model"]
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    assert not model.training and model.aux_loss is False
    assert (args.num_classes, args.image_size, names, list(postprocessors)) == (91, 40, {3: "red"}, ["bbox"])


def test_flags_of_a_stranger_download_nothing(tmp_path, monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError(f"asked for {args}")

    monkeypatch.setattr(urllib.request, "urlopen", fetch)
    url = "http://127.0.0.1:9/evil.pth"
    flags = {name: url for name in ("resume", "finetune", "pretrained", "frozen_weights")}
    load_model(write(tmp_path / "x.pth", **flags, eval=False, backbone_weights=url))
    load_model(write(tmp_path / "y.pth", eval=False, backbone_weights="imagenet"))


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"hidden_dim": 2**20}, "does not fit this DETR; .*other shapes"),
        ({"dim_feedforward": 2**40}, "does not fit|do not describe a DETR"),
        ({"num_queries": 2**50}, "does not fit|do not describe a DETR"),
        ({"enc_layers": 10**9}, "more layers than it has weights"),
        ({"hidden_dim": "16"}, "its flag hidden_dim is '16', not int"),
        ({"hidden_dim": True}, "its flag hidden_dim is True"),
        ({"nheads": 0}, "its flags do not describe a DETR"),
        ({"backbone": "resnet_of_mine"}, "its flags do not describe a DETR .*resnet_of_mine"),
        ({"enc_rpe2d": "rpe-2.0-prodct-ctx-1-k"}, "its flags do not describe a DETR .*prodct"),
        ({"image_size": 10**9}, "image_size is 1000000000"),
        ({"weights": {"class_embed.bias": torch.zeros(0)}}, "no class head"),
    ],
)
def test_flags_that_do_not_describe_the_weights_are_refused(tmp_path, flags, words):
    with pytest.raises(BadCheckpoint, match=words) as error:
        load_model(write(tmp_path / "x.pth", **flags))
    assert "x.pth" in str(error.value)


def test_a_few_flags_do_not_make_a_model_of_the_default_flags(tmp_path):
    path = write(tmp_path / "x.pth")
    torch.save(torch.load(path, weights_only=False) | {"args": argparse.Namespace(image_size=40)}, path)
    with pytest.raises(BadCheckpoint, match="x.pth has no 'args' with the flags of a DETR: .* is for irpe classify"):
        load_model(path)
