# SPDX-License-Identifier: Apache-2.0
"""Absolute positions of the cells of a feature map, as DETR adds them to queries and keys."""

import math

import torch
from torch import Tensor, nn

from detr_irpe.nested_tensor import NestedTensor


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of the row (first half of the channels) and of the column (second half).

    Row and column numbers count the cells that are not padding, and are scaled so that the last one is ``2 pi``:
    the position within the image, independent of the batch's padding.

    Source: Carion et al., ECCV 2020, Sec. A.4, after Vaswani et al., 2017; details in Parmar et al., 2018.
    """

    temperature = 10000
    eps = 1e-6  # keeps an image without a single visible cell finite

    def __init__(self, num_pos_feats: int):
        """``num_pos_feats``: channels for each of the two axes, even."""
        super().__init__()
        if num_pos_feats % 2:
            raise ValueError(f"sine positions need an even number of channels per axis; got {num_pos_feats}")
        self.num_pos_feats = num_pos_feats

    def forward(self, features: NestedTensor) -> Tensor:
        """``(B, 2 * num_pos_feats, h, w)``, float32."""
        visible = ~features.mask
        channel = torch.arange(self.num_pos_feats, dtype=torch.float32, device=visible.device)
        period = self.temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / self.num_pos_feats)
        axes = []
        for dim in (1, 2):
            count = visible.cumsum(dim, dtype=torch.float32)
            last = count.narrow(dim, count.shape[dim] - 1, 1)
            angle = (count / (last + self.eps) * (2 * math.pi))[..., None] / period  # (B, h, w, num_pos_feats)
            waves = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1)
            axes.append(waves.flatten(3))
        return torch.cat(axes, dim=-1).permute(0, 3, 1, 2)  # (B, C, h, w)


class PositionEmbeddingLearned(nn.Module):
    """One learned vector for each column (first half of the channels) and each row (second half), up to 50 of each."""

    def __init__(self, num_pos_feats: int, num_embeddings: int = 50):
        super().__init__()
        self.row_embed = nn.Embedding(num_embeddings, num_pos_feats)
        self.col_embed = nn.Embedding(num_embeddings, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, features: NestedTensor) -> Tensor:
        """``(B, 2 * num_pos_feats, h, w)``."""
        batch, height, width = features.mask.shape
        limit = self.row_embed.num_embeddings
        if height > limit or width > limit:
            got = f"the map is {height} x {width}. Use --position_embedding sine or smaller images."
            raise ValueError(f"learned positions reach {limit} rows and columns; {got}")
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).permute(2, 0, 1).expand(batch, -1, -1, -1)


def build_position_encoding(name: str, hidden_dim: int) -> nn.Module:
    """``"sine"`` or ``"learned"`` for ``hidden_dim`` channels."""
    kinds = {"sine": PositionEmbeddingSine, "learned": PositionEmbeddingLearned}
    if name not in kinds:
        raise ValueError(f"--position_embedding {name!r}: expected one of {', '.join(kinds)}.")
    divisor = 4 if kinds[name] is PositionEmbeddingSine else 2  # two axes, sine and cosine
    if hidden_dim % divisor:
        raise ValueError(f"--hidden_dim {hidden_dim}: positions of kind {name!r} need a multiple of {divisor}")
    return kinds[name](hidden_dim // 2)
