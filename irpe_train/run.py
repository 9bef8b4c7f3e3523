# SPDX-License-Identifier: Apache-2.0
"""A training run in its folder: opened once, and written to at the end of every epoch."""

import argparse
import math
import os
import time
from collections.abc import Iterable

from irpe_train.checkpoint import Checkpoint
from irpe_train.distributed import gather, world_size
from irpe_train.errors import RunError
from irpe_train.loader import TrainLoader
from irpe_train.logger import logger
from irpe_train.metrics import clock, count_parameters
from irpe_train.preemption import STOP
from irpe_train.run_folder import Checkpoints
from irpe_train.run_log import RunLog, banner, changed_flags, record_start
from irpe_train.state import TrainState
from irpe_train.steps import Steps

# Flags that say where a run happens, not what it does.
PLACES = ("config", "output_dir", "device", "num_workers", "resume", "tensorboard", "world_size", "dist_url")


def refuse_other_flags(args: argparse.Namespace) -> None:
    """Call it on every rank, first. Files and folders, and `PLACES`, may differ between machines.

    Raises: RunError: on every rank, if a flag of some rank differs; names it.
    """
    flags = {name: str(value) for name, value in vars(args).items() if name not in PLACES}
    first, *others = gather({name: text for name, text in flags.items() if not os.path.exists(text)})
    for number, other in enumerate(others, 1):
        for name in filter(other.__contains__, first):
            if first[name] != other[name]:
                different = f"--{name} is {first[name]!r} on rank 0 and {other[name]!r} on rank {number}"
                raise RunError(f"{different}: start every rank with the same flags")


def open_run(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    state: TrainState,
    loader: TrainLoader,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
    *,
    rows: dict[str, str],
    stats: dict[str, float],
    data_flags: tuple[str, ...],
    judged_by: str = "top-1 (%) or AP",
) -> "Run":
    """Restore ``state`` from ``checkpoint``, record the start, print the banner, and open the log.

    Args:
        args: as typed; only the flags of ``add_runtime_arguments`` are read. parser: of these flags.
        checkpoint: from ``Checkpoints.open``; None for a new run.
        rows: lines of the banner on data, model and rate. stats: the model in numbers, for ``model.json``.
        data_flags: flags that are paths to data. judged_by: the name of the figure of an epoch.
    """
    resumed = checkpoint is not None and state.load(checkpoint)
    if resumed:
        if checkpoints.folder and not (checkpoints.folder / Checkpoints.BEST).exists():
            state.best = None  # the best epoch's checkpoint is elsewhere: this folder gets the best from here on
        then = ", to be evaluated" if state.train_stats is not None else ""
        logger.info(f"resumed from {checkpoint.source}: epoch {state.epoch}, step {state.step}{then}")
        then = "Its optimizer and schedule continue unchanged"
        lasts = getattr(state.lr_scheduler, "get_cycle_length", lambda: args.epochs)()  # timm's; steps have no end
        if lasts < args.epochs:
            then += f": it ends after {lasts} epoch(s), and later ones keep its lowest rate. "
            then += "For a new schedule, start a run in another folder with --finetune FILE"
        warn_of_other_flags(parser, state.flags, checkpoint, then, ignore=(*data_flags, "start_epoch", "save_interval"))
    elif checkpoint is not None and (old := checkpoints.there()):
        raise RunError(
            f"--output_dir {args.output_dir}: a new run from {checkpoint.source} would replace {', '.join(old)}: "
            "choose another folder, and give the weights with --finetune"
        )
    elif state.epoch >= args.epochs:
        logger.warning(f"--start_epoch {state.epoch} --epochs {args.epochs}: nothing to train; give more --epochs")
    if done := resumed and state.epoch >= args.epochs:
        logger.info(f"nothing left to train: {state.epoch} epoch(s) are done, --epochs is {args.epochs}")
    if not (done and checkpoints.own):  # config.yaml stays that of the training
        record_start(parser, args, stats)
    images = loader.batch_size * world_size()
    product = f"{loader.batch_size} x {world_size()} process(es) x {args.accumulate} accumulated"
    rows = rows | {
        "effective batch": f"{images * args.accumulate} images per update: {product}",
        "an epoch": f"{len(loader)} steps, {len(loader) * images} samples",
        "output": args.output_dir or "none: without --output_dir nothing is written",
        "other than default": "\n".join(changed_flags(parser, args, PLACES + data_flags)) or "nothing",
    }
    if resumed:
        rates = ", ".join(dict.fromkeys(f"{group['lr']:g}" for group in state.optimizer.param_groups))
        rows["effective lr"] = f"{rates} now, then as the checkpoint's schedule says"
    banner("run", rows)
    boards = dict(tensorboard=args.tensorboard, wandb=args.wandb)
    log = RunLog(args.output_dir, epoch=state.epoch, resumed=resumed and checkpoints.own, **boards)
    given = dict(seed=args.seed, epochs=args.epochs, accumulate=args.accumulate, max_bad=args.max_bad)
    steps = Steps(loader, state, checkpoints, save_interval=args.save_interval, **given)
    return Run(state, checkpoints, log, steps, judged_by)


