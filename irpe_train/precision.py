# SPDX-License-Identifier: Apache-2.0
"""``--amp {bf16,fp16,none}``: autocast, loss scaling, clipping, and the update."""

from collections.abc import Iterable

import torch

from irpe_train.logger import logger

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}


class Precision:
    """The number format of a run, and the only place where weights are updated.

    Args:
        amp: ``bf16``, ``fp16`` (with loss scaling) or ``none``. ``fp16`` on the CPU is ``none``, as published.
        device: where the model is.
    """

    def __init__(self, amp: str, device: torch.device):
        if amp == "fp16" and device.type != "cuda":
            logger.info("--amp fp16 needs CUDA; on the CPU this runs in fp32 (--amp bf16 works there)")
            amp = "none"
        self.amp, self.device = amp, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self) -> torch.autocast:
        """The context for the model's forward pass; losses that need fp32 leave it again."""
        return torch.autocast(self.device.type, dtype=DTYPES[self.amp], enabled=self.amp != "none")

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``, a scalar, scaled under ``fp16``."""
        self.scaler.scale(loss).backward()

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], *, clip: float | None = None
    ) -> None:
        """Update the weights with the accumulated gradients, then clear them.

        Args: clip: largest gradient norm; None or 0 for no clipping.
        """
        if clip:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
