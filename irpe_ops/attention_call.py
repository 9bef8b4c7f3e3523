# SPDX-License-Identifier: Apache-2.0
"""One call of `rpe_attention`, as backends receive it: arguments checked, defaults filled in."""

from typing import NamedTuple

from torch import Tensor

from irpe_ops.modules import IRPE, IRPESum

Encoding = IRPE | IRPESum


class AttentionCall(NamedTuple):
    """The arguments of `rpe_attention`, by name; ``height`` and ``width`` are None if there is no encoding."""

    q: Tensor  # (B, H, L, D), not yet scaled
    k: Tensor
    v: Tensor
    rpe_q: Encoding | None = None
    rpe_k: Encoding | None = None
    rpe_v: Encoding | None = None
    height: int | None = None
    width: int | None = None
    key_padding_mask: Tensor | None = None  # (B, L) bool
    attn_mask: Tensor | None = None  # broadcasts to (B, H, L, L)
    dropout_p: float = 0.0
    scale: float = 1.0

    @property
    def encodings(self) -> list[Encoding]:
        """The encodings of this call, in the order q, k, v."""
        return [rpe for rpe in (self.rpe_q, self.rpe_k, self.rpe_v) if rpe is not None]
