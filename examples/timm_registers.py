# SPDX-License-Identifier: Apache-2.0
"""A timm ViT with a class token and four register tokens gains iRPE; tokens that are not patches share one bucket.

python examples/timm_registers.py [--pretrained]      # DINOv2's weights, downloaded
"""

import argparse

import timm
import torch

from irpe_ops import equip

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pretrained", action="store_true")
args = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(
    "vit_small_patch14_reg4_dinov2",
    pretrained=args.pretrained,
    img_size=112,
    depth=12 if args.pretrained else 2,
    dynamic_img_size=True,
).eval()
images = torch.randn(2, 3, 112, 112)
before = model(images)

equip(model, "rpe-1.9-product-ctx-1-qk")

encoding = model.blocks[0].attn.rpe_k
assert encoding.skip == model.num_prefix_tokens == 5
torch.testing.assert_close(model(images), before, atol=1e-4, rtol=0)
print(f"the same output with fresh tables; {encoding.num_buckets} buckets, 1 of them for the {encoding.skip} tokens")

wide = model(torch.randn(2, 3, 84, 140))  # 6 x 10 patches: the same tables
print(f"84 x 140 pixels work too: {tuple(wide.shape)}")
