"""A timm ViT becomes the same ViT with relative position encoding in every block. timm itself is not imported."""

import dataclasses

import torch
from torch import Tensor, nn

from irpe_ops.attention import BACKENDS, rpe_attention
from irpe_ops.config import RPEConfig, parse_rpe_spec
from irpe_ops.modules import build_rpe
from irpe_ops.rpe_index import under_function_transform

# What the attention of a plain timm ViT may consist of. Anything else computes something that is not known here.
_PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
_HELP = "See docs/equip.md for equipping other models by hand."


def equip(model: nn.Module, spec_or_config: str | RPEConfig, *, backend: str = "auto") -> nn.Module:
    """Put iRPE into every block of a timm ViT, in place.

    Args:
        model: a timm ``VisionTransformer`` (class, distillation and register tokens, or none; any grid).
        spec_or_config: a spec string or a config; its ``skip`` gives way to ``model.num_prefix_tokens``.
        backend: of `rpe_attention`; every block keeps it as ``attn_backend``.
    Returns: ``model``. Weights, their names and (tables start at zero) outputs are what they were; the tables come as
        ``blocks.i.attn.rpe_{q,k,v}``, after ``proj``, with the dtype and device of ``qkv``.
    Raises: TypeError: for a spec of another type; ValueError: for a malformed spec, a model with iRPE already in it,
        and models whose attention this function does not know.
    """
    config = parse_rpe_spec(spec_or_config) if isinstance(spec_or_config, str) else spec_or_config
    if not isinstance(config, RPEConfig):
        raise TypeError(f"equip: expected a spec string or a config, got {config!r}")
    if backend not in BACKENDS:
        raise ValueError(f"equip: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    attentions = _find_attentions(model)
    config = dataclasses.replace(config, skip=model.num_prefix_tokens)
    grid = TokenGrid(config.skip)
    grid.remember(*model.patch_embed.grid_size)
    model.patch_embed.register_forward_hook(grid.after_patch_embed)
    for block, attention in zip(model.blocks, attentions, strict=True):
        block.attn = RPEAttention(attention, config, grid, backend)
        block.register_forward_hook(grid.after_block)
    return model


class TokenGrid:
    """The token grid of the running forward pass, for blocks that are only handed a sequence.

    Gradient checkpointing runs blocks again during the backward pass, perhaps after forward passes of other sizes.
    So grids are kept by number of tokens, and where image sizes vary, each block's backward pass starts by putting
    back the grid of its forward pass: 7 x 14 and 14 x 7 have the same number of tokens.
    """

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.varies = False
        self.by_length: dict[int, tuple[int, int]] = {}

    def remember(self, height: int, width: int) -> None:
        self.by_length[height * width + self.skip] = (height, width)

    def of(self, length: int) -> tuple[int, int]:
        if length not in self.by_length:
            known = ", ".join(f"{height} x {width}" for height, width in self.by_length.values())
            raise ValueError(
                f"equipped attention: {length} tokens, {self.skip} of them leading, fit no grid seen so far ({known}); "
                "run whole images through the model, or call model.set_input_size first"
            )
        return self.by_length[length]

    def after_patch_embed(self, patch_embed: nn.Module, inputs: tuple[Tensor, ...], patches: Tensor) -> None:
        """Forward hook of ``patch_embed``."""
        if isinstance(patches, torch.fx.Proxy):  # a traced graph is of one size: the one that is remembered
            return
        self.varies = patches.dim() == 4  # dynamic_img_size: (B, height, width, C)
        if self.varies:
            self.remember(*patches.shape[1:3])
        elif hasattr(patch_embed, "dynamic_feat_size"):
            self.remember(*patch_embed.dynamic_feat_size(inputs[0].shape[-2:]))
        else:
            self.remember(*patch_embed.grid_size)

    def after_block(self, block: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor | None:
        """Forward hook of a block."""
        if not self.varies or not tokens.requires_grad or torch.compiler.is_compiling() or under_function_transform():
            return None
        return _PutBack.apply(tokens, self)


class _PutBack(torch.autograd.Function):
    """Does nothing forward; backward, which is before anything of its block, puts the block's grid back."""

    @staticmethod
    def forward(ctx, tokens: Tensor, grid: TokenGrid) -> Tensor:
        ctx.grid, ctx.size = grid, grid.of(tokens.shape[1])
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.grid.remember(*ctx.size)
        return grad, None


class RPEAttention(nn.Module):
    """The attention of a timm ViT with encodings; takes over the submodules of the one it replaces."""

    def __init__(self, attention: nn.Module, config: RPEConfig, grid: TokenGrid, backend: str) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.head_dim = attention.qkv.out_features // 3 // attention.num_heads
        self.scale = attention.scale
        self.fused_attn = getattr(attention, "fused_attn", True)
        self.attn_backend = backend
        self.grid = grid
        for name in _PARTS:
            part = getattr(attention, name, None)
            setattr(self, name, nn.Identity() if part is None and name != "gate" else part)
        encodings = build_rpe(config, self.head_dim, self.num_heads)
        for name, rpe in zip(("rpe_q", "rpe_k", "rpe_v"), encodings, strict=True):
            setattr(self, name, None if rpe is None else rpe.to(attention.qkv.weight))
        self.train(attention.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``(B, L, C)`` to ``(B, L, C)``. ``attn_mask`` as in timm: float is added, bool True = *kept*."""
        length = x.shape[1]
        height, width = self.grid.of(length)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # (B, H, L, D)
        if is_causal:
            attn_mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        out = rpe_attention(
            self.q_norm(q),
            self.k_norm(k),
            v,
            self.rpe_q,
            self.rpe_k,
            self.rpe_v,
            height=height,
            width=width,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            scale=self.scale,
            backend=self.attn_backend if self.fused_attn else "eager",
        )
        out = self.norm(out.transpose(1, 2).flatten(2))  # (B, L, C)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def _find_attentions(model: nn.Module) -> list[nn.Module]:
    kind = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ValueError(f"equip: {kind} has no blocks; expected a timm VisionTransformer. {_HELP}")
    missing = [name for name in ("patch_embed", "num_prefix_tokens") if not hasattr(model, name)]
    if missing or not hasattr(model.patch_embed, "grid_size"):
        raise ValueError(
            f"equip: {kind} does not tell its token grid ({', '.join(missing) or 'patch_embed.grid_size'} missing); "
            f"expected a timm VisionTransformer. {_HELP}"
        )
    if getattr(getattr(model, "patch_drop", None), "prob", 0.0) > 0:
        raise ValueError("equip: patch_drop_rate > 0 drops tokens, and the rest no longer form a grid; set it to 0")
    attentions = []
    for i, block in enumerate(blocks):
        attention = getattr(block, "attn", None)
        if isinstance(attention, RPEAttention):
            raise ValueError(f"equip: block {i} has iRPE already; equip a fresh model")
        if reason := _why_unknown(attention):
            raise ValueError(f"equip: block {i} of {kind}: {reason}. {_HELP}")
        attentions.append(attention)
    return attentions


def _why_unknown(attention: nn.Module | None) -> str | None:
    """Why this is not the attention of a plain timm ViT, or None where it is."""
    if attention is None:
        return "it has no attn"
    kind = type(attention).__name__
    if kind != "Attention":
        return f"its attention is a {kind}, not timm's Attention"
    extra = [name for name, _ in attention.named_children() if name not in _PARTS]
    extra += [name for name, _ in attention.named_parameters(recurse=False)]
    if extra:
        return f"its Attention has unknown parts: {', '.join(extra)}"
    if not all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("qkv", "proj")):
        return "its Attention has no linear qkv and proj"
    if attention.qkv.out_features % (3 * attention.num_heads):
        return f"its qkv gives {attention.qkv.out_features} features, which {attention.num_heads} heads cannot share"
    return None
