# SPDX-License-Identifier: Apache-2.0
"""``main(args)``: a run of DETR, from the flags to the last line of its log."""

import argparse
import contextlib
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from detr_irpe.args import MODEL_FLAGS, check_args, get_args_parser
from detr_irpe.check_data import quick_check
from detr_irpe.classes import classes_in, compare_for_evaluation, compare_for_resume
from detr_irpe.data import from_flags as data
from detr_irpe.data.coco_eval import CocoEvaluator
from detr_irpe.data.panoptic_eval import PanopticEvaluator, format_quality
from detr_irpe.engine import evaluate, train_one_epoch
from detr_irpe.model_stats import count
from detr_irpe.models import from_flags as models
from detr_irpe.optimizer import build_optimizer
from irpe_ops.backends.choice import describe
from irpe_ops.modules import buckets_of
from irpe_train import card, distributed
from irpe_train.checkpoint import Checkpoint, load_matching, read_checkpoint, write_checkpoint
from irpe_train.errors import BadCheckpoint, RunError
from irpe_train.launch import launch
from irpe_train.loader import EvalLoader
from irpe_train.logger import logger
from irpe_train.metrics import count_parameters
from irpe_train.precision import Precision
from irpe_train.preemption import STOP
from irpe_train.run import open_run, refuse_other_flags, warn_of_other_flags
from irpe_train.run_folder import Checkpoints
from irpe_train.seeding import seed_everything
from irpe_train.state import TrainState

CHECKPOINT_KEYS = ("model", "optimizer", "lr_scheduler", "epoch", "args")  # published, in this order


@STOP.noting()
def main(args: argparse.Namespace) -> int | None:
    """Train, or with ``--eval`` evaluate. Returns: 1 if ``--expect`` failed."""
    check_args(args)

    # --- device and seed
    device = distributed.start(device=args.device, dist_url=args.dist_url, timeout=args.dist_timeout)
    refuse_other_flags(args)
    seed_everything(args.seed + distributed.rank(), deterministic=args.deterministic)
    precision = Precision(args.amp, device)

    # --- checkpoint
    if args.output_dir:
        refuse_to_replace(Path(args.output_dir) / ("eval.pth" if args.eval else "eval/latest.pth"))
    checkpoints = Checkpoints(args.output_dir, CHECKPOINT_KEYS)
    checkpoint = checkpoints.open(args.resume, evaluate=args.eval)
    start, frozen = models.starting_checkpoints(args) if checkpoint is None else (None, None)

    # --- data
    val_set = data.validation_set(args)
    val_loader = data.validation_loader(args, val_set, device)
    train_set = None if args.eval else data.training_set(args)
    sets = [val_set] if args.eval else [val_set, train_set]
    num_classes = agree_on_classes(args, sets, checkpoint, start, frozen)
    quick_check(sets, num_classes, args.max_bad)

    # --- model
    flags = argparse.Namespace(**vars(args) | {"num_classes": num_classes})  # as in published checkpoints
    filled = args.eval or any((checkpoint, start, frozen))
    things = getattr(val_set, "things", ())  # of a panoptic set
    model, criterion, postprocessors = models.build_model(flags, filled=filled, things=things)
    if checkpoint is None:
        models.start_from(model, args, start, frozen, sets[-1].categories)
    model.to(device)
    criterion.to(device)
    logger.info(f"number of params: {count_parameters(model)}")
    logger.info(f"number of buckets: {buckets_of(model)}")

    # --- evaluate only
    if args.eval:
        return evaluate_only(args, model, checkpoint, start, criterion, postprocessors, val_loader, precision)

    # --- optimizer
    loader = data.training_loader(args, train_set, device)
    optimizer = build_optimizer(args, model, device)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop)  # to a tenth
    wrapped = distributed.wrap(model, device, compile=args.compile, deterministic=args.deterministic)

    # --- resume
    extra = {"categories": train_set.categories}
    state = TrainState(model, optimizer, lr_scheduler, scaler=precision.scaler, flags=flags, extra=extra)
    state.epoch = args.start_epoch
    rows = rows_of_banner(args, model, precision, sets, num_classes)
    about = dict(rows=rows, stats=count(model), data_flags=("coco_path", "coco_panoptic_path"))
    about["judged_by"] = "AP of masks" if args.masks else "AP"
    run = open_run(args, get_args_parser(), state, loader, checkpoints, checkpoint, **about)

    # --- loop
    while state.epoch < args.epochs:
        epoch = state.epoch
        if state.train_stats is None:  # not None: the run was stopped after training this epoch, before its evaluation
            train_stats = train_one_epoch(
                wrapped, criterion, run.steps, optimizer, precision, max_norm=args.clip_max_norm
            )
            lr_scheduler.step()
            kept = (epoch + 1) % args.lr_drop == 0 or (epoch + 1) % 100 == 0
            run.steps.finish_training(train_stats, also=(f"checkpoint{epoch:04}.pth",) if kept else ())
        test_stats, curves = score(args, model, criterion, postprocessors, val_loader, precision)
        rare = [f"eval/{epoch:03}.pth"] if epoch % 50 == 0 else []
        write_eval(args.output_dir, curves, ("eval/latest.pth", *rare))
        judged_by = "coco_eval_masks" if args.masks else "coco_eval_bbox"  # a frozen detector's boxes stay as they are
        run.finish_epoch(test_stats, figure=test_stats[judged_by][0])
    run.close()


