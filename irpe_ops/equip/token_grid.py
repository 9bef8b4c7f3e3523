# SPDX-License-Identifier: Apache-2.0
"""The token grid of the current forward pass, for attention that only sees a sequence."""

import threading
import weakref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from irpe_ops.rpe_index import under_function_transform

HELP = "See docs/gallery.md for the models that equip takes, and docs/equip.md for equipping others by hand."


class _Here(threading.local):
    """The grids last seen by this thread: two threads may run the same model on different image sizes."""

    def __init__(self) -> None:
        self.grids = weakref.WeakKeyDictionary()


_here = _Here()
# For reentrant checkpointing: storage of a block's input -> grid of the forward pass it came from.
_first_runs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class TokenGrid:
    """Grids by number of tokens, as each thread last saw them.

    Gradient checkpointing reruns blocks during the backward pass, perhaps after forward passes of other sizes and on an
    autograd thread. So if image sizes vary, each block's backward pass first restores the grid of its forward pass:
    7 x 14 and 14 x 7 have the same number of tokens.

    Args: skip: leading tokens. varies: image sizes may change. tokens_dim: of a block's output, 1 for ``(B, L, C)``.
    """

    def __init__(self, skip: int, varies: bool = False, tokens_dim: int = 1) -> None:
        self.skip, self.varies, self.tokens_dim = skip, varies, tokens_dim
        self.by_length: dict[int, tuple[int, int]] = {}  # from the thread that ran last

    def remember(self, height: int, width: int) -> None:
        """The next tokens on this thread lie on a ``height x width`` grid."""
        length = height * width + self.skip
        self.by_length[length] = (height, width)
        if not torch.compiler.is_compiling():  # a compiled graph has one size, and knows nothing of threads
            _here.grids.setdefault(self, {})[length] = (height, width)

    def of(self, length: int) -> tuple[int, int]:
        """Height and width of the grid that ``length`` tokens lie on. Raises: ValueError: none was seen."""
        if isinstance(length, (Tensor, torch.fx.Proxy)):  # traced by torch.jit or torch.fx
            raise ValueError(
                "equipped attention cannot be traced: use torch.export, or make it a leaf module of torch.fx"
            )
        if not torch.compiler.is_compiling() and length in (own := _here.grids.get(self, {})):
            return own[length]
        if length not in self.by_length:
            known = ", ".join(f"{height} x {width}" for height, width in self.by_length.values())
            raise ValueError(
                f"equipped attention: {length} tokens, {self.skip} of them leading, fit no grid seen so far ({known}); "
                "run whole images through the model; for a TransformerEncoder call token_grid.remember(height, width) "
                "first, and equip it with parse_rpe_spec(spec, skip=1) if a class token leads"
            )
        return self.by_length[length]

    def follow(self, block: nn.Module) -> None:
        """Make ``block`` use the grid of its own forward pass when it is rerun during the backward pass."""
        block.register_forward_pre_hook(self._before_block)
        block.register_forward_hook(self._after_block)

    def _before_block(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Reentrant checkpointing runs a block without gradients, then again on a detached input with the same storage.
        if not inputs or not self._will_have_gradient(inputs[0]):
            return
        storage = StorageWeakRef(inputs[0].untyped_storage())
        if not torch.is_grad_enabled():
            alive = {key: run for key, run in _first_runs.get(self, {}).items() if not run[0].expired()}
            _first_runs[self] = alive | {storage.cdata: (storage, self.of(inputs[0].shape[self.tokens_dim]))}
        elif storage.cdata in (runs := _first_runs.get(self, {})):
            self.remember(*runs[storage.cdata][1])

    def _after_block(self, block: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor | None:
        return _PutBack.apply(tokens, self) if self._will_have_gradient(tokens) else None

    def _will_have_gradient(self, tokens: Tensor) -> bool:
        if not self.varies or not self.by_length or not isinstance(tokens, Tensor) or not tokens.requires_grad:
            return False
        return not (torch.compiler.is_compiling() or under_function_transform())


class _PutBack(torch.autograd.Function):
    """The identity; its backward, which runs before that of its block, restores the block's grid."""

    @staticmethod
    def forward(ctx, tokens: Tensor, grid: TokenGrid) -> Tensor:
        ctx.grid, ctx.size = grid, grid.of(tokens.shape[grid.tokens_dim])
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.grid.remember(*ctx.size)
        return grad, None


def why_changed(attention: nn.Module) -> str | None:
    """Why an attention module may not compute what its class does, or None if it does."""
    if "forward" in vars(attention):
        return "its forward was replaced by another function"
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for kind in kinds for hook in getattr(attention, kind).values()]
    if any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks):
        return "it has hooks; equip the model first and add them afterwards"
    return None


def add_encodings(attention: nn.Module, weight: Tensor, encodings: tuple, grid: TokenGrid, backend: str) -> None:
    """Add the attributes of every equipped attention: ``rpe_q, rpe_k, rpe_v``, ``grid`` and ``attn_backend``."""
    for role, rpe in zip("qkv", encodings, strict=True):
        setattr(attention, f"rpe_{role}", None if rpe is None else rpe.to(weight).train(attention.training))
    attention.grid, attention.attn_backend = grid, backend
