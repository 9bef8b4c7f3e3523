# SPDX-License-Identifier: Apache-2.0
"""Running averages and progress of a loop. A value is copied to the CPU only when it is printed."""

import datetime
import logging
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

from irpe_train.distributed import gather, is_main
from irpe_train.logger import logger

# These show their last value; everything else shows median and mean.
LAST_VALUE = {"lr": "{value:.6f}", "class_error": "{value:.2f}"}
# The terms that the console shows; the detail log has all (see logger.log_details).
FEW = ("lr", "class_error", "loss", "acc1")


class SmoothedValue:
    """A series of numbers: the last ``window_size`` of them, and the mean of all.

    Args: fmt: may use ``median``, ``avg``, ``max`` (of the window), ``value`` (the last) and ``global_avg``.
    """

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})"):
        self.window: deque[float] = deque(maxlen=window_size)
        self.fmt = fmt
        self.total, self.count = 0.0, 0

    def update(self, value: float, n: int = 1) -> None:
        """Add ``value``, the mean over ``n`` items."""
        self.window.append(value)
        self.total += value * n
        self.count += n

    @property
    def avg(self) -> float:
        return statistics.fmean(self.window) if self.window else 0.0

    @property
    def global_avg(self) -> float:
        return self.total / self.count if self.count else 0.0

    def text(self, global_avg: float) -> str:
        """Formatted by ``fmt``, with this mean, which may be over all ranks."""
        window = self.window or [0.0]
        of_window = dict(median=statistics.median_low(window), avg=self.avg, max=max(window), value=window[-1])
        return self.fmt.format(global_avg=global_avg, **of_window)

    def __str__(self) -> str:
        return self.text(self.global_avg)


class MetricLogger:
    """Named ``SmoothedValue`` s, updated with device tensors that are read only when a value is needed.

    Means are over iterations (or over ``n``); over ranks, sums and counts are added before dividing, as published.
    """

    def __init__(self):
        self._meters: dict[str, SmoothedValue] = {}
        self._pending: list[tuple[list[str], int, torch.Tensor]] = []

    def update(self, n: int = 1, **values: float | torch.Tensor) -> None:
        """Add one value each, the mean over ``n`` items. Tensors are scalars, on any device."""
        tensors = {name: value.detach() for name, value in values.items() if isinstance(value, torch.Tensor)}
        for name, value in values.items():
            self._meter(name)
            if name not in tensors:
                self._meters[name].update(float(value), n)
        by_device: dict = {}
        for name, tensor in tensors.items():
            by_device.setdefault((tensor.device, tensor.dtype), {})[name] = tensor.reshape(())
        for group in by_device.values():
            self._pending.append((list(group), n, torch.stack(list(group.values()))))

    def _meter(self, name: str) -> SmoothedValue:
        if name not in self._meters:
            self._meters[name] = SmoothedValue(1, LAST_VALUE[name]) if name in LAST_VALUE else SmoothedValue()
        return self._meters[name]

    @property
    def meters(self) -> dict[str, SmoothedValue]:
        """All meters, up to date: this is where values reach the CPU."""
        pending, self._pending = self._pending, []
        for names, n, values in pending:
            for name, value in zip(names, values.double().tolist(), strict=True):
                self._meters[name].update(value, n)
        return self._meters

    def averages(self) -> dict[str, float]:
        """Name to mean over all iterations of all ranks; call it on every rank. A rank may have no values.

        They are also printed in the published form: all of them, unless a detail log has them.
        """
        totals: dict[str, list[float]] = {}
        for of_rank in gather({name: (meter.total, meter.count) for name, meter in self.meters.items()}):
            for name, (total, count) in of_rank.items():
                entry = totals.setdefault(name, [0.0, 0])
                entry[0] += total
                entry[1] += count
        means = {name: total / count if count else 0.0 for name, (total, count) in totals.items()}
        texts = {name: f"{name}: {meter.text(means[name])}" for name, meter in self.meters.items()}
        elsewhere = any(isinstance(handler, logging.FileHandler) for handler in logger.handlers)
        few = [text for name, text in texts.items() if name in FEW or not elsewhere]
        logger.info(f"Averaged stats: {'  '.join(few)}", extra={"only": "console"})
        logger.info(f"Averaged stats: {'  '.join(texts.values())}", extra={"only": "file"})
        return means

    def state_dict(self) -> dict:
        meters = self.meters.items()
        return {name: {"total": m.total, "count": m.count, "window": list(m.window)} for name, m in meters}

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state``; call it before the first update."""
        for name, saved in state.items():
            meter = self._meter(name)
            meter.total, meter.count = saved["total"], saved["count"]
            meter.window.extend(saved["window"])

    def __str__(self) -> str:
        return "  ".join(f"{name}: {meter}" for name, meter in self.meters.items() if meter.count)

    def log_every(
        self,
        iterable: Iterable,
        *,
        every: int = 10,
        header: str = "",
        start: int = 0,
        images_per_step: int | None = None,
        later: Callable[[float], float] | None = None,
    ) -> Iterator:
        """Yield from ``iterable`` and report every ``every`` steps.

        Lines have ``FEW`` terms on the console and, as published, all terms in the detail log.

        Args:
            iterable: has a ``len``, the steps of the whole epoch.
            start: the step to start at, if the epoch was interrupted.
            images_per_step: over all ranks, for the images per second.
            later: seconds per step -> seconds that the run takes after this epoch.
        """
        total, began = len(iterable), time.monotonic()
        ready = began
        step_time, data_time = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        for step, batch in enumerate(iterable, start):
            data_time.update(time.monotonic() - ready)
            yield batch
            step_time.update(time.monotonic() - ready)
            ready = time.monotonic()
            if is_main() and (step % every == 0 or step + 1 == total):
                left = step_time.avg * (total - step - 1)
                speed = f"{images_per_step / max(step_time.avg, 1e-9):.0f} img/s" if images_per_step else ""
                run = f"run: {clock(left + later(step_time.avg))}" if later else ""
                where = header, f"[{step:{len(str(total))}d}/{total}]", f"eta: {clock(left)}"
                few = [f"{name}: {meter}" for name, meter in self.meters.items() if name in FEW and meter.count]
                memory = _memory() if step + 1 == total else ""
                logger.info(_joined(*where, *few, speed, run, memory), extra={"only": "console"})
                full = str(self), f"time: {step_time}  data: {data_time}", _memory(), speed
                logger.info(_joined(*where, *full), extra={"only": "file"})  # as published, plus the speed
        spent = time.monotonic() - began
        if (done := total - start) > 0:
            logger.info(f"{header} Total time: {clock(spent)} ({spent / done:.4f} s / it)")


def _joined(*parts: str) -> str:
    return "  ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """``h:mm:ss``, after a day ``1 day, h:mm:ss``."""
    return str(datetime.timedelta(seconds=int(seconds)))


def _memory() -> str:
    """The peak memory so far: of the GPU if it is used, else of the process; MiB."""
    if torch.cuda.is_initialized():
        return f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"max mem: {peak / (2**20 if sys.platform == 'darwin' else 2**10):.0f}"


def count_parameters(model: torch.nn.Module) -> int:
    """Trainable parameters, as in ``log.txt``."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
