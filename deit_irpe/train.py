# SPDX-License-Identifier: Apache-2.0
"""``main(args)``: a run of DeiT, from the flags to the last line of its log."""

import argparse
from pathlib import Path

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV2
from torch import Tensor, nn, optim
from torch.utils.data import Dataset, DistributedSampler

from deit_irpe.args import check_args, get_args_parser, image_size
from deit_irpe.confusion import MOST_CONFUSED, write_confusion
from deit_irpe.data import (
    build_dataset,
    build_transform,
    check_resumed_classes,
    check_same_classes,
    folder_to_split,
    renumber,
    repeated_augmentation_sampler,
    split_folder,
    stored_classes,
    warn_of_shared_origins,
)
from deit_irpe.engine import evaluate, train_one_epoch
from deit_irpe.losses import DistillationLoss, classification_loss
from deit_irpe.model_stats import count
from deit_irpe.models import (
    RPE_MODELS,
    build_model,
    create_model,
    head_names,
    resample_positions,
    start_from,
    trained_grid,
)
from deit_irpe.optimizer import build_optimizer, build_scheduler, scaled_lr
from irpe_ops.backends.choice import describe
from irpe_ops.modules import buckets_of
from irpe_train import card, distributed
from irpe_train.checkpoint import load_matching, model_weights, read_checkpoint
from irpe_train.distributed import logger
from irpe_train.download import local_file
from irpe_train.errors import BadCheckpoint, blamed_on
from irpe_train.loader import EvalLoader, TrainLoader
from irpe_train.metrics import count_parameters
from irpe_train.precision import Precision
from irpe_train.preemption import STOP
from irpe_train.run import open_run
from irpe_train.run_folder import Checkpoint, Checkpoints
from irpe_train.seeding import seed_everything
from irpe_train.state import TrainState
from irpe_train.zoo import fetch

CHECKPOINT_KEYS = ("model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args")  # published, in order


