# SPDX-License-Identifier: Apache-2.0
"""What surrounds a training step: seeds, agreement between ranks, saves, and clean stops.

The loop of ``engine.py`` iterates over ``Steps``. What must happen at the same step on every rank happens here.
"""

import contextlib
import json
import time
from collections.abc import Iterator

import torch

from irpe_train.agreement import Agreement, Votes
from irpe_train.arguments import parse_save_interval
from irpe_train.distributed import gather, is_main, rank, world_size
from irpe_train.errors import BadData, NonFiniteLoss, RunError
from irpe_train.loader import TrainLoader
from irpe_train.preemption import STOP
from irpe_train.run_folder import Checkpoints
from irpe_train.seeding import mix, seed_step
from irpe_train.state import TrainState
from irpe_train.text_files import write_text


class Steps:
    """The batches of epoch ``state.epoch`` from ``state.step`` on, with everything that surrounds a step.

    Before each batch the generators are seeded from (seed, rank, step). After each, ``state.step`` advances; a due save
    is written; and after a stop signal on any rank all ranks save and exit with ``Preempted``.

    Args:
        seed: the run's seed.
        epochs: of the whole run, for its remaining time.
        accumulate: batches per update.
        save_interval: when to save in mid-epoch, see ``parse_save_interval``; None for never.
        max_bad: the fraction of the training set that may be unreadable before the run stops.
    """

    def __init__(
        self,
        loader: TrainLoader,
        state: TrainState,
        checkpoints: Checkpoints,
        *,
        seed: int,
        epochs: int = 1,
        accumulate: int = 1,
        save_interval: str | None = None,
        max_bad: float = 0.001,
    ):
        self.loader, self.state, self.checkpoints = loader, state, checkpoints
        self.seed, self.epochs, self.accumulate, self.max_bad = seed, epochs, accumulate, max_bad
        self._trained_at, self._between = None, 0.0  # end of an epoch's training; seconds until the next one's start
        self.save_steps, self.save_seconds = parse_save_interval(save_interval) if save_interval else (None, None)
        self._last_save = time.monotonic()
        self._agreement, self._agreed = Agreement(), Votes(0, 0, 0, 0)
        state.fit_to(len(loader), mix(loader.batch_size, accumulate, seed))

    def __len__(self) -> int:
        """Steps in a whole epoch."""
        return len(self.loader)

    def log_every(self, every: int) -> Iterator:
        """The batches; ``state.meters`` report every ``every`` of them, with the remaining time of the run."""
        epochs = max(self.epochs - self.state.epoch, 1)
        return self.state.meters.log_every(
            self,
            every=every,
            header=f"Epoch: [{self.state.epoch}]",
            start=self.state.step,
            images_per_step=self.loader.batch_size * world_size(),
            later=lambda step_time: step_time * len(self) * (epochs - 1) + self._between * epochs,
        )

    def __iter__(self):
        state = self.state
        self._bad_seen = 0
        STOP.training = True
        if self._trained_at is not None:
            self._between = time.monotonic() - self._trained_at
        for batch in self.loader.batches(state.epoch, state.step):
            seed_step(self.seed, rank=rank(), step=state.epoch * len(self) + state.step)
            yield batch
            ended_group = self.group_ends
            state.step += 1
            if ended_group:
                self._save_or_stop()

    @property
    def group_size(self) -> int:
        """Batches in the accumulation group of this step; the last group of an epoch may be smaller."""
        first = self.state.step - self.state.step % self.accumulate
        return min(self.accumulate, len(self) - first)

    @property
    def group_ends(self) -> bool:
        """Whether the weights are updated at this step."""
        return (self.state.step + 1) % self.accumulate == 0 or self.state.step + 1 == len(self)

    def watch(self, loss: torch.Tensor, *, lr: float, terms: dict | None = None) -> None:
        """Ask every rank whether its loss is finite and whether it must stop or save; ``confirm`` gets the answer.

        Args:
            loss: scalar, the mean over this rank's batch.
            lr, terms: for the report if it is not finite; ``terms`` are the parts of the loss by name.
        """
        self._lr = lr
        self._terms = {name: torch.as_tensor(value).detach() for name, value in {"loss": loss, **(terms or {})}.items()}
        stop = STOP.signal is not None
        self._agreement.ask(loss, stop=stop, save=self._save_is_due(), bad_samples=len(self.loader.bad))

    def confirm(self) -> None:
        """Wait for the ranks' answers, before the update.

        Raises:
            NonFiniteLoss: on every rank, if any rank's loss is not finite; a report is written first.
            BadData: on every rank, if too many training images of this epoch are unreadable.
        """
        self._agreed = self._agreement.answer()
        if self._agreed.not_finite:
            self._stop_for_nonfinite_loss()
        if self._agreed.bad_samples > max(self.max_bad * len(self.loader.dataset), self._bad_seen):
            self._stop_if_too_many_are_bad()

    def finish_training(self, stats: dict, also: tuple[str, ...] = ()) -> None:
        """End this epoch's training: remember its statistics and save, before the evaluation, as published.

        Args:
            stats: the training statistics for ``log.txt``.
            also: further file names for the same checkpoint.
        """
        self.state.train_stats = stats
        self.checkpoints.save(self.state, also=also)
        self._last_save = time.monotonic()
        STOP.training = False
        self._trained_at = time.monotonic()
        if any(gather(STOP.signal is not None)):
            STOP.leave()

    def _save_is_due(self) -> bool:
        if self.save_steps:
            return (self.state.step + 1) // self.accumulate % -(-self.save_steps // self.accumulate) == 0
        return bool(self.save_seconds) and is_main() and time.monotonic() - self._last_save >= self.save_seconds

    def _save_or_stop(self) -> None:
        stop = self._agreed.stop > 0
        at_the_end = self.state.step == len(self)  # finish_training is about to save
        if (stop or self._agreed.save) and not at_the_end:
            self.checkpoints.save(self.state)
            self._last_save = time.monotonic()
        if stop and not at_the_end:
            STOP.leave()

    def _stop_for_nonfinite_loss(self) -> None:
        state = self.state
        report = dict(epoch=state.epoch, step=state.step, rank=rank(), lr=self._lr)
        report["finite"] = bool(self._terms["loss"].isfinite().all())
        report["terms"] = {name: float(value) for name, value in self._terms.items()}
        report["samples"] = self.loader.samples(state.step)
        reports = gather(report)
        guilty = [r for r in reports if not r["finite"]]
        where = "no --output_dir, so no report"
        if self.checkpoints.folder:
            path = self.checkpoints.folder / "nonfinite_loss.json"
            where = f"report: {path}; --resume auto continues from the last checkpoint"
            if is_main():
                with contextlib.suppress(OSError, RunError):  # a full disk must not hide the reason
                    write_text(path, json.dumps(guilty, indent=2) + "\n")
        terms = ", ".join(f"{name} {value:g}" for name, value in guilty[0]["terms"].items())
        raise NonFiniteLoss(
            f"loss is not finite on rank {', '.join(str(r['rank']) for r in guilty)} at epoch {state.epoch}, step "
            f"{state.step}: {terms}, lr {self._lr:g}. The weights were not changed ({where}). "
            "Try a lower --lr, gradient clipping, or --amp none."
        )

    def _stop_if_too_many_are_bad(self) -> None:
        self._bad_seen = self._agreed.bad_samples
        bad = {name: reason for of_rank in gather(self.loader.bad) for name, reason in of_rank.items()}
        allowed = self.max_bad * len(self.loader.dataset)
        if len(bad) > allowed:
            some = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:5])
            raise BadData(
                f"{len(bad)} of {len(self.loader.dataset)} training images are unreadable, and --max-bad "
                f"{self.max_bad:g} allows {int(allowed)}: {some}. Fix or remove them, or raise --max-bad."
            )
