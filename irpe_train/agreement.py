# SPDX-License-Identifier: Apache-2.0
"""What the ranks agree on at every step: one small all-reduce, which overlaps the backward pass."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from irpe_train.distributed import report_lost_ranks, world_size


class Votes(NamedTuple):
    """The votes of one rank, or their sum over all ranks."""

    not_finite: float
    stop: float
    save: float
    bad_samples: float


class Agreement:
    """``ask`` sends this rank's votes, ``answer`` waits for the sum over all ranks. Call both on every rank."""

    def __init__(self):
        self._message = self._work = self._arrived = None
        self._side = self._host = None  # CUDA: a stream and a pinned buffer, made when first needed

    def ask(self, loss: torch.Tensor, *, stop: bool, save: bool, bad_samples: int) -> None:
        """Vote on whether this rank's ``loss`` is finite, whether to stop or save, and count unreadable images.

        Nothing is read back here. ``answer`` is called once the backward pass is queued, and waits only for the
        forward pass, so the device never idles.
        """
        votes = torch.tensor(Votes(0, stop, save, bad_samples), dtype=torch.float32)
        self._message = votes.to(loss.device, non_blocking=True)
        self._message[0] = (~loss.detach().isfinite().all()).float()
        with report_lost_ranks("step"):
            self._work = dist.all_reduce(self._message, async_op=True) if world_size() > 1 else None
        if loss.device.type == "cuda":
            self._copy_during_backward()

    def _copy_during_backward(self) -> None:
        device = self._message.device
        if self._side is None:
            self._side = torch.cuda.Stream(device)
            self._host = torch.zeros(len(Votes._fields), pin_memory=True)
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            if self._work is not None:
                self._work.wait()
            self._host.copy_(self._message, non_blocking=True)
            self._message.record_stream(self._side)
            self._arrived = self._side.record_event()

    def answer(self) -> Votes:
        """The sum of all ranks' votes."""
        with report_lost_ranks("step"):
            if self._arrived is not None:
                self._arrived.synchronize()
                return Votes(*self._host.tolist())
            if self._work is not None:
                self._work.wait()
            return Votes(*self._message.tolist())
