# SPDX-License-Identifier: Apache-2.0
"""The training losses: the cross entropy for each augmentation, and distillation from a teacher."""

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn


def classification_loss(*, mixes: bool, smoothing: float) -> nn.Module:
    """Cross entropy for the targets of the augmentation.

    ``mixes`` (Mixup, CutMix or both) gives soft targets, which already contain the smoothing. The published code only
    checks Mixup, and fails with Mixup off and CutMix on.
    """
    if mixes:
        return SoftTargetCrossEntropy()
    if smoothing > 0:
        return LabelSmoothingCrossEntropy(smoothing)
    return nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """``(1 - alpha) * base(class head) + alpha * distance(distillation head, teacher)``.

    ``soft``: Kullback-Leibler divergence at temperature ``tau``, times ``tau ** 2``, averaged over batch and classes;
    ``hard``: cross entropy with the teacher's decision; ``none``: ``base`` alone. Everything in fp32.
    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention", Sec. 4.

    Args:
        base: loss of (logits, targets).
        teacher: frozen model that gives logits ``(B, C)`` for the same images; ``None`` with ``none``.
    """

    def __init__(
        self,
        base: nn.Module,
        teacher: nn.Module | None = None,
        kind: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
    ):
        super().__init__()
        if kind not in ("none", "soft", "hard"):
            raise ValueError(f"distillation type {kind!r}: expected none, soft or hard")
        if kind != "none" and teacher is None:
            raise ValueError(f"distillation type {kind!r} needs a teacher")
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau
        self._teacher = [teacher]  # in a list: neither a submodule nor part of any state dict

    def forward(self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """Args: images ``(B, 3, H, W)``; outputs ``(B, C)``, or a pair of them (class head, distillation head)."""
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, None)
        base_loss = self.base(logits.float(), targets)
        if self.kind == "none":
            return base_loss
        if distilled is None:
            raise ValueError(
                "distillation needs a model with a distillation head, such as "
                "deit_small_distilled_patch16_224; this one returns a single tensor"
            )
        with torch.no_grad():
            teacher_logits = self._teacher[0](images).float()
        distilled = distilled.float()
        if self.kind == "hard":
            distance = F.cross_entropy(distilled, teacher_logits.argmax(dim=1))
        else:
            student, teacher = (F.log_softmax(scores / self.tau, dim=1) for scores in (distilled, teacher_logits))
            distance = F.kl_div(student, teacher, reduction="sum", log_target=True) * self.tau**2 / distilled.numel()
        return base_loss * (1 - self.alpha) + distance * self.alpha
