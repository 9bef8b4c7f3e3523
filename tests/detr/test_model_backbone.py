import pytest
import timm
import torch
import torchvision

from detr_irpe import build_model, create_model
from detr_irpe.models import backbone as backbones
from detr_irpe.models.backbone import MICRO, Backbone, build_resnet
from detr_irpe.nested_tensor import NestedTensor
from tests.helpers.tiny_detr import published_flags, tiny_model


def trained_classifier(stride: int = 32) -> torch.nn.Module:
    """As after a classification run: random weights, and batch norm statistics that differ from 0 and 1."""
    torch.manual_seed(0)
    classifier = timm.create_model("resnet10t", num_classes=4, output_stride=stride, **MICRO).train()
    for _ in range(3):
        classifier(torch.rand(8, 3, 32, 32))
    return classifier.eval()


@pytest.mark.parametrize("dilation", [False, True])
def test_classifier_weights_give_the_classifier_features(tmp_path, dilation):
    classifier = trained_classifier(16 if dilation else 32)
    weights = {f"module.{key}": value for key, value in classifier.state_dict().items()}
    torch.save({"model": weights, "epoch": 3}, tmp_path / "checkpoint.pth")
    model = create_model("resnet_micro", pretrained_backbone=str(tmp_path / "checkpoint.pth"), dilation=dilation)
    images = torch.rand(2, 3, 64, 97)
    ours = model.backbone[0](NestedTensor.from_images(list(images)))[-1].tensors
    torch.testing.assert_close(ours, classifier.forward_features(images))


def test_a_plain_state_dict_of_torchvision_fits_its_resnet(tmp_path):
    classifier = torchvision.models.resnet18(num_classes=3).eval()
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    model = create_model("resnet18", pretrained_backbone=str(tmp_path / "resnet18.pth"))
    assert torch.equal(model.backbone[0].body.layer4[0].conv1.weight, classifier.layer4[0].conv1.weight)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match=r"resnet18.pth does not fit this ResNet; missing: conv1"):
        create_model("resnet_micro", pretrained_backbone=str(tmp_path / "resnet18.pth"))


def test_frozen_batch_norm_is_the_formula():
    backbone = Backbone(build_resnet("resnet_micro"))
    norm = backbone.body.bn1
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    x = torch.randn(2, norm.weight.numel(), 3, 3)
    mean, var, scale, shift = (
        b[None, :, None, None] for b in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    torch.testing.assert_close(backbone.train().body.bn1(x), (x - mean) / (var + 1e-5).sqrt() * scale + shift)


def test_stem_and_first_stage_stay_frozen():
    trained = {
        name.split(".")[0] for name, p in Backbone(build_resnet("resnet18")).body.named_parameters() if p.requires_grad
    }
    assert trained == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("place", ["meta", torch.float64])  # a GPU's stand-in
def test_the_network_may_be_elsewhere_than_new_tensors(place):
    assert Backbone(build_resnet("resnet_micro").to(place)).channels == [128]


def test_mask_is_shrunk_by_nearest_and_all_stages_are_returned():
    backbone = Backbone(build_resnet("resnet_micro"), return_interm_layers=True)
    maps = backbone(NestedTensor.from_images([torch.rand(3, 64, 40), torch.rand(3, 33, 96)]))
    assert [tuple(m.tensors.shape[1:]) for m in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    assert backbone.channels == [16, 32, 64, 128]
    # cell i of n looks at pixel floor(i * 64 / n)
    assert maps[-1].mask[0].tolist() == [[False, False, True]] * 2
    assert maps[2].mask[1].tolist() == [[False] * 6] * 3 + [[True] * 6]


class AskedForWeights(Exception):
    pass


@pytest.fixture
def no_downloads(monkeypatch):
    """Asking for weights raises an exception instead of downloading."""

    def load(resnet, path):
        raise AskedForWeights(path)

    monkeypatch.setattr(backbones, "load_backbone_weights", load)


def test_imagenet_weights_are_the_default_of_a_training_run(no_downloads):
    args = published_flags(backbone="resnet18")
    del args.backbone_weights
    with pytest.raises(AskedForWeights, match="/resnet18-f37072fd.pth"):
        build_model(args)
    with pytest.raises(AskedForWeights):
        create_model("resnet18", pretrained_backbone=True)


@pytest.mark.parametrize(
    "change",
    [
        {"eval": True},
        {"resume": "x.pth"},
        {"pretrained": "x"},
        {"finetune": "x.pth"},
        {"frozen_weights": "x.pth", "masks": True},
        {"backbone_weights": "none"},
    ],
)
def test_nothing_is_downloaded_when_a_checkpoint_will_fill_the_model(no_downloads, change):
    build_model(published_flags(**{"backbone": "resnet18", "backbone_weights": "imagenet"} | change))


def test_nothing_is_downloaded_by_the_other_processes(no_downloads, monkeypatch):
    monkeypatch.setattr("detr_irpe.models.from_flags.is_main", lambda: False)
    build_model(published_flags(backbone="resnet18", backbone_weights="imagenet"))


def test_backbones_that_do_not_exist():
    with pytest.raises(ValueError, match="--backbone 'resnet51': expected resnet_micro or one of .*resnet50"):
        create_model("resnet51")
    with pytest.raises(ValueError, match="resnet_micro has no ImageNet weights. Give --backbone_weights FILE"):
        tiny_model(pretrained_backbone=True)
    with pytest.raises(ValueError, match="--dilation: torchvision's resnet18 has no dilated variant"):
        create_model("resnet18", dilation=True)
    assert {"resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d"} <= set(backbones.resnet_names())
