# SPDX-License-Identifier: Apache-2.0
"""DETR, and how to build one from arguments; ``from_flags.py`` builds it from the flags of a run.

Source: Carion et al., ECCV 2020; Wu et al., ICCV 2021, Sec. 4.4.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detr_irpe.models.backbone import Backbone, Joiner, build_resnet, load_backbone_weights
from detr_irpe.models.position_encoding import build_position_encoding
from detr_irpe.models.segmentation import DETRsegm
from detr_irpe.models.transformer import Transformer
from detr_irpe.nested_tensor import NestedTensor
from irpe_ops import parse_rpe_spec


class MLP(nn.Module):
    """Linear maps with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """Objects of an image as a set of queries, each with a class (or "no object", the last one) and a box."""

    def __init__(
        self, backbone: Joiner, transformer: Transformer, num_classes: int, num_queries: int, aux_loss: bool = True
    ):
        super().__init__()
        hidden_dim = transformer.d_model
        self.transformer = transformer
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = nn.Conv2d(backbone.channels[-1], hidden_dim, kernel_size=1)
        self.backbone = backbone
        self.aux_loss = aux_loss

    @property
    def num_queries(self) -> int:
        return self.query_embed.num_embeddings

    def forward(self, samples: NestedTensor | Sequence[Tensor] | Tensor) -> dict:
        """Detect.

        Args: samples: a ``NestedTensor``; or images ``(3, h, w)``, normalised; or ``(B, 3, h, w)`` of one size.
        Returns: ``pred_logits`` ``(B, Q, C + 1)``; ``pred_boxes`` ``(B, Q, 4)``, centre and size, as fractions of the
            image without its padding; with ``aux_loss`` also ``aux_outputs``, the same for the earlier decoder layers.
        """
        outputs, *_ = self.detect(samples)
        return outputs

    def detect(
        self, samples: NestedTensor | Sequence[Tensor] | Tensor
    ) -> tuple[dict, list[NestedTensor], Tensor, Tensor, Tensor]:
        """The result of ``forward``, and the inputs of a mask head.

        Returns: the outputs; the backbone's maps; the last of them projected, ``(B, d_model, h, w)``; the last decoder
            output, ``(B, Q, d_model)``; the encoded map, ``(B, d_model, h, w)``.
        """
        if not isinstance(samples, NestedTensor):
            samples = NestedTensor.from_images(samples)
        features, pos = self.backbone(samples)
        projected = self.input_proj(features[-1].tensors)
        hs, memory = self.transformer(projected, features[-1].mask, self.query_embed.weight, pos)
        logits, boxes = self.class_embed(hs), self.bbox_embed(hs).sigmoid()
        *earlier, outputs = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes, strict=True)]
        if self.aux_loss:
            outputs["aux_outputs"] = earlier
        return outputs, features, projected, hs[-1], memory


def create_model(
    backbone: str = "resnet50",
    enc_rpe2d: str = "",
    num_classes: int = 91,
    num_queries: int = 100,
    pretrained_backbone: bool | str = False,
    *,
    hidden_dim: int = 256,
    nheads: int = 8,
    enc_layers: int = 6,
    dec_layers: int = 6,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    pre_norm: bool = False,
    position_embedding: str = "sine",
    dilation: bool = False,
    train_backbone: bool = True,
    aux_loss: bool = True,
    masks: bool = False,
    freeze_detr: bool = False,
    attn_backend: str = "auto",
) -> nn.Module:
    """DETR with or without iRPE in its encoder; the defaults are the published model.

    Args:
        backbone: a torchvision ResNet, or ``resnet_micro``.
        enc_rpe2d: spec of the encoding, such as ``"rpe-2.0-product-ctx-1-k"``; empty or ``"none"`` for none.
        num_classes: largest category id plus one, "no object" not counted.
        pretrained_backbone: True for torchvision's ImageNet weights (downloads them), or the path of a classification
            checkpoint.
        dilation: DC5, stride 16 in the last stage.
        train_backbone: train stages 2 to 4 of the backbone; the first and the stem are always frozen.
        masks: add the segmentation head (``DETRsegm``); ``freeze_detr`` then trains only that head.
    """
    spec = "" if enc_rpe2d == "none" else enc_rpe2d  # as on the command line
    if spec:
        parse_rpe_spec(spec)  # a mistake in it is told before anything is downloaded
    resnet = build_resnet(backbone, dilation=dilation, pretrained=pretrained_backbone is True)
    if isinstance(pretrained_backbone, str):
        load_backbone_weights(resnet, pretrained_backbone)
    maps = Backbone(resnet, train_backbone=train_backbone, return_interm_layers=masks)
    joiner = Joiner(maps, build_position_encoding(position_embedding, hidden_dim))
    transformer = Transformer(
        hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout, pre_norm, spec, attn_backend
    )
    model = DETR(joiner, transformer, num_classes, num_queries, aux_loss)
    return DETRsegm(model, freeze_detr=freeze_detr) if masks else model
