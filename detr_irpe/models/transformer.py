# SPDX-License-Identifier: Apache-2.0
"""DETR's transformer, batch first. iRPE acts in the self-attention of the encoder.

Source: Carion et al., ECCV 2020, Sec. A.3; Wu et al., ICCV 2021, Sec. 4.4.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention
from irpe_ops.attention_call import AttentionCall
from irpe_ops.backends.eager import attention_weights


class MultiheadAttention(nn.Module):
    """Multi-head attention under the parameter names of ``torch.nn.MultiheadAttention``; batch first."""

    def __init__(self, d_model: int, nhead: int, dropout: float):
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"--hidden_dim {d_model} is not a multiple of --nheads {nhead}.")
        self.nhead, self.dropout = nhead, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as heads, ``(B, nhead, L, head_dim)``, not scaled."""
        if query is key:  # self-attention: one product instead of two
            weight_qk, weight_v = self.in_proj_weight.split([2 * query.shape[-1], query.shape[-1]])
            bias_qk, bias_v = self.in_proj_bias.split([2 * query.shape[-1], query.shape[-1]])
            q, k = F.linear(query, weight_qk, bias_qk).chunk(2, dim=-1)
            v = F.linear(value, weight_v, bias_v)
        else:
            parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
            q, k, v = (F.linear(x, weight, bias) for x, weight, bias in parts)
        return tuple(x.unflatten(-1, (self.nhead, -1)).transpose(1, 2) for x in (q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Heads to heads; an image that is all padding is treated as if it had none: meaningless, but finite."""
        visible = None
        if mask is not None:
            padding = mask.flatten(1)
            visible = (~padding | padding.all(-1, keepdim=True))[:, None, None]  # (B, 1, 1, S)
        return F.scaled_dot_product_attention(q, k, v, visible, self.dropout if self.training else 0.0)

    def merge(self, heads: Tensor) -> Tensor:
        """``(B, nhead, L, head_dim)`` -> ``(B, L, d_model)``, projected."""
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, d_model)``, ``(B, h * w, d_model)`` twice, mask ``(B, h, w)`` or None -> ``(B, L, d_model)``."""
        return self.merge(self.attend(*self.project(query, key, value), mask))


class RPESelfAttention(MultiheadAttention):
    """Self-attention over the cells of a feature map, with iRPE on queries, keys and values as ``enc_rpe2d`` says.

    Queries and keys come from features plus absolute positions, values only from the features.
    """

    def __init__(self, d_model: int, nhead: int, dropout: float, enc_rpe2d: str, attn_backend: str):
        super().__init__(d_model, nhead, dropout)
        self.has_rpe = bool(enc_rpe2d)
        config = parse_rpe_spec(enc_rpe2d) if enc_rpe2d else None
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(config, d_model // nhead, nhead)
        self.attn_backend = attn_backend

    def weights(self, query_key: Tensor, mask: Tensor) -> Tensor:
        """The attention weights ``(B, nhead, L, L)`` that ``forward`` uses but does not keep; for pictures."""
        q, k, v = self.project(query_key, query_key, query_key)
        encodings, grid = (self.rpe_q, self.rpe_k, None), mask.shape[1:]
        return attention_weights(AttentionCall(q, k, v, *encodings, *grid, mask.flatten(1), scale=q.shape[-1] ** -0.5))

    def forward(self, query_key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """``(B, h * w, d_model)`` twice and ``(B, h, w)``, True = padding -> ``(B, h * w, d_model)``."""
        q, k, v = self.project(query_key, query_key, value)
        if not self.has_rpe:
            return self.merge(self.attend(q, k, v, mask))
        height, width = mask.shape[1:]
        dropout_p = self.dropout if self.training else 0.0
        options = dict(height=height, width=width, key_padding_mask=mask.flatten(1), backend=self.attn_backend)
        encodings = (self.rpe_q, self.rpe_k, self.rpe_v)
        return self.merge(rpe_attention(q, k, v, *encodings, dropout_p=dropout_p, **options))


class TransformerLayer(nn.Module):
    """The common part of both layers: residual branches with the norm after them, or before (``pre_norm``)."""

    def __init__(self, dropout: float, pre_norm: bool):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def residual(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class TransformerEncoderLayer(TransformerLayer):
    """Self-attention with iRPE, then two linear maps."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
        enc_rpe2d: str,
        attn_backend: str,
    ):
        super().__init__(dropout, pre_norm)
        self.self_attn = RPESelfAttention(d_model, nhead, dropout, enc_rpe2d, attn_backend)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, src: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
        src = self.residual(src, self.norm1, lambda x: self.self_attn(x + pos, x, mask))
        return self.residual(src, self.norm2, self.feed_forward)


class TransformerDecoderLayer(TransformerLayer):
    """Self-attention among the queries, attention to the image, then two linear maps."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__(dropout, pre_norm)
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)

    def self_attention(self, x: Tensor, query_pos: Tensor) -> Tensor:
        query_key = x + query_pos
        return self.self_attn(query_key, query_key, x)

    def forward(self, tgt: Tensor, query_pos: Tensor, memory_key: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        tgt = self.residual(tgt, self.norm1, lambda x: self.self_attention(x, query_pos))
        tgt = self.residual(tgt, self.norm2, lambda x: self.multihead_attn(x + query_pos, memory_key, memory, mask))
        return self.residual(tgt, self.norm3, self.feed_forward)


class TransformerEncoder(nn.Module):
    """A stack of layers; with ``pre_norm`` followed by a last norm."""

    def __init__(self, layers: list[TransformerEncoderLayer], norm: nn.Module | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, src: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
        """``src``, ``pos``: ``(B, h * w, d_model)``; ``mask``: ``(B, h, w)``, True = padding."""
        for layer in self.layers:
            src = layer(src, pos, mask)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nn.Module):
    """A stack of layers; every layer's output is normalised and returned, for the auxiliary losses."""

    def __init__(self, layers: list[TransformerDecoderLayer], norm: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, query_pos: Tensor, pos: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Queries ``(B, Q, d_model)``, image ``(B, h * w, d_model)`` and its positions, mask ``(B, h, w)`` ->
        ``(layers, B, Q, d_model)``.
        """
        tgt = torch.zeros_like(query_pos)
        memory_key = memory + pos
        outputs = []
        for layer in self.layers:
            tgt = layer(tgt, query_pos, memory_key, memory, mask)
            outputs.append(self.norm(tgt))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """Encoder over the feature map, decoder over the object queries.

    Args:
        enc_rpe2d: iRPE of every encoder layer, such as ``"rpe-2.0-product-ctx-1-k"``; empty for none.
        attn_backend: of ``irpe_ops.rpe_attention``, in the encoder.
    """

    def __init__(
        self,
        d_model: int = 256,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
        enc_rpe2d: str = "",
        attn_backend: str = "auto",
    ):
        super().__init__()
        shape = (d_model, nhead, dim_feedforward, dropout, pre_norm)
        layers = [TransformerEncoderLayer(*shape, enc_rpe2d, attn_backend) for _ in range(num_encoder_layers)]
        self.encoder = TransformerEncoder(layers, nn.LayerNorm(d_model) if pre_norm else None)
        layers = [TransformerDecoderLayer(*shape) for _ in range(num_decoder_layers)]
        self.decoder = TransformerDecoder(layers, nn.LayerNorm(d_model))
        self.d_model, self.nhead = d_model, nhead
        for parameter in self.parameters():  # including the lookup tables, which as published do not start at zero
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Decode objects from a feature map.

        Args:
            src, pos_embed: ``(B, d_model, h, w)``.
            mask: ``(B, h, w)``, True = padding.
            query_embed: ``(Q, d_model)``.
        Returns: decoder outputs ``(layers, B, Q, d_model)`` and the encoded map ``(B, d_model, h, w)``.
        """
        tokens, pos = (x.flatten(2).transpose(1, 2) for x in (src, pos_embed))  # (B, h * w, d_model)
        memory = self.encoder(tokens, pos, mask)
        queries = query_embed.expand(src.shape[0], -1, -1)  # len(src) would fix the batch of an exported model
        hs = self.decoder(queries, pos, memory, mask)
        return hs, memory.transpose(1, 2).unflatten(2, src.shape[2:])
