# SPDX-License-Identifier: Apache-2.0
"""Everything a run must remember, written to a checkpoint and restored from it."""

import argparse

import numpy as np
import torch

from irpe_train.checkpoint import TIMM_KEYS, Checkpoint, load_matching
from irpe_train.distributed import gather, rank, world_size
from irpe_train.errors import BadCheckpoint, in_one_line
from irpe_train.logger import logger
from irpe_train.metrics import MetricLogger
from irpe_train.state_check import MISFITS, load_checked

FORMAT = 1  # of our own keys; increased when an older program could not resume from them


class TrainState:
    """What is trained, and how far it has come.

    Args:
        model: the plain module: neither wrapped nor compiled.
        optimizer, lr_scheduler: anything with ``state_dict``.
        ema: the moving average, an object with ``.module`` (timm's), or None.
        scaler: ``Precision.scaler``.
        flags: of the run, kept in each checkpoint, as published.
        extra: plain values that users of the checkpoint need (class names and the like), kept as top-level keys.

    Attributes:
        epoch, step: the next step to do; set ``epoch`` if a new run does not start at 0.
        best: the best figure so far, None before the first.
        train_stats: this epoch's training statistics once its training is over, None before.
        meters: the averages of the running epoch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer=None,
        lr_scheduler=None,
        *,
        ema=None,
        scaler=None,
        flags: argparse.Namespace | None = None,
        extra: dict | None = None,
    ):
        self.model, self.optimizer, self.lr_scheduler = model, optimizer, lr_scheduler
        self.ema, self.scaler, self.extra = ema, scaler, extra or {}
        self.flags = flags or argparse.Namespace()
        self.epoch = 0
        self.best: float | None = None
        self._fits: list | None = None
        self.start_of_epoch()

    def start_of_epoch(self) -> None:
        self.step, self.train_stats = 0, None
        self.meters = MetricLogger()

    def fit_to(self, steps: int, recipe: int) -> None:
        """Go back to the epoch's start if a restored position counts different steps than this run.

        Args: steps: per epoch. recipe: a number that differs if the same step has other samples.
        """
        here = [steps, world_size(), recipe]
        if self.step and self.train_stats is None and self._fits != here:
            logger.warning(
                f"the checkpoint's step {self.step} of epoch {self.epoch} was counted with another number "
                "of images, processes, batch size or seed: this epoch starts again, with those weights"
            )
            self.start_of_epoch()
        self._fits = here

    def to_dict(self, keys: tuple[str, ...]) -> dict:
        """The checkpoint: ``keys`` first, in this order (published), then ours. Call it on every rank."""
        everything = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            # Published: the last finished epoch. In mid-epoch it is the previous one.
            "epoch": self.epoch if self.train_stats is not None else self.epoch - 1,
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "args": argparse.Namespace(**{name: plain(value) for name, value in vars(self.flags).items()}),
        }
        chosen = {key: everything.pop(key) for key in keys}
        progress = dict(format=FORMAT, epoch=self.epoch, step=self.step, fits=self._fits, best=self.best)
        progress |= dict(train_stats=self.train_stats, meters=gather(self.meters.state_dict()))
        whole = chosen | everything | plain({"progress": progress} | self.extra)
        return {key: value for key, value in whole.items() if value is not None}

    def load(self, checkpoint: Checkpoint) -> bool:
        """Restore from a checkpoint, ours or a published one.

        Returns: whether it had a position and not only weights.
        Raises: BadCheckpoint: it does not fit; the model is checked before anything changes.
        """
        source, contents = checkpoint
        there = {name for name, value in contents.items() if not isinstance(value, dict | None) or value}
        weights, average = checkpoint.weights(), None
        if self.ema is not None and there & {"model_ema", TIMM_KEYS["model_ema"]}:
            average = checkpoint.weights("model_ema")
        load_matching(self.model, weights, source=source)
        if self.ema is not None:
            if average is None:
                logger.warning(f"checkpoint {source} has no moving average: it starts from the weights")
            load_matching(self.ema.module, average or weights, source=source)
        if missing := [name for name in ("optimizer", "lr_scheduler", "epoch") if name not in there]:
            only = f"has weights only (no {', '.join(missing)})"
            logger.warning(f"checkpoint {source} {only}: training starts at epoch {self.epoch}")
            return False
        progress = progress_of(checkpoint)
        # The loss scale is useless to a run that continues under another --amp.
        scaler = self.scaler if self.scaler is not None and self.scaler.is_enabled() else None
        for name, part in (("optimizer", self.optimizer), ("lr_scheduler", self.lr_scheduler), ("scaler", scaler)):
            if part is not None and name in there:
                try:
                    load_checked(part, contents[name], epoch=progress["epoch"])
                except MISFITS as error:
                    raise BadCheckpoint(
                        f"checkpoint {source}: its {name} does not fit this run ({in_one_line(error)}); "
                        "use the flags it was trained with, or --finetune for the weights"
                    ) from error
        self.start_of_epoch()
        self.epoch, self.step, self.best = progress["epoch"], progress["step"], progress["best"]
        self.train_stats, self._fits = progress["train_stats"], progress["fits"]
        if len(progress["meters"]) == world_size():
            self.meters.load_state_dict(progress["meters"][rank()])
        return True


def progress_of(checkpoint: Checkpoint) -> dict:
    """The position of a checkpoint's run: ``epoch, step, best, train_stats, fits, meters``, checked, with defaults.

    Published checkpoints only have the last finished epoch.
    """
    source, contents = checkpoint
    finished, given = contents.get("epoch", -1), contents.get("progress", {})
    progress = {"epoch": None, "step": 0, "best": None, "train_stats": None, "fits": None, "meters": []}
    try:
        if given.get("format", FORMAT) > FORMAT:
            raise BadCheckpoint(
                f"checkpoint {source}: written by a newer version of this program (format "
                f"{given['format']}, expected at most {FORMAT}); update it"
            )
        progress |= {"epoch": finished + 1} | given
        meters = [number for rank in progress["meters"] for meter in rank.values() for number in _numbers(meter)]
        stats, fits = progress["train_stats"] or {}, progress["fits"] or [progress["step"]]
        right = (
            all(type(progress[name]) is int and progress[name] >= 0 for name in ("epoch", "step"))
            and all(isinstance(number, (int, float)) for number in (*meters, *stats.values()))
            and isinstance(progress["best"], int | float | None)
            and all(isinstance(name, str) for name in stats)
            and all(type(number) is int for number in fits)
            and progress["step"] <= fits[0]
        )
    except MISFITS as error:
        if isinstance(error, BadCheckpoint):
            raise
        right = False
    if not right:
        remedy = "use an earlier one, or --finetune for the weights"
        raise BadCheckpoint(f"checkpoint {source}: its position (epoch, progress) makes no sense; {remedy}")
    return progress


def _numbers(meter: dict) -> list:
    return [meter["total"], meter["count"], *meter["window"]]


def plain(value):
    """``value`` from types that ``weights_only=True`` reads back: arrays become fp64 tensors, unknown objects text."""
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (int, float, str, torch.Tensor)):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.float64))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value] if isinstance(value, list) else tuple(plain(item) for item in value)
    return str(value)
