"""Running averages of a loop and its progress on the console. A value reaches the CPU when it is printed."""

import datetime
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from irpe_train.distributed import gather, is_main, logger

# What is shown of these is the last value; of everything else median and mean.
LAST_VALUE = {"lr": "{value:.6f}", "class_error": "{value:.2f}"}


class SmoothedValue:
    """A series of numbers: the last ``window`` of them, and the mean of all.

    Args:
        fmt: may use ``median``, ``avg`` (both of the window), ``global_avg``, ``max`` and ``value`` (the last).
    """

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})"):
        self.window: deque[float] = deque(maxlen=window_size)
        self.fmt = fmt
        self.total, self.count = 0.0, 0

    def update(self, value: float, n: int = 1) -> None:
        """Add ``value``, the mean over ``n`` things."""
        self.window.append(value)
        self.total += value * n
        self.count += n

    @property
    def median(self) -> float:
        return statistics.median_low(self.window) if self.window else 0.0

    @property
    def avg(self) -> float:
        return statistics.fmean(self.window) if self.window else 0.0

    @property
    def global_avg(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def max(self) -> float:
        return max(self.window, default=0.0)

    @property
    def value(self) -> float:
        return self.window[-1] if self.window else 0.0

    def reset(self) -> None:
        self.window.clear()
        self.total, self.count = 0.0, 0

    def text(self, global_avg: float) -> str:
        """As ``fmt`` says, with this mean: that of all ranks where they were asked."""
        return self.fmt.format(median=self.median, avg=self.avg, global_avg=global_avg, max=self.max, value=self.value)

    def __str__(self) -> str:
        return self.text(self.global_avg)


class MetricLogger:
    """Named ``SmoothedValue`` s, updated with device tensors that are only read when someone looks.

    Means are over iterations (or over ``n``); over ranks, sums and counts are added before dividing, as published.
    """

    def __init__(self):
        self._meters: dict[str, SmoothedValue] = {}
        self._pending: list[tuple[list[str], int, torch.Tensor]] = []

    def update(self, n: int = 1, **values: float | torch.Tensor) -> None:
        """Add one value each; ``n`` is how many things it is the mean of. Tensors are scalars, on any device."""
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
        """Name to mean over all iterations of all ranks; call it on every rank. A rank may have seen nothing.

        They are printed too, in the published words.
        """
        totals: dict[str, list[float]] = {}
        for of_rank in gather({name: (meter.total, meter.count) for name, meter in self.meters.items()}):
            for name, (total, count) in of_rank.items():
                entry = totals.setdefault(name, [0.0, 0])
                entry[0] += total
                entry[1] += count
        means = {name: total / count if count else 0.0 for name, (total, count) in totals.items()}
        shown = [f"{name}: {meter.text(means[name])}" for name, meter in self.meters.items()]
        logger.info(f"Averaged stats: {'  '.join(shown)}")
        return means

    def reset(self) -> None:
        """Forget all values; formats and windows stay."""
        self._pending.clear()
        for meter in self._meters.values():
            meter.reset()

    def state_dict(self) -> dict:
        return {
            name: {"total": meter.total, "count": meter.count, "window": list(meter.window)}
            for name, meter in self.meters.items()
        }

    def load_state_dict(self, state: dict) -> None:
        self._pending.clear()
        for name, saved in state.items():
            meter = self._meter(name)
            meter.total, meter.count = saved["total"], saved["count"]
            meter.window.clear()
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
    ) -> Iterator:
        """Yield from ``iterable`` and report: a moving bar on a terminal, else a line every ``every`` steps.

        Args:
            iterable: has a ``len``, the steps of the whole epoch.
            start: the step this starts at, when the epoch was interrupted.
            images_per_step: of all ranks together, for the images per second.
        """
        total, began, ready = len(iterable), time.monotonic(), time.monotonic()
        step_time, data_time = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        bar = sys.stdout.isatty() and is_main()
        drawn = 0.0
        for step, batch in enumerate(iterable, start):
            data_time.update(time.monotonic() - ready)
            yield batch
            step_time.update(time.monotonic() - ready)
            ready = time.monotonic()
            last = step + 1 == total
            if (bar and ready - drawn > 0.2) or (not bar and step % every == 0) or last:
                drawn = ready
                if is_main():
                    speed = images_per_step / max(step_time.avg, 1e-9) if images_per_step else None
                    self._report(bar, header, step, total, step_time, data_time, speed)
        spent = time.monotonic() - began
        done = max(total - start, 0)
        if bar and done:
            sys.stdout.write("\n")
        if done:
            logger.info(f"{header} Total time: {_clock(spent)} ({spent / done:.4f} s / it)")

    def _report(self, bar, header, step, total, step_time, data_time, speed) -> None:
        eta = _clock(step_time.avg * (total - step - 1))
        images = f"{speed:.0f} img/s" if speed else ""
        if bar:
            filled = 20 * (step + 1) // total
            few = "  ".join(
                f"{name} {meter.avg:.4g}"
                for name, meter in self.meters.items()
                if meter.count and name in ("loss", "lr", "class_error", "acc1")
            )
            text = f"{header} [{'#' * filled}{'.' * (20 - filled)}] {step + 1}/{total}  {few}  {images}  eta {eta}"
            sys.stdout.write(f"\r\x1b[2K{text}")
            sys.stdout.flush()
            return
        width = len(str(total))
        parts = [
            header,
            f"[{step:{width}d}/{total}]",
            f"eta: {eta}",
            str(self),
            f"time: {step_time}",
            f"data: {data_time}",
            f"max mem: {_memory_mb():.0f}",
            images,  # last, so that what comes before is the published line
        ]
        logger.info("  ".join(part for part in parts if part))


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


def _memory_mb() -> float:
    """The most memory taken so far: of the GPU if there is one, else of the process; MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def count_parameters(model: torch.nn.Module) -> int:
    """Trainable parameters, as ``log.txt`` has them."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
