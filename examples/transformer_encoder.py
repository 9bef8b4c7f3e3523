# SPDX-License-Identifier: Apache-2.0
"""nn.TransformerEncoder over feature maps padded to one size: the encoding follows the grid.

python examples/transformer_encoder.py
"""

import torch
from torch import Tensor, nn

from irpe_ops import equip


class MapEncoder(nn.Module):
    """Encodes feature maps ``(B, C, height, width)``; ``padding`` ``(B, height, width)`` is True outside each map."""

    def __init__(self, channels: int, nhead: int, layers: int, spec: str):
        super().__init__()
        layer = nn.TransformerEncoderLayer(channels, nhead, 4 * channels, batch_first=True)
        self.encoder = equip(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), spec)

    def forward(self, maps: Tensor, padding: Tensor) -> Tensor:
        self.encoder.token_grid.remember(*maps.shape[-2:])
        tokens = self.encoder(maps.flatten(2).transpose(1, 2), src_key_padding_mask=padding.flatten(1))
        return tokens.transpose(1, 2).unflatten(2, maps.shape[-2:])


torch.manual_seed(0)
model = MapEncoder(32, nhead=4, layers=2, spec="rpe-2.0-product-ctx-1-k").eval()
for layer in model.encoder.layers:
    nn.init.normal_(layer.self_attn.rpe_k.lookup_table_weight)

small, padding = torch.randn(1, 32, 5, 7), torch.zeros(1, 5, 7, dtype=torch.bool)
alone = model(small, padding)
larger = torch.zeros(1, 32, 8, 9)
larger[..., :5, :7] = small
outside = torch.ones(1, 8, 9, dtype=torch.bool)
outside[:, :5, :7] = False
with torch.no_grad():
    padded = model(larger, outside)[..., :5, :7]
torch.testing.assert_close(padded, alone, atol=1e-4, rtol=0)
print("a 5 x 7 map gives the same result alone and padded to 8 x 9")