def main(args: argparse.Namespace) -> None:
    """Train, or with ``--eval`` evaluate."""
    check_args(args)

    # --- device and seed
    STOP.install()
    device = distributed.start(device=args.device, dist_url=args.dist_url, timeout=args.dist_timeout)
    seed_everything(args.seed + distributed.rank(), deterministic=args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic
    precision = Precision(args.amp, device)

    # --- checkpoint
    checkpoints = Checkpoints(args.output_dir, CHECKPOINT_KEYS)
    checkpoint = checkpoints.open(args.resume, evaluate=args.eval)

    # --- data
    val_set = validation_set(args)
    val_loader = validation_loader(args, val_set, device)
    train_set = None if args.eval else training_set(args)
    classes = agree_on_classes(checkpoint, train_set, val_set)
    warn_of_shared_origins(train_set, val_set)

    # --- model
    model = model_of_flags(args, classes, weights=checkpoint is None).to(device)
    logger.info(f"number of params: {count_parameters(model)}")
    logger.info(f"number of buckets: {buckets_of(model)}")

    # --- evaluate only
    if args.eval:
        evaluate_only(args, model, checkpoint, val_set, val_loader, precision)
        return

    # --- optimizer
    loader = training_loader(args, train_set, device)
    lr = scaled_lr(args.lr, loader.batch_size, distributed.world_size(), args.accumulate)
    optimizer, lr_scheduler = build_optimization(args, model, lr)
    criterion = build_criterion(args, classes, device)
    mixup = build_mixup(args, len(classes))
    ema = build_ema(args, model)
    wrapped = distributed.wrap(model, device, compile=args.compile, deterministic=args.deterministic)

    # --- resume
    state = TrainState(model, optimizer, lr_scheduler, ema=ema, scaler=precision.scaler, epoch=args.start_epoch)
    published = {"lr": lr, "nb_classes": len(classes), "distributed": distributed.world_size() > 1}
    state.flags, state.extra = argparse.Namespace(**vars(args) | published), {"classes": list(classes)}
    rows = rows_of_banner(args, model, precision, (len(train_set), len(val_set)), classes, loader.batch_size, lr)
    where = dict(checkpoints=checkpoints, checkpoint=checkpoint, data_flags=("data_path",))
    run = open_run(args, get_args_parser(), state, loader, **where, rows=rows, stats=count(model))

    # --- loop
    options = dict(mixup=mixup, max_norm=args.clip_grad, ema=ema, train_mode=args.train_mode)
    while state.epoch < args.epochs:
        if state.train_stats is None:  # else this epoch was stopped between its training and its evaluation
            train_stats = train_one_epoch(wrapped, criterion, run.steps, optimizer, precision, **options)
            lr_scheduler.step(state.epoch)
            run.steps.finish_training(train_stats)
        test_stats = evaluate(ema.module if args.eval_ema else model, val_loader, precision)
        logger.info(f"Accuracy of the network on the {len(val_set)} test images: {test_stats['acc1']:.1f}%")
        run.finish_epoch(test_stats, figure=test_stats["acc1"])
        logger.info(f"Max accuracy: {state.best:.2f}%")
    run.close()


def evaluate_only(
    args: argparse.Namespace,
    model: nn.Module,
    checkpoint: Checkpoint | None,
    val_set: Dataset,
    val_loader: EvalLoader,
    precision: Precision,
) -> None:
    """``--eval``: the weights of ``--resume`` (or of ``--pretrained``, ``--finetune``) on the validation set."""
    if checkpoint is not None:
        weights = checkpoint.weights("model_ema" if args.eval_ema else "model")
        check_number_of_classes(model, weights, len(val_set.classes), source=checkpoint.source)
        old_grid = trained_grid(model, checkpoint.contents)
        weights, notes = resample_positions(model, weights, old_grid, source=checkpoint.source)
        load_matching(model, weights, source=checkpoint.source)
        for key, note in notes.items():
            logger.info(f"--input-size {args.input_size}: {key} {note}")
    elif not (args.pretrained or args.finetune):
        logger.warning("--eval without --resume: this evaluates a model that was never trained")
    if args.expect:
        source = checkpoint.source if checkpoint is not None else starting_weights(args)
        file = local_file(source) if source else None
        about = dict(checkpoint=file, data=[validation_data(args)])
        row = card.row_to_expect(args.expect, [file.stem if file else "", args.model], figure="acc1", **about)
    number, confusion = len(val_set.classes), None
    if args.output_dir and number <= MOST_CONFUSED:
        confusion = torch.zeros(number, number, dtype=torch.int64)
    stats = evaluate(model, val_loader, precision, confusion)
    logger.info(f"Accuracy of the network on the {len(val_set)} test images: {stats['acc1']:.1f}%")
    if confusion is not None and args.dist_eval:  # else every process has counted all images
        confusion = sum(distributed.gather(confusion))
    if confusion is not None and distributed.is_main():
        files = write_confusion(confusion, list(val_set.classes), Path(args.output_dir))
        logger.info(f"which class was taken for which: {', '.join(map(str, files))}")
    if args.expect and distributed.is_main():
        measured = {"acc1": stats["acc1"], "acc5": stats["acc5"], **count(model)}
        if not card.expect(row, measured, **about, output_dir=args.output_dir):
            raise SystemExit(1)


# --- what the flags stand for


def agree_on_classes(checkpoint: Checkpoint | None, train_set: Dataset | None, val_set: Dataset) -> list[str]:
    """The classes in the order of the head: the training data's, or without them the checkpoint's.

    The labels of ``val_set`` are renumbered where its order differs. Raises: ValueError: other classes.
    """
    stored = stored_classes(checkpoint.contents, source=checkpoint.source) if checkpoint is not None else None
    if train_set is None:
        classes = stored or val_set.classes
    else:
        classes = train_set.classes
        check_same_classes(classes, val_set.classes)
        if checkpoint is not None:
            check_resumed_classes(stored, classes, source=checkpoint.source)
    renumber(val_set, classes, whose="the checkpoint" if train_set is None else "train")
    return classes


def rows_of_banner(
    args: argparse.Namespace,
    model: nn.Module,
    precision: Precision,
    images: tuple[int, int],
    classes: list[str],
    batch_size: int,
    lr: float,
) -> dict[str, str]:
    """What the start of a run says of its data, model and rate; ``images``: how many to train on, to validate on."""
    height, width = getattr(getattr(model, "patch_embed", None), "grid_size", (1, 1))  # only a ViT has an encoding
    with precision.autocast():
        attention = describe(model, batch=batch_size, height=height, width=width, compiled=args.compile)
    mode = "on, with dropout and stochastic depth (the published --finetune: off, --no-train-mode)"
    if not args.train_mode:
        mode = "off, without dropout or stochastic depth, as the published --finetune"
    return {
        "data": f"{images[0]} training and {images[1]} validation images of {len(classes)} classes",
        "model": f"{args.model}, encoding {args.rpe or 'of the name'}, {args.input_size} pixels, amp {precision.amp}",
        "effective lr": f"{lr:g} at the peak, {args.warmup_lr:g} at the start",
        "training mode": mode,
        "attention": attention,
    }


def validation_set(args: argparse.Namespace) -> Dataset:
    """The images of ``val``, prepared as in the published evaluation."""
    transform = build_transform(False, image_size(args.input_size))
    return _images(args, False, transform)


def validation_data(args: argparse.Namespace) -> Path:
    """The folder or archive that ``validation_set`` reads."""
    root = Path(args.data_path)
    if args.val_split is not None:
        return folder_to_split(root)
    return root / ("val.tar" if args.load_tar else "val") if args.data_set == "IMNET" else root


def training_set(args: argparse.Namespace) -> Dataset:
    """The images of ``train``, augmented."""
    transform = build_transform(
        not args.no_aug,
        image_size(args.input_size),
        color_jitter=args.color_jitter,
        aa=None if args.aa == "none" else args.aa,
        hflip=args.hflip,
        interpolation=args.train_interpolation,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
    )
    return _images(args, True, transform)


def _images(args: argparse.Namespace, train: bool, transform) -> Dataset:
    if args.val_split is not None:
        written = Path(args.output_dir, "val_split.txt") if args.output_dir else None
        root = Path(args.data_path)
        return split_folder(root, train, args.val_split, seed=args.seed, written=written, transform=transform)
    options = dict(data_set=args.data_set, load_tar=args.load_tar, inat_category=args.inat_category)
    return build_dataset(args.data_path, train, **options, transform=transform)


def validation_loader(args: argparse.Namespace, val_set: Dataset, device: torch.device) -> EvalLoader:
    """Batches half as large again as in training."""
    return EvalLoader(
        val_set,
        batch_size=int(1.5 * args.batch_size),
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        shard=args.dist_eval,
        name_of=getattr(val_set, "name", None),
    )


def training_loader(args: argparse.Namespace, train_set: Dataset, device: torch.device) -> TrainLoader:
    """Batches of training images; a set smaller than the batch gives one batch an epoch, not none."""
    rank, world_size = distributed.rank(), distributed.world_size()
    if args.repeated_aug:
        sampler = repeated_augmentation_sampler(train_set, world_size, rank)
    else:
        sampler = DistributedSampler(train_set, world_size, rank, shuffle=True, seed=args.seed)
    batch_size = min(args.batch_size, len(sampler) - len(sampler) % 2 if mixes(args) else len(sampler))
    if batch_size < args.batch_size:
        logger.warning(f"{len(sampler)} training samples per process: the batch is {batch_size}, not {args.batch_size}")
    return TrainLoader(
        train_set,
        sampler,
        batch_size=batch_size,
        seed=args.seed,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        name_of=getattr(train_set, "name", None),
    )


def model_of_flags(args: argparse.Namespace, classes: list[str], *, weights: bool) -> nn.Module:
    """The model of ``--model`` and ``--rpe``, with the ``weights`` of ``--pretrained`` or ``--finetune`` if wanted.

    Raises: ValueError: ``--eval`` would evaluate a class head that starts fresh.
    """
    from_zoo = args.pretrained and args.model in RPE_MODELS
    model = build_model(args, len(classes), pretrained=args.pretrained and weights and not from_zoo)
    fresh = []
    if weights and (from_zoo or args.finetune):
        flag, started = "--pretrained" if from_zoo else "--finetune", start_from(model, starting_weights(args), classes)
        notes = {f"{flag}: {key} {what}": key for key, what in started.items()}
        for note in notes:
            logger.info(note)
        heads = tuple(f"{name}." for name in head_names(model))
        fresh = [note for note, key in notes.items() if key.startswith(heads) and "starts fresh" in note]
    elif args.pretrained and weights and (trained_on := model.pretrained_cfg["num_classes"]) != len(classes):
        fresh = [f"--pretrained has {trained_on} classes, the data have {len(classes)}"]
    if fresh and args.eval:
        raise ValueError(f"--eval would evaluate a class head that was never trained: {fresh[0]}")
    if hasattr(model, "set_distilled_training"):  # else both heads are trained together, as they are evaluated
        model.set_distilled_training(args.distillation_type != "none")
    return model


def starting_weights(args: argparse.Namespace) -> str:
    """The file of ``--pretrained`` or ``--finetune``; empty for neither, and for weights that timm fetches."""
    return str(fetch(args.model)) if args.pretrained and args.model in RPE_MODELS else args.finetune


def check_number_of_classes(model: nn.Module, weights: dict[str, Tensor], number: int, *, source: str) -> None:
    """Raises BadCheckpoint if the class head in ``weights`` is of another size: its classes cannot be told apart."""
    for name in head_names(model):
        bias = weights.get(f"{name}.bias")
        if bias is not None and bias.numel() != number:
            raise BadCheckpoint(
                f"checkpoint {source}: its head has {bias.numel()} outputs and names no classes; the data have {number}"
            )


def build_optimization(args: argparse.Namespace, model: nn.Module, lr: float) -> tuple[optim.Optimizer, Scheduler]:
    """Optimizer and learning-rate schedule, with ``lr`` at the peak."""
    optimizer = build_optimizer(
        model,
        name=args.opt,
        lr=lr,
        weight_decay=args.weight_decay,
        eps=args.opt_eps,
        betas=args.opt_betas,
        momentum=args.momentum,
    )
    lr_scheduler = build_scheduler(
        optimizer,
        name=args.sched,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
        noise=args.lr_noise,
        noise_pct=args.lr_noise_pct,
        noise_std=args.lr_noise_std,
        seed=args.seed,
    )
    return optimizer, lr_scheduler


def mixes(args: argparse.Namespace) -> bool:
    """Whether images are mixed, by Mixup or CutMix; batches are even then."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Mixup and CutMix; None where both are off."""
    if not mixes(args):
        return None
    with blamed_on("--mixup*, --cutmix*, --smoothing"):
        return Mixup(
            args.mixup,
            args.cutmix,
            args.cutmix_minmax,
            args.mixup_prob,
            args.mixup_switch_prob,
            args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )


def build_ema(args: argparse.Namespace, model: nn.Module) -> ModelEmaV2 | None:
    """The moving average of the weights; None without ``--model-ema``."""
    if not args.model_ema:
        return None
    return ModelEmaV2(model, args.model_ema_decay, "cpu" if args.model_ema_force_cpu else None)


def build_criterion(args: argparse.Namespace, classes: list[str], device: torch.device) -> DistillationLoss:
    """The loss that goes with the augmentation, and with the teacher if there is one."""
    base = classification_loss(mixes=mixes(args), smoothing=args.smoothing)
    return DistillationLoss(
        base,
        build_teacher(args, classes, device),
        args.distillation_type,
        args.distillation_alpha,
        args.distillation_tau,
    )


def build_teacher(args: argparse.Namespace, classes: list[str], device: torch.device) -> nn.Module | None:
    """The frozen ``--teacher-model`` with the weights of ``--teacher-path``; None without distillation."""
    if args.distillation_type == "none":
        return None
    source = args.teacher_path
    checkpoint = read_checkpoint(source)
    taught = stored_classes(checkpoint, source=source)
    if taught is not None and taught != list(classes):
        check_same_classes(taught, classes, (f"--teacher-path {source}", "the training data"))
        raise ValueError(f"--teacher-path {source}: the training data have its classes in another order")
    teacher = create_model(args.teacher_model, num_classes=len(classes))
    weights = model_weights(checkpoint, source=source)
    check_number_of_classes(teacher, weights, len(classes), source=source)
    load_matching(teacher, weights, source=source)
    return teacher.to(device).eval().requires_grad_(False)
