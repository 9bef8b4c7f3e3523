# SPDX-License-Identifier: Apache-2.0
"""timm's plain and rotary vision transformers. timm itself is imported only to rotate."""

import dataclasses
import functools

import torch
from torch import Tensor, nn

from irpe_ops.attention import rpe_attention
from irpe_ops.config import RPEConfig
from irpe_ops.equip.packed_heads import split_heads
from irpe_ops.equip.token_grid import HELP, TokenGrid, add_encodings, why_changed
from irpe_ops.modules import build_rpe

# The parts that timm's attention classes may have. With any other part, we do not know what it computes.
_PLAIN = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
_ROTARY = ("q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias")
_PARTS = {"Attention": _PLAIN, "AttentionRope": _ROTARY + _PLAIN, "EvaAttention": _ROTARY + _PLAIN}


def equip(model: nn.Module, config: RPEConfig, backend: str) -> None:
    """Replace the attention in every block of a timm ``VisionTransformer`` or ``Eva`` with an `RPEAttention`."""
    attentions = _find_attentions(model)
    config = dataclasses.replace(config, skip=model.num_prefix_tokens)
    grid = TokenGrid(config.skip)
    grid.remember(*model.patch_embed.grid_size)
    model.patch_embed.register_forward_hook(functools.partial(_remember, grid))
    for block, attention in zip(model.blocks, attentions, strict=True):
        block.attn = RPEAttention(attention, config, grid, backend)
        grid.follow(block)


def _remember(grid: TokenGrid, patch_embed: nn.Module, inputs: tuple[Tensor, ...], patches: Tensor) -> None:
    """Forward hook of ``patch_embed``."""
    if isinstance(patches, torch.fx.Proxy):  # a traced graph has one size: the one remembered
        return
    grid.varies = patches.dim() == 4  # dynamic_img_size: (B, height, width, C)
    if grid.varies:
        grid.remember(*patches.shape[1:3])
    elif hasattr(patch_embed, "dynamic_feat_size"):
        grid.remember(*patch_embed.dynamic_feat_size(inputs[0].shape[-2:]))
    else:
        grid.remember(*patch_embed.grid_size)


class RPEAttention(nn.Module):
    """The attention of a timm ViT with encodings; reuses the submodules of the module it replaces.

    With rotary positions, encodings are added to the scores of the rotated queries and keys.
    """

    def __init__(self, attention: nn.Module, config: RPEConfig, grid: TokenGrid, backend: str) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.head_dim = attention.proj.in_features // attention.num_heads
        self.fused_attn = getattr(attention, "fused_attn", True)
        self.num_prefix_tokens = getattr(attention, "num_prefix_tokens", 0)  # these are not rotated
        self.rotate_half = getattr(attention, "rotate_half", False)
        for name in _PARTS[type(attention).__name__]:
            part = getattr(attention, name, None)
            if name == "k_bias" and part is not None:  # zeros, which timm leaves out of checkpoints
                self.register_buffer(name, part, persistent=False)
            else:
                optional = name in (*_ROTARY, "gate", "qkv")
                setattr(self, name, nn.Identity() if part is None and not optional else part)
        add_encodings(self, attention.proj.weight, build_rpe(config, self.head_dim, self.num_heads), grid, backend)
        self.train(attention.training)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, L, C)`` to queries, keys and values ``(B, H, L, D)``, normalised where the model does so."""
        if self.qkv is None:
            q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)) for part in (self.q_proj, self.k_proj, self.v_proj))
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        else:
            qkv = self.qkv(x)
            if getattr(self, "q_bias", None) is not None:
                qkv = qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias))
            q, k, v = split_heads(qkv, self.num_heads)
        return self.q_norm(q), self.k_norm(k), v

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """``(B, H, L, D)`` with its patches rotated by ``rope``, as timm does."""
        from timm.layers import apply_rot_embed_cat

        leading, patches = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        return torch.cat([leading, apply_rot_embed_cat(patches, rope, half=self.rotate_half)], dim=2).type_as(x)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """``(B, L, C)`` to ``(B, L, C)``. ``attn_mask`` as in timm: float is added, bool True = *kept*."""
        length = x.shape[1]
        height, width = self.grid.of(length)
        q, k, v = self.project(x)  # (B, H, L, D)
        if rope is not None:
            q, k = self.rotate(q, rope), self.rotate(k, rope)
        if is_causal:
            attn_mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        dropout_p = self.attn_drop.p if self.training else 0.0
        backend = self.attn_backend if self.fused_attn else "eager"
        options = dict(attn_mask=attn_mask, dropout_p=dropout_p, scale=self.scale, backend=backend)
        out = rpe_attention(q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, height=height, width=width, **options)
        out = self.norm(out.transpose(1, 2).flatten(2))  # (B, L, C)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def _find_attentions(model: nn.Module) -> list[nn.Module]:
    kind = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ValueError(
            f"equip: {kind} has no blocks over one grid (model.blocks), as timm's VisionTransformer. {HELP}"
        )
    missing = [name for name in ("patch_embed", "num_prefix_tokens") if not hasattr(model, name)]
    if missing or not hasattr(model.patch_embed, "grid_size"):
        raise ValueError(
            f"equip: {kind} does not report its token grid ({', '.join(missing) or 'patch_embed.grid_size'} missing); "
            f"expected a timm VisionTransformer. {HELP}"
        )
    if getattr(getattr(model, "patch_drop", None), "prob", 0.0) > 0:
        raise ValueError("equip: patch_drop_rate > 0 drops tokens, and the rest no longer form a grid; set it to 0")
    attentions = []
    for i, block in enumerate(blocks):
        attention = getattr(block, "attn", None)
        if reason := _why_unknown(attention):
            raise ValueError(f"equip: block {i} of {kind}: {reason}. {HELP}")
        attentions.append(attention)
    return attentions


def _why_unknown(attention: nn.Module | None) -> str | None:
    """Why this is not the attention of a plain or rotary timm ViT, or None if it is."""
    if attention is None:
        return "it has no attn"
    kind = type(attention).__name__
    if kind not in _PARTS or not type(attention).__module__.startswith("timm."):
        return f"its attention is a {kind} of {type(attention).__module__}, not timm's {', '.join(_PARTS)}"
    if reason := why_changed(attention):
        return reason
    names = [name for name, _ in (*attention.named_children(), *attention.named_parameters(recurse=False))]
    if extra := [name for name in names if name not in _PARTS[kind]]:
        return f"its {kind} has unknown parts: {', '.join(extra)}"
    if getattr(attention, "num_kv_groups", 1) != 1:
        return "its keys and values have fewer heads than its queries"
    inputs = ("qkv",) if getattr(attention, "qkv", None) is not None or kind == "Attention" else _ROTARY[:3]
    if not all(isinstance(getattr(attention, name, None), nn.Linear) for name in (*inputs, "proj")):
        return f"its {kind} has no linear {' and '.join(inputs)} and proj"
    features = sum(getattr(attention, name).out_features for name in inputs)
    if features % (3 * attention.num_heads):
        return f"its {', '.join(inputs)} give {features} features, which {attention.num_heads} heads cannot share"
    return None
