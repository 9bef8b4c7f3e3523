# SPDX-License-Identifier: Apache-2.0
"""``main(args)``: a run of DeiT, from the flags to the last line of its log."""

import argparse
import math
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from deit_irpe.args import check_args, get_args_parser, mixes
from deit_irpe.confusion import MOST_CONFUSED, write_confusion
from deit_irpe.data import from_flags as data
from deit_irpe.data.classes import check_resumed_classes, check_same_classes, renumber, stored_classes
from deit_irpe.data.images import read_a_sample, warn_of_odd_sets
from deit_irpe.engine import evaluate, train_one_epoch
from deit_irpe.load_model import MODEL_FLAGS
from deit_irpe.losses import DistillationLoss, classification_loss
from deit_irpe.model_stats import count
from deit_irpe.models import from_flags as models
from deit_irpe.optimizer import build_optimizer, build_scheduler, scaled_lr
from irpe_ops.backends.choice import describe
from irpe_ops.modules import buckets_of
from irpe_train import card, distributed
from irpe_train.checkpoint import Checkpoint
from irpe_train.launch import launch
from irpe_train.loader import EvalLoader, TrainLoader
from irpe_train.logger import logger
from irpe_train.metrics import count_parameters
from irpe_train.precision import Precision
from irpe_train.preemption import STOP
from irpe_train.run import open_run, refuse_other_flags, warn_of_other_flags
from irpe_train.run_folder import Checkpoints
from irpe_train.seeding import seed_everything
from irpe_train.state import TrainState

CHECKPOINT_KEYS = ("model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args")  # published, in order


