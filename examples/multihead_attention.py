# SPDX-License-Identifier: Apache-2.0
"""``nn.MultiheadAttention`` with iRPE, for models that are built on it; used by the two examples beside this file."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irpe_ops import build_rpe, rpe_attention


class RPEMultiheadAttention(nn.MultiheadAttention):
    """Self-attention with the weights, and the names of the weights, of the ``plain`` one it replaces.

    Attributes:
        grid: (height, width) of the tokens in the next calls; None for a square one.
    """

    def __init__(self, plain: nn.MultiheadAttention, config):
        super().__init__(plain.embed_dim, plain.num_heads, dropout=plain.dropout, batch_first=True)
        self.load_state_dict(plain.state_dict())
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(config, plain.head_dim, plain.num_heads)
        self.grid: tuple[int, int] | None = None
        # nn.TransformerEncoderLayer reads this before it hands our weights to a kernel that knows no encoding.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        **_ignored,
    ) -> tuple[Tensor, None]:
        """``(B, L, C)``; query, key and value are the same tokens. Float padding masks, as the encoder makes them,
        are taken as bool."""
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            key_padding_mask = key_padding_mask == -torch.inf
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, D)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        height, width = self.grid or (None, None)
        out = rpe_attention(
            q,
            k,
            v,
            self.rpe_q,
            self.rpe_k,
            self.rpe_v,
            height=height,
            width=width,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2)), None