def evaluate_only(
    args: argparse.Namespace,
    model: nn.Module,
    checkpoint: Checkpoint | None,
    start: Checkpoint | None,
    criterion: nn.Module,
    postprocessors: dict,
    val_loader: EvalLoader,
    precision: Precision,
) -> int | None:
    """``--eval``: the weights of ``checkpoint``, or of ``start`` (already loaded), on the validation set."""
    if checkpoint is not None:
        warn_of_other_flags(get_args_parser(), args, checkpoint, "Those given now are used", only=MODEL_FLAGS)
        load_matching(model, checkpoint.weights(), source=checkpoint.source)
        compare_for_evaluation(checkpoint, val_loader.dataset.categories)
    elif start is None:
        logger.warning("--eval without --resume: this evaluates a model that was never trained")
    if args.expect is not None:
        source, file = (checkpoint or start or Checkpoint("", {})).source, "annotations/instances_val2017.json"
        expected = card.Expected(args.expect, source, args.enc_rpe2d, figure="AP", data=Path(args.coco_path) / file)
    stats, curves = score(args, model, criterion, postprocessors, val_loader, precision)
    write_eval(args.output_dir, curves, ("eval.pth",))
    if args.expect is not None and distributed.is_main():
        names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
        return expected.meet(dict(zip(names, stats["coco_eval_bbox"], strict=False)) | count(model), args.output_dir)


def score(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: dict,
    val_loader: EvalLoader,
    precision: Precision,
) -> tuple[dict, dict | None]:
    """Evaluate, score and print; returns the ``test_`` figures for ``log.txt``, and the contents of ``eval.pth``."""
    kinds = [kind for kind in ("bbox", "segm") if kind in postprocessors]
    evaluator = CocoEvaluator(val_loader.dataset.annotations, kinds)
    panoptic = None
    if "panoptic" in postprocessors:
        folder = Path(args.output_dir) / "panoptic_eval" if args.output_dir else None
        panoptic = PanopticEvaluator(val_loader.dataset, folder)
    stats = evaluate(model, criterion, postprocessors, val_loader, evaluator, panoptic, precision)
    scored = evaluator.summarize()
    if scored is not None:
        for kind, name in (("bbox", "coco_eval_bbox"), ("segm", "coco_eval_masks")):
            if kind in scored:
                logger.info(f"IoU metric: {kind}\n{scored[kind].text}")
                stats[name] = scored[kind].stats
    quality = panoptic.summarize() if panoptic is not None else None
    if quality is not None:
        logger.info(format_quality(quality))
        stats |= {"PQ_all": quality["All"], "PQ_th": quality["Things"], "PQ_st": quality["Stuff"]}
    return distributed.from_main(stats), scored["bbox"].eval if scored is not None else None


def refuse_to_replace(file: Path) -> None:
    """Raises RunError: where `write_eval` would write, there is a checkpoint."""
    with contextlib.suppress(BadCheckpoint):  # no file, or curves that the published code wrote
        if "precision" not in read_checkpoint(file):
            raise RunError(f"{file} is not a result of an evaluation: move it away, or give another --output_dir")


def write_eval(output_dir: str, curves: dict | None, names: tuple[str, ...]) -> None:
    """Write the scorer's curves under each of ``names``, on the main process, if there is an output folder."""
    if output_dir and curves is not None:
        for name in names:
            write_checkpoint(curves, Path(output_dir) / name)


def agree_on_classes(
    args: argparse.Namespace,
    sets: list[Dataset],
    checkpoint: Checkpoint | None,
    start: Checkpoint | None,
    frozen: Checkpoint | None,
) -> int:
    """The number of class ids of the head: the checkpoint's, unless the run trains a new head."""
    resumed = checkpoint if checkpoint is not None and "optimizer" in checkpoint.contents else None  # else a new run
    if checkpoint is not None and not args.eval:
        continues = resumed is not None and "categories" in resumed.contents  # else they may be a guess
        compare_for_resume(checkpoint, sets[-1].categories, same_run=continues)
    if args.num_classes != "auto":
        return args.num_classes
    if source := (checkpoint or start or frozen) if args.eval else (resumed or frozen):
        return classes_in(source)
    return data.classes_of_data(sets, args.dataset_file)


def rows_of_banner(
    args: argparse.Namespace, model: nn.Module, precision: Precision, sets: list[Dataset], num_classes: int
) -> dict[str, str]:
    """The banner's rows on data, model and learning rate."""
    val_set, train_set = sets
    side = max(args.image_size // 32, 1)  # of a photograph's map, which is about 4 : 3
    shape = dict(batch=args.batch_size, height=side, width=side * 4 // 3)
    with precision.autocast():
        attention = describe(model, **shape, padding=True, dropout_p=args.dropout, compiled=args.compile)
    return {
        "data": f"{len(train_set)} training, {len(val_set)} validation images, {len(train_set.categories)} categories",
        "model": f"{args.backbone}, encoding {args.enc_rpe2d or 'none'}, {num_classes} class ids, amp {precision.amp}",
        "effective lr": f"{args.lr:g}, backbone {args.lr_backbone:g}, a tenth every {args.lr_drop} epoch(s)",
        "attention": attention,
    }


if __name__ == "__main__":
    launch(main, get_args_parser())