@STOP.noting()
def main(args: argparse.Namespace) -> int | None:
    """Train, or with ``--eval`` evaluate. Returns: 1 if ``--expect`` failed."""
    check_args(args)

    # --- device and seed
    device = distributed.start(device=args.device, dist_url=args.dist_url, timeout=args.dist_timeout)
    refuse_other_flags(args)
    seed_everything(args.seed + distributed.rank(), deterministic=args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic
    precision = Precision(args.amp, device)

    # --- checkpoint
    checkpoints = Checkpoints(args.output_dir, CHECKPOINT_KEYS)
    checkpoint = checkpoints.open(args.resume, evaluate=args.eval)

    # --- data
    val_set = data.validation_set(args)
    val_loader = data.validation_loader(args, val_set, device)
    train_set = None if args.eval else data.training_set(args)
    classes = agree_on_classes(checkpoint, train_set, val_set)
    warn_of_odd_sets(train_set, val_set)
    if not args.eval:
        read_a_sample(val_set)

    # --- model
    model = models.model_of_flags(args, classes, weights=checkpoint is None).to(device)
    logger.info(f"number of params: {count_parameters(model)}")
    logger.info(f"number of buckets: {buckets_of(model)}")

    # --- evaluate only
    if args.eval:
        return evaluate_only(args, model, checkpoint, val_loader, precision)

    # --- optimizer
    loader = data.training_loader(args, train_set, device)
    lr = scaled_lr(args.lr, loader.batch_size, distributed.world_size(), args.accumulate)
    optimizer = build_optimizer(args, model, lr)
    lr_scheduler = build_scheduler(args, optimizer)
    if checkpoint is None:
        warn_of_warmup(args)
    criterion = build_criterion(args, classes, device)
    mixup = data.build_mixup(args, len(classes))
    ema = models.build_ema(args, model)
    wrapped = distributed.wrap(model, device, compile=args.compile, deterministic=args.deterministic)

    # --- resume
    published = {"lr": lr, "nb_classes": len(classes), "distributed": distributed.world_size() > 1}
    flags = argparse.Namespace(**vars(args) | published)  # as in published checkpoints
    extra = {"classes": list(classes)}
    state = TrainState(model, optimizer, lr_scheduler, ema=ema, scaler=precision.scaler, flags=flags, extra=extra)
    state.epoch = args.start_epoch
    rows = rows_of_banner(args, model, precision, loader, val_set, lr)
    about = dict(rows=rows, stats=count(model), data_flags=("data_path",), judged_by="top-1 (%)")
    run = open_run(args, get_args_parser(), state, loader, checkpoints, checkpoint, **about)

    # --- loop
    while state.epoch < args.epochs:
        if state.train_stats is None:  # not None: the run was stopped after training this epoch, before its evaluation
            train_stats = train_one_epoch(
                wrapped, criterion, run.steps, optimizer, precision,
                mixup=mixup, max_norm=args.clip_grad, ema=ema, train_mode=args.train_mode,
            )  # fmt: skip
            lr_scheduler.step(state.epoch)
            run.steps.finish_training(train_stats)
        test_stats = evaluate(ema.module if args.eval_ema else model, val_loader, precision)
        logger.info(f"Accuracy of the network on the {len(val_set)} test images: {test_stats['acc1']:.1f}%")
        run.finish_epoch(test_stats, figure=test_stats["acc1"])
        logger.info(f"Max accuracy: {state.best:.2f}%")
    run.close()


def evaluate_only(
    args: argparse.Namespace, model: nn.Module, checkpoint: Checkpoint | None, loader: EvalLoader, precision: Precision
) -> int | None:
    """``--eval``: the weights of ``--resume`` (or of ``--pretrained``, ``--finetune``) on the validation set."""
    classes = loader.dataset.classes
    if checkpoint is not None:
        warn_of_other_flags(get_args_parser(), args, checkpoint, "Those given now are used", only=MODEL_FLAGS)
        key = "model_ema" if args.eval_ema else "model"
        models.load_classifier(model, checkpoint, len(classes), flag=f"--input-size {args.input_size}", key=key)
    elif not (args.pretrained or args.finetune):
        logger.warning("--eval without --resume: this evaluates a model that was never trained")
    if args.expect is not None:
        source = checkpoint.source if checkpoint is not None else models.starting_weights(args)
        expected = card.Expected(args.expect, source, args.model, figure="acc1", data=data.validation_data(args))
    confusion = None
    if args.output_dir and len(classes) <= MOST_CONFUSED:
        confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    stats = evaluate(model, loader, precision, confusion)
    if not math.isfinite(stats["loss"]):  # in training one image must not end the run
        raise ValueError("the model's outputs are not finite: use an earlier checkpoint, or --amp none")
    logger.info(f"Accuracy of the network on the {len(loader.dataset)} test images: {stats['acc1']:.1f}%")
    if confusion is not None and args.dist_eval:  # otherwise every process has counted all images
        confusion = sum(distributed.gather(confusion))
    if confusion is not None and distributed.is_main():
        files = write_confusion(confusion, list(classes), Path(args.output_dir))
        logger.info(f"confusion matrix: {', '.join(map(str, files))}")
    if args.expect is not None and distributed.is_main():
        return expected.meet({"acc1": stats["acc1"], "acc5": stats["acc5"], **count(model)}, args.output_dir)


# --- what the flags mean


def agree_on_classes(checkpoint: Checkpoint | None, train_set: Dataset | None, val_set: Dataset) -> list[str]:
    """The classes in the order of the head: the training data's, or without them the checkpoint's.

    The labels of ``val_set`` are renumbered if its order differs. Raises: ValueError: different classes.
    """
    stored = stored_classes(checkpoint) if checkpoint is not None else None
    if train_set is None:
        classes = stored or val_set.classes
        if checkpoint is not None and stored is None:
            assumed = f"they are assumed to be in the data's order: {', '.join(classes[:3])}, ..."
            logger.info(f"checkpoint {checkpoint.source} does not name its classes; {assumed}")
    else:
        classes = train_set.classes
        check_same_classes(classes, val_set.classes)
        if checkpoint is not None:
            check_resumed_classes(stored, classes, source=checkpoint.source)
    renumber(val_set, classes, whose="the checkpoint" if train_set is None else "train")
    return classes


def warn_of_warmup(args: argparse.Namespace) -> None:
    """Warn if the run ends before its rate is reached: as published, two epochs run at ``--warmup-lr``."""
    if 0 < args.epochs <= args.warmup_epochs + bool(args.warmup_epochs):
        slow = f"all {args.epochs} epoch(s) are warm-up from {args.warmup_lr:g} and stay below the full rate"
        logger.warning(f"--epochs {args.epochs} --warmup-epochs {args.warmup_epochs}: {slow}; try --warmup-epochs 0")


def rows_of_banner(
    args: argparse.Namespace, model: nn.Module, precision: Precision, loader: TrainLoader, val_set: Dataset, lr: float
) -> dict[str, str]:
    """The banner's rows on data, model and learning rate."""
    train_set = loader.dataset
    height, width = getattr(getattr(model, "patch_embed", None), "grid_size", (1, 1))  # only a ViT has an encoding
    encoding = args.rpe or ("from the name" if buckets_of(model) else "none")
    with precision.autocast():
        attention = describe(model, batch=loader.batch_size, height=height, width=width, compiled=args.compile)
    mode = f"on, with dropout {args.drop:g} and stochastic depth {args.drop_path:g}"
    if args.finetune and (args.drop or args.drop_path):
        mode += " (the published --finetune: off, --no-train-mode)"
    if not args.train_mode:
        mode = "off, without dropout or stochastic depth, as the published --finetune"
    warmup = f" after {args.warmup_epochs} epoch(s) of warm-up from {args.warmup_lr:g}" if args.warmup_epochs else ""
    return {
        "data": f"{len(train_set)} training and {len(val_set)} validation images of {len(train_set.classes)} classes",
        "model": f"{args.model}, encoding {encoding}, {args.input_size} pixels, amp {precision.amp}",
        "effective lr": f"{lr:g}{warmup}",
        "training mode": mode,
        "attention": attention,
    }


def build_criterion(args: argparse.Namespace, classes: list[str], device: torch.device) -> DistillationLoss:
    """The loss that goes with the augmentation, and with the teacher if there is one."""
    base = classification_loss(mixes=mixes(args), smoothing=args.smoothing)
    how = args.distillation_type, args.distillation_alpha, args.distillation_tau
    return DistillationLoss(base, models.build_teacher(args, classes, device), *how)


if __name__ == "__main__":
    launch(main, get_args_parser())
