"""One call of `rpe_attention`, its arguments checked and its defaults filled in: what every backend is given."""

from typing import NamedTuple

from torch import Tensor

from irpe_ops.modules import IRPE, IRPECross

Encoding = IRPE | IRPECross


class AttentionCall(NamedTuple):
    """The arguments of `rpe_attention`, by its names; ``height`` and ``width`` are None where nothing is encoded."""

    q: Tensor  # (B, H, L, D), not yet scaled
    k: Tensor
    v: Tensor
    rpe_q: Encoding | None
    rpe_k: Encoding | None
    rpe_v: Encoding | None
    height: int | None
    width: int | None
    key_padding_mask: Tensor | None  # (B, L) bool
    attn_mask: Tensor | None  # broadcasts to (B, H, L, L)
    dropout_p: float
    scale: float

    @property
    def encodings(self) -> list[Encoding]:
        """Those that there are, in the order q, k, v."""
        return [rpe for rpe in (self.rpe_q, self.rpe_k, self.rpe_v) if rpe is not None]
