# SPDX-License-Identifier: Apache-2.0
"""``torch.hub.load(REPOSITORY, NAME)``: the DeiT models under their published names, and ``detr_resnet50``.

model = torch.hub.load(".", "deit_small_patch16_224_ctx_product_50_shared_k", source="local", pretrained=True)
model = torch.hub.load(".", "detr_resnet50", source="local", enc_rpe2d="rpe-2.0-product-ctx-1-k")
"""

dependencies = ["torch", "torchvision", "timm", "scipy", "yaml"]

from functools import partial as _partial  # noqa: E402

from deit_irpe.models import RPE_MODELS as _RPE_MODELS  # noqa: E402
from deit_irpe.models import create_model as _create_deit  # noqa: E402

for _name in _RPE_MODELS:
    globals()[_name] = _partial(_create_deit, _name)


def deit(name, rpe=None, **kwargs):
    """Any DeiT (or timm ViT) with any encoding: see ``deit_irpe.create_model``."""
    return _create_deit(name, rpe, **kwargs)


def detr_resnet50(pretrained=False, enc_rpe2d="rpe-2.0-product-ctx-1-k", **kwargs):
    """DETR with a ResNet-50: see ``detr_irpe.create_model``.

    ``pretrained`` is the name of a checkpoint in the zoo (``"rpe-2.0-product-ctx-1-k_300epochs"``), or True for the one
    named after ``enc_rpe2d``.
    """
    from detr_irpe import create_model
    from irpe_train.checkpoint import load_matching, read_weights
    from irpe_train.zoo import fetch

    model = create_model("resnet50", enc_rpe2d, **kwargs)
    if pretrained:
        path = fetch((enc_rpe2d or "none") if pretrained is True else pretrained)
        load_matching(model, read_weights(path), source=path)
    return model
