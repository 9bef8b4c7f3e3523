"""Small models of other libraries, with random weights, with and without encodings."""

import pytest
import timm
import torch
from torch import nn

from irpe_ops import equip

SPEC = "rpe-1.9-product-ctx-1-qkv"


def rotary(name, **kwargs):
    sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **{**sizes, **kwargs})


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)


def hugging_face(name, **kwargs):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
    config = getattr(transformers, f"{name.partition('For')[0]}Config")(**sizes | kwargs)
    return getattr(transformers, name)(config)


def resnet_config():
    from transformers import ResNetConfig

    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"])


def hugging_face_detr(name="DetrForObjectDetection"):
    transformers = pytest.importorskip("transformers")
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 3, "num_labels": 4}
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=resnet_config(), **sizes
    )
    return getattr(transformers, name)(config)


def hugging_face_rt_detr(**kwargs):
    transformers = pytest.importorskip("transformers")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16], encoder_ffn_dim=16,
        encoder_attention_heads=2, num_attention_heads=2, d_model=16, decoder_in_channels=[16, 16, 16], num_queries=5,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, num_labels=4, eval_size=None,
        **kwargs,
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


def encoder(norm_first=False, batch_first=True):
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=batch_first, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


# The model, its input, and which submodules are to have encodings.
MODELS = {
    "timm EVA-02": (lambda: rotary("eva02_tiny_patch14_224", patch_size=16), (2, 3, 64, 64), 2),
    "timm EVA, separate biases": (lambda: rotary("eva02_tiny_patch14_224", patch_size=16, qkv_fused=False), (2, 3, 64, 64), 2),  # noqa: E501
    "timm ViT with axial RoPE": (lambda: rotary("vit_small_patch16_rope_224"), (2, 3, 64, 64), 2),
    "timm ViT with mixed RoPE": (lambda: rotary("vit_small_patch16_rope_mixed_224"), (2, 3, 64, 64), 2),
    "timm DINOv3": (lambda: rotary("vit_small_patch16_dinov3"), (2, 3, 64, 64), 2),
    "torchvision ViT": (torchvision_vit, (2, 3, 32, 32), 2),
    "TransformerEncoder": (encoder, (2, 12, 16), 2),
    "TransformerEncoder, norm first": (lambda: encoder(True, False), (12, 2, 16), 2),
    "transformers ViT": (lambda: hugging_face("ViTForImageClassification"), (2, 3, 32, 32), 2),
    "transformers DeiT": (lambda: hugging_face("DeiTForImageClassification"), (2, 3, 32, 32), 2),
    "transformers DINOv2": (lambda: hugging_face("Dinov2ForImageClassification", mlp_ratio=2), (2, 3, 32, 40), 2),
    "transformers DINOv2 with registers": (
        lambda: hugging_face("Dinov2WithRegistersForImageClassification", mlp_ratio=2, num_register_tokens=3),
        (2, 3, 40, 32), 2,
    ),
    "transformers DETR": (hugging_face_detr, (2, 3, 64, 96), 2),
    "transformers RT-DETR": (hugging_face_rt_detr, (2, 3, 64, 96), 1),
}  # fmt: skip
GRIDS = {"TransformerEncoder": (3, 4), "TransformerEncoder, norm first": (3, 4)}


def make(name, equipped=False, spec=SPEC):
    build, shape, layers = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    for name_, parameter in model.named_parameters():  # some heads and scales start near zero, and would hide a change
        if parameter.dim() > 1 or name_.endswith("q_bias"):
            nn.init.normal_(parameter, std=0.2)
        elif "gamma" in name_:
            nn.init.ones_(parameter)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if equipped:
        equip(model, spec, grid=GRIDS.get(name))
    return model, x


def answer(model, x):
    out = model(x)
    return out if torch.is_tensor(out) else out.logits


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "rpe_k")]
