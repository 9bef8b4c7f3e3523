# SPDX-License-Identifier: Apache-2.0
"""Models built on `torch.nn.MultiheadAttention`: torchvision's ViT, `torch.nn.TransformerEncoder` over a grid."""

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from irpe_ops.attention import rpe_attention
from irpe_ops.attention_call import AttentionCall
from irpe_ops.backends.eager import attention_weights
from irpe_ops.config import RPEConfig
from irpe_ops.equip.packed_heads import split_heads
from irpe_ops.equip.token_grid import HELP, TokenGrid, add_encodings, why_changed
from irpe_ops.modules import build_rpe


def is_torchvision_vit(model: nn.Module) -> bool:
    """Whether it is torchvision's ``VisionTransformer``; torchvision is not imported."""
    kinds = type(model).__mro__
    return any(k.__name__ == "VisionTransformer" and k.__module__.startswith("torchvision.") for k in kinds)


def equip_torchvision_vit(model: nn.Module, config: RPEConfig, backend: str) -> None:
    """Encodings for every block; the class token is the one leading token."""
    config = dataclasses.replace(config, skip=1)
    grid = TokenGrid(config.skip)
    side = model.image_size // model.patch_size
    grid.remember(side, side)
    _check([block.self_attention for block in model.encoder.layers])
    for block in model.encoder.layers:
        block.self_attention = RPEMultiheadAttention(block.self_attention, config, grid, backend)


def equip_encoder(
    encoder: nn.TransformerEncoder, config: RPEConfig, backend: str, size: tuple[int, int] | None
) -> None:
    """Encodings for every layer; tell ``encoder.token_grid`` about other sizes."""
    for layer in encoder.layers:
        if not isinstance(layer, nn.TransformerEncoderLayer):
            kind = type(layer).__name__
            raise ValueError(f"equip: a layer is a {kind}, not a torch.nn.TransformerEncoderLayer. {HELP}")
    _check([layer.self_attn for layer in encoder.layers])
    batch_first = encoder.layers[0].self_attn.batch_first
    grid = encoder.token_grid = TokenGrid(config.skip, varies=True, tokens_dim=1 if batch_first else 0)
    if size is not None:
        grid.remember(*size)
    for layer in encoder.layers:
        layer.self_attn = RPEMultiheadAttention(layer.self_attn, config, grid, backend)
        layer.activation_relu_or_gelu = 0  # else PyTorch's fast path skips self_attn in eval mode
        grid.follow(layer)
    encoder.use_nested_tensor = False  # nested tensors have no grid


class RPEMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with encodings, for self-attention; reuses the weights of the module it replaces."""

    def __init__(self, attention: nn.MultiheadAttention, config: RPEConfig, grid: TokenGrid, backend: str) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        encodings = build_rpe(config, self.head_dim, self.num_heads)
        add_encodings(self, attention.out_proj.weight, encodings, grid, backend)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`, for batches. Raises: ValueError: for cross-attention, which has no grid."""
        if query is not key or key is not value or query.dim() != 3:
            raise ValueError("equipped attention: query, key and value must be the same tokens of one grid")
        if is_causal and attn_mask is None:  # as in nn.MultiheadAttention, it is a hint about the mask
            raise ValueError("equipped attention: is_causal without a mask masks nothing; pass the causal mask too")
        x = query if self.batch_first else query.transpose(0, 1)  # (B, L, C)
        batch, length, _ = x.shape
        height, width = self.grid.of(length) if self.grid.by_length else (None, None)
        q, k, v = split_heads(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.num_heads)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        if key_padding_mask is not None and key_padding_mask.is_floating_point():  # as TransformerEncoder makes it
            padding = key_padding_mask[:, None, None, :]
            if attn_mask is not None and not attn_mask.is_floating_point():
                attn_mask = padding.new_zeros(()).masked_fill(attn_mask, float("-inf"))
            key_padding_mask, attn_mask = None, padding if attn_mask is None else padding + attn_mask
        masks = {"height": height, "width": width, "key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        encodings = (self.rpe_q, self.rpe_k, self.rpe_v)
        dropout_p = self.dropout if self.training else 0.0
        out = rpe_attention(q, k, v, *encodings, **masks, dropout_p=dropout_p, backend=self.attn_backend)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:
            weights = attention_weights(AttentionCall(q, k, v, *encodings, **masks, scale=self.head_dim**-0.5))
            weights = weights.mean(1) if average_attn_weights else weights
        return out if self.batch_first else out.transpose(0, 1), weights


def _check(attentions: list[nn.Module]) -> None:
    if not attentions:
        raise ValueError("equip: this model has no layers")
    for attention in attentions:
        reason = None
        if type(attention) is not nn.MultiheadAttention:
            reason = f"its attention is a {type(attention).__name__}, not torch.nn.MultiheadAttention"
        elif not attention._qkv_same_embed_dim:
            reason = "its keys and values differ in size from its queries"
        elif attention.bias_k is not None or attention.add_zero_attn:
            reason = "it attends to a learned or zero key, which has no place on the grid"
        if reason := reason or why_changed(attention):
            raise ValueError(f"equip: {reason}. {HELP}")
