# SPDX-License-Identifier: Apache-2.0
"""A ResNet as DETR uses it: batch norm, stem and first stage frozen, without the classifier."""

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from detr_irpe.nested_tensor import NestedTensor
from irpe_train.checkpoint import load_matching, read_weights

# Small enough for the demo on a laptop: 0.3 M parameters. As a classifier, the same weights are
# timm.create_model("resnet10t", stem_width=8, channels=(16, 32, 64, 128)).
MICRO = {"stem_width": 8, "channels": (16, 32, 64, 128)}


def build_resnet(name: str, *, dilation: bool = False, pretrained: bool = False) -> nn.Module:
    """Any torchvision ResNet by name, or ``resnet_micro``, with frozen batch norm.

    Args:
        dilation: the last stage keeps its resolution and dilates instead (DC5): stride 16 instead of 32.
        pretrained: start from torchvision's ImageNet weights (downloads them once).
    """
    if name == "resnet_micro":
        if pretrained:
            remedy = "Give --backbone_weights FILE (train it as a classifier first) or --backbone_weights none."
            raise ValueError(f"resnet_micro has no ImageNet weights. {remedy}")

        def norm(channels: int, **_) -> nn.Module:  # timm also names a device and a dtype
            return FrozenBatchNorm2d(channels)

        stride = 16 if dilation else 32
        micro = timm.create_model("resnet10t", norm_layer=norm, zero_init_last=False, output_stride=stride, **MICRO)
        if dilation:  # the same as timm's pooling, whose padding .pt2 cannot hold; onnxruntime 1.23 needs it even
            micro.layer4[0].downsample[0] = nn.Sequential(nn.AvgPool2d(2, 1, padding=1), nn.ZeroPad2d((-1, 0, -1, 0)))
        return micro
    if name not in resnet_names():
        raise ValueError(f"--backbone {name!r}: expected resnet_micro or one of {', '.join(resnet_names())}.")
    if dilation and name in ("resnet18", "resnet34"):
        raise ValueError(f"--dilation: torchvision's {name} has no dilated variant; use resnet50 or a larger one.")
    resnet = torchvision.models.get_model(
        name, weights=None, norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False, False, dilation]
    )
    if pretrained:  # not by torchvision, whose error message without a network does not help
        load_backbone_weights(resnet, torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url)
    return resnet


def resnet_names() -> list[str]:
    """torchvision's classification ResNets (ResNeXt and wide ones among them)."""
    return [n for n in torchvision.models.list_models(module=torchvision.models) if "resne" in n]


def load_backbone_weights(resnet: nn.Module, path: str) -> None:
    """Fill a ResNet from a classification checkpoint (a file or an address): from ``deit_irpe``, or a plain state dict.

    The classifier, the counters of batch norm and a ``module.`` prefix are dropped; everything else must fit.

    Raises: BadCheckpoint: naming the keys that are missing, unexpected, or of another shape.
    """
    load_matching(resnet, read_weights(path), source=path, may_start_fresh=lambda key: key.startswith("fc."))


class Backbone(nn.Module):
    """The feature maps of a ResNet, each with the padding mask at its size.

    Args:
        resnet: with ``layer1`` to ``layer4``, batch norm already frozen.
        train_backbone: train ``layer2`` to ``layer4``; the stem and ``layer1`` are always frozen.
        return_interm_layers: all four stages (the mask head needs them), else only the last.

    Attributes: channels: of each returned map.
    """

    def __init__(self, resnet: nn.Module, *, train_backbone: bool = True, return_interm_layers: bool = False):
        super().__init__()
        for name, parameter in resnet.named_parameters():
            if not train_backbone or not name.startswith(("layer2", "layer3", "layer4")):
                parameter.requires_grad_(False)
        stages = ("layer1", "layer2", "layer3", "layer4") if return_interm_layers else ("layer4",)
        self.body = IntermediateLayerGetter(resnet, {stage: stage for stage in stages})
        image = next(resnet.parameters()).new_zeros(1, 3, 64, 64)
        with torch.no_grad():
            self.channels = [x.shape[1] for x in self.body(image).values()]

    def forward(self, images: NestedTensor) -> list[NestedTensor]:
        """Maps ``(B, channels[i], h, w)``, from fine to coarse."""
        mask, maps = images.mask[:, None].float(), self.body(images.tensors).values()
        return [NestedTensor(x, F.interpolate(mask, x.shape[-2:], mode="nearest")[:, 0].bool()) for x in maps]


class Joiner(nn.Sequential):
    """Backbone (entry 0) and position encoding (entry 1), as named in the published checkpoints."""

    def __init__(self, backbone: Backbone, position_embedding: nn.Module):
        super().__init__(backbone, position_embedding)
        self.channels = backbone.channels

    def forward(self, images: NestedTensor) -> tuple[list[NestedTensor], Tensor]:
        """The maps, and the positions ``(B, hidden_dim, h, w)`` for the last of them."""
        features = self[0](images)
        return features, self[1](features[-1]).to(features[-1].tensors.dtype)
