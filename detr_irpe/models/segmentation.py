# SPDX-License-Identifier: Apache-2.0
"""A mask for every query of a DETR: attention over the encoded image, refined with the backbone's finer maps.

Source: Carion et al., ECCV 2020, Sec. 4.4 and Fig. 8.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_irpe.nested_tensor import NestedTensor


class MHAttentionMap(nn.Module):
    """What each query attends to: only attention weights, without values."""

    def __init__(self, hidden_dim: int, nheads: int):
        super().__init__()
        self.nheads = nheads
        self.q_linear = nn.Linear(hidden_dim, hidden_dim)
        self.k_linear = nn.Linear(hidden_dim, hidden_dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """``(B, Q, d_model)``, ``(B, d_model, h, w)``, ``(B, h, w)`` with True = padding -> ``(B, Q, nheads, h, w)``.

        As published, the weights of a query sum to 1 over heads and positions together, not in each head.
        """
        q = self.q_linear(queries).unflatten(-1, (self.nheads, -1))
        k = self.k_linear(memory.flatten(2).transpose(1, 2)).unflatten(-1, (self.nheads, -1))
        scores = torch.einsum("bqnc,blnc->bqnl", q * q.shape[-1] ** -0.5, k)
        padding = mask.flatten(1)[:, None, None]
        # A large finite number keeps an image that is all padding finite; elsewhere its exponential is 0.
        scores = scores.float().masked_fill(padding, torch.finfo(torch.float32).min)
        weights = scores.flatten(2).softmax(-1).view_as(scores).masked_fill(padding, 0.0)
        return weights.unflatten(-1, tuple(mask.shape[1:]))


class MaskHeadSmallConv(nn.Module):
    """Convolutions from an attention map to a mask, at stride 4; each step up adds a finer map of the backbone.

    Args:
        dim: channels of the projected features plus the heads of the attention map.
        fpn_dims: channels of the backbone's maps that are added, from coarse to fine.
        context_dim: the base of the layers' widths.
    """

    def __init__(self, dim: int, fpn_dims: Sequence[int], context_dim: int):
        super().__init__()
        widths = [dim, dim, *(context_dim // divisor for divisor in (2, 4, 8, 16))]
        for number, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
            setattr(self, f"lay{number}", nn.Conv2d(before, after, 3, padding=1))
            setattr(self, f"gn{number}", nn.GroupNorm(math.gcd(8, after), after))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for number, (channels, width) in enumerate(zip(fpn_dims, widths[2:], strict=False), start=1):
            setattr(self, f"adapter{number}", nn.Conv2d(channels, width, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, projected: Tensor, attention: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """``(B, C, h, w)``, ``(B, Q, nheads, h, w)``, maps ``(B, c, h', w')`` -> ``(B, Q, h', w')`` as the last."""
        batch, queries = attention.shape[:2]
        projected = projected[:, None].expand(-1, queries, -1, -1, -1)
        x = torch.cat([projected, attention.to(projected)], dim=2).flatten(0, 1)  # (B * Q, C + nheads, h, w)
        x = self._block(2, self._block(1, x))
        for number, finer in enumerate(maps, start=1):
            finer = getattr(self, f"adapter{number}")(finer)
            x = F.interpolate(x, size=finer.shape[-2:], mode="nearest").unflatten(0, (batch, queries))
            x = self._block(number + 2, (x + finer[:, None]).flatten(0, 1))
        return self.out_lay(x)[:, 0].unflatten(0, (batch, queries))

    def _block(self, number: int, x: Tensor) -> Tensor:
        return F.relu(getattr(self, f"gn{number}")(getattr(self, f"lay{number}")(x)))


class DETRsegm(nn.Module):
    """A DETR (attribute ``detr``) with a mask head. ``freeze_detr``: train only the mask head."""

    def __init__(self, detr: nn.Module, freeze_detr: bool = False):
        super().__init__()
        self.detr = detr
        if freeze_detr:
            detr.requires_grad_(False)
        hidden_dim, nheads = detr.transformer.d_model, detr.transformer.nhead
        if hidden_dim < 16:  # the mask head's last layer has 1/16 of it
            raise ValueError(f"--hidden_dim {hidden_dim}: --masks needs 16 or more")
        self.bbox_attention = MHAttentionMap(hidden_dim, nheads)
        self.mask_head = MaskHeadSmallConv(hidden_dim + nheads, detr.backbone.channels[-2::-1], hidden_dim)

    def forward(self, samples: NestedTensor | Sequence[Tensor]) -> dict:
        """The DETR's outputs, and ``pred_masks`` ``(B, Q, h, w)``: logits, as large as the backbone's first map."""
        outputs, features, projected, queries, memory = self.detr.detect(samples)
        attention = self.bbox_attention(queries, memory, features[-1].mask)
        outputs["pred_masks"] = self.mask_head(projected, attention, [f.tensors for f in features[-2::-1]])
        return outputs
