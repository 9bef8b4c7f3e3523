# SPDX-License-Identifier: Apache-2.0
"""torchvision's ViT gains iRPE: its blocks are built on nn.MultiheadAttention, which `equip` replaces.

python examples/torchvision_vit.py
"""

import torch
from torchvision.models import VisionTransformer

from irpe_ops import equip

torch.manual_seed(0)
# torchvision.models.vit_b_16(weights="IMAGENET1K_V1") is the same class with trained weights.
model = VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128).eval()
torch.nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero: every image would look the same
images = torch.randn(2, 3, 64, 64)
before = model(images)

equip(model, "rpe-1.9-product-ctx-1-qkv")
torch.testing.assert_close(model(images), before, atol=1e-4, rtol=0)
for block in model.encoder.layers:
    torch.nn.init.normal_(block.self_attention.rpe_k.lookup_table_weight)
moved = (model(images) - before).abs().max().item()
assert moved > 1e-3
print(f"the same output with fresh tables; with random ones it differs by up to {moved:.2f}")