def warn_of_other_flags(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    advice: str,
    *,
    ignore: tuple[str, ...] = (),
    only: Iterable[str] | None = None,
) -> None:
    """Warn if ``args`` differ from the flags that the checkpoint was trained with."""
    there = checkpoint.contents.get("args")
    stored = vars(there) if isinstance(there, argparse.Namespace) else {}
    stored = {name: value for name, value in stored.items() if only is None or name in only}
    if others := changed_flags(parser, args, PLACES + ignore, stored):
        logger.warning(f"flags differ from the checkpoint's: {', '.join(others)}. {advice}")


class Run:
    """A run in progress: ``steps`` gives the batches; the methods end an epoch, and the run."""

    def __init__(self, state: TrainState, checkpoints: Checkpoints, log: RunLog, steps: Steps, judged_by: str):
        self.state, self.checkpoints, self.log, self.steps = state, checkpoints, log, steps
        self.judged_by = judged_by
        self._began = time.monotonic()

    def finish_epoch(self, test_stats: dict, *, figure: float) -> None:
        """After the evaluation: log the epoch, move on, save.

        Args:
            test_stats: logged in ``log.txt`` as ``test_*``.
            figure: for comparing epochs; the best one's checkpoint is kept as ``best.pth``.
        """
        state = self.state
        improved = state.best is None or figure > state.best or math.isnan(state.best)
        state.best = figure if improved else state.best
        line = {f"train_{name}": value for name, value in state.train_stats.items()}
        line |= {f"test_{name}": value for name, value in test_stats.items()}
        self.log.write(line | {"epoch": state.epoch, "n_parameters": count_parameters(state.model)})
        state.epoch += 1
        state.start_of_epoch()
        self.checkpoints.save(state, also=(Checkpoints.BEST,) if improved else ())
        if any(gather(STOP.signal is not None)):
            STOP.leave()

    def close(self) -> None:
        """After the last epoch: report how long it took, and what is written where."""
        logger.info(f"Training time {clock(time.monotonic() - self._began)}")
        if (folder := self.checkpoints.folder) is None:
            return
        written = {
            Checkpoints.BEST: f"the epoch with the best {self.judged_by}: {self.state.best or 0:.4g}",
            Checkpoints.NAME: "the last epoch; --resume auto continues from it",
            "log.txt": "a line of figures per epoch",
            f"detail_{folder.resolve().name}.log": "all console output, with every term of every tenth step",
            "eval": "COCO's curves: the last epoch's and those of every 50th",
            "tensorboard": "the same figures for TensorBoard",
            "config.yaml": "the flags of this run, for --config",
        }
        banner(f"written to {folder}", {name: what for name, what in written.items() if (folder / name).exists()})
