"""``main(args)``: a run of DeiT, from the flags to the last line of its log."""

import argparse
import time
from pathlib import Path

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV2
from torch import nn
from torch.utils.data import DistributedSampler

from deit_irpe.args import check_args, get_args_parser, image_size, keywords
from deit_irpe.data import build_dataset, build_transform, check_same_classes, repeated_augmentation_sampler
from deit_irpe.engine import evaluate, train_one_epoch
from deit_irpe.losses import DistillationLoss, classification_loss
from deit_irpe.models import create_model, load_pretrained_weights
from deit_irpe.optimizer import build_optimizer, build_scheduler, scaled_lr
from irpe_train import card, distributed
from irpe_train.checkpoint import load_matching, model_weights, read_checkpoint, read_weights
from irpe_train.distributed import logger
from irpe_train.loader import EvalLoader, TrainLoader
from irpe_train.metrics import SmoothedValue, count_parameters
from irpe_train.precision import Precision
from irpe_train.preemption import Preemption
from irpe_train.run_log import RunLog, banner, changed_flags, record_start
from irpe_train.seeding import seed_everything
from irpe_train.state import Checkpoints, TrainState
from irpe_train.steps import Steps

CHECKPOINT_KEYS = ("model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args")  # published, in order


def main(args: argparse.Namespace) -> None:
    """Train, or with ``--eval`` evaluate. ``args.lr`` becomes the scaled rate, as in the published checkpoints."""
    check_args(args)
    typed = argparse.Namespace(**vars(args))  # what config.yaml repeats; below, some flags are resolved in place

    # --- device and seed
    device = distributed.start(device=args.device, dist_url=args.dist_url, timeout=args.dist_timeout)
    seed_everything(args.seed + distributed.rank(), deterministic=args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic
    precision = Precision(args.amp, device)
    differs = changed_flags(
        get_args_parser(),
        args,
        ignore=("config", "data_path", "output_dir", "device", "num_workers", "resume", "tensorboard"),
    )

    # --- data
    size = image_size(args.input_size)
    options = dict(data_set=args.data_set, load_tar=args.load_tar, inat_category=args.inat_category)
    val_set = build_dataset(args.data_path, False, **options, transform=build_transform(False, size))
    val_loader = EvalLoader(
        val_set,
        batch_size=int(1.5 * args.batch_size),
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        shard=args.dist_eval,
        name_of=getattr(val_set, "name", None),
    )
    classes = val_set.classes
    if not args.eval:
        augmentation = dict(
            color_jitter=args.color_jitter,
            aa=None if args.aa == "none" else args.aa,
            hflip=args.hflip,
            interpolation=args.train_interpolation,
            reprob=args.reprob,
            remode=args.remode,
            recount=args.recount,
        )
        train_set = build_dataset(
            args.data_path, True, **options, transform=build_transform(not args.no_aug, size, **augmentation)
        )
        check_same_classes(train_set.classes, classes)

    # --- model
    model = create_model(args.model, args.rpe, **model_options(args, size, len(classes)), pretrained=args.pretrained)
    if args.finetune:
        start_from(model, args.finetune)
    if hasattr(model, "set_distilled_training"):  # else both heads are trained together, as they are evaluated
        model.set_distilled_training(args.distillation_type != "none")
    model.to(device)
    n_parameters = count_parameters(model)
    logger.info(f"number of params: {n_parameters}")

    # --- evaluate only
    if args.eval:
        evaluate_only(args, model, val_set, val_loader, precision, n_parameters)
        return

    # --- optimizer
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    loader = train_loader(args, train_set, even=mixes, pin_memory=args.pin_mem and device.type == "cuda")
    args.lr = scaled_lr(args.lr, loader.batch_size, distributed.world_size(), args.accumulate)
    optimizer = build_optimizer(
        model,
        name=args.opt,
        lr=args.lr,
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
    mixup = (
        Mixup(
            args.mixup,
            args.cutmix,
            args.cutmix_minmax,
            args.mixup_prob,
            args.mixup_switch_prob,
            args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=len(classes),
        )
        if mixes
        else None
    )
    criterion = DistillationLoss(
        classification_loss(mixes=mixes, smoothing=args.smoothing),
        build_teacher(args, len(classes), device),
        args.distillation_type,
        args.distillation_alpha,
        args.distillation_tau,
    )
    ema_device = "cpu" if args.model_ema_force_cpu else None
    ema = ModelEmaV2(model, args.model_ema_decay, ema_device) if args.model_ema else None
    wrapped = distributed.wrap(model, device, compile=args.compile, deterministic=args.deterministic)

    # --- resume
    args.nb_classes, args.distributed = len(classes), distributed.world_size() > 1
    state = TrainState(
        model,
        optimizer,
        lr_scheduler,
        ema=ema,
        scaler=precision.scaler,
        epoch=args.start_epoch,
        extra={"classes": list(classes)},
    )
    checkpoints = Checkpoints(args.output_dir, args, CHECKPOINT_KEYS)
    resumed = checkpoints.resume(state, args.resume)

    # --- loop
    images_per_step = loader.batch_size * distributed.world_size()
    record_start(get_args_parser(), typed)
    banner(
        "run",
        {
            "data": f"{len(train_set)} training and {len(val_set)} validation images of {len(classes)} classes",
            "model": f"{args.model}, encoding {args.rpe or 'of the name'}, {args.input_size} pixels, "
            f"amp {precision.amp}",
            "effective batch": f"{images_per_step * args.accumulate} images an update: {loader.batch_size} x "
            f"{distributed.world_size()} process(es) x {args.accumulate} accumulated",
            "effective lr": f"{args.lr:g} at the peak, {args.warmup_lr:g} at the start",
            "an epoch": f"{len(loader)} steps, {len(loader) * images_per_step} samples",
            "not as published": differs,
        },
    )
    log = RunLog(args.output_dir, epoch=state.epoch, resumed=resumed, tensorboard=args.tensorboard, wandb=args.wandb)
    steps = Steps(
        loader,
        state,
        checkpoints,
        seed=args.seed,
        accumulate=args.accumulate,
        save_interval=args.save_interval,
        max_bad=args.max_bad,
        preemption=Preemption().install(),
    )
    state.meters.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    began = time.monotonic()
    while state.epoch < args.epochs:
        epoch = state.epoch
        if state.train_stats is None:  # else this epoch was stopped between its training and its evaluation
            train_stats = train_one_epoch(
                wrapped,
                criterion,
                steps,
                optimizer,
                precision,
                meters=state.meters,
                mixup=mixup,
                max_norm=args.clip_grad,
                ema=ema,
                header=f"Epoch: [{epoch}]",
                images_per_step=images_per_step,
            )
            lr_scheduler.step(epoch)
            steps.finish_training(train_stats)
        test_stats = evaluate(ema.module if args.eval_ema else model, val_loader, precision)
        improved = state.best is None or test_stats["acc1"] > state.best
        state.best = test_stats["acc1"] if improved else state.best
        logger.info(f"Accuracy of the network on the {len(val_set)} test images: {test_stats['acc1']:.1f}%")
        logger.info(f"Max accuracy: {state.best:.2f}%")
        log.write(
            {
                **{f"train_{name}": value for name, value in state.train_stats.items()},
                **{f"test_{name}": value for name, value in test_stats.items()},
                "epoch": epoch,
                "n_parameters": n_parameters,
            }
        )
        state.next_epoch()
        checkpoints.save(state, also=("best.pth",) if improved else ())
    logger.info(f"Training time {time.strftime('%H:%M:%S', time.gmtime(time.monotonic() - began))}")


def evaluate_only(
    args: argparse.Namespace, model: nn.Module, val_set, val_loader: EvalLoader, precision: Precision, n_parameters: int
) -> None:
    """``--eval``: the weights of ``--resume`` (or of ``--pretrained``, ``--finetune``) on the validation set."""
    source = str(Path(args.output_dir) / Checkpoints.NAME) if args.resume == "auto" else args.resume
    if source:
        checkpoint = read_checkpoint(source)
        if "classes" in checkpoint:
            check_same_classes(checkpoint["classes"], val_set.classes, ("the checkpoint", "the validation data"))
        load_matching(
            model,
            model_weights(checkpoint, source=source, key="model_ema" if args.eval_ema else "model"),
            source=source,
        )
    elif not (args.pretrained or args.finetune):
        logger.warning("--eval without --resume: this evaluates a model that was never trained")
    stats = evaluate(model, val_loader, precision)
    logger.info(f"Accuracy of the network on the {len(val_set)} test images: {stats['acc1']:.1f}%")
    if args.expect and distributed.is_main():
        folder = Path(args.data_path)
        if args.data_set == "IMNET":
            folder = folder / ("val.tar" if args.load_tar else "val")
        measured = {"acc1": stats["acc1"], "acc5": stats["acc5"], "n_parameters": n_parameters}
        if not card.expect(
            args.expect,
            [Path(source).stem, args.model],
            measured,
            checkpoint=source or None,
            data=[folder],
            output_dir=args.output_dir,
        ):
            raise SystemExit(1)


def model_options(args: argparse.Namespace, size: int | tuple[int, int], num_classes: int) -> dict:
    """The arguments of ``create_model`` that the flags stand for."""
    options = dict(
        attn_backend=args.attn_backend, num_classes=num_classes, img_size=size, drop_path_rate=args.drop_path
    )
    if args.drop:  # where DeiT has it: after the positions, and after both layers of attention and MLP
        options |= dict(pos_drop_rate=args.drop, proj_drop_rate=args.drop)
    if args.no_abs_pos:
        options["pos_embed"] = "none"
    return options | keywords(args.model_kwargs)


def start_from(model: nn.Module, source: str) -> None:
    """Load ``--finetune``, and say what did not carry over."""
    checkpoint = read_checkpoint(source)
    trained_at = getattr(checkpoint.get("args"), "input_size", None)
    old_grid = None
    if isinstance(trained_at, int | str) and hasattr(model, "patch_embed"):
        sides, patch = image_size(trained_at), model.patch_embed.patch_size
        sides = (sides, sides) if isinstance(sides, int) else sides
        old_grid = (sides[0] // patch[0], sides[1] // patch[1])
    weights = model_weights(checkpoint, source=source)
    for key, what in load_pretrained_weights(model, weights, old_grid, source=source).items():
        logger.info(f"--finetune: {key} {what}")


def train_loader(args: argparse.Namespace, train_set, *, even: bool, pin_memory: bool) -> TrainLoader:
    """Batches of training images; a set smaller than the batch gives one batch an epoch, not none."""
    rank, world_size = distributed.rank(), distributed.world_size()
    if args.repeated_aug:
        sampler = repeated_augmentation_sampler(train_set, world_size, rank)
    else:
        sampler = DistributedSampler(train_set, world_size, rank, shuffle=True, seed=args.seed)
    batch_size = min(args.batch_size, len(sampler) - len(sampler) % 2 if even else len(sampler))
    if batch_size < args.batch_size:
        logger.warning(f"{len(sampler)} training samples per process: the batch is {batch_size}, not {args.batch_size}")
    return TrainLoader(
        train_set,
        sampler,
        batch_size=batch_size,
        seed=args.seed,
        num_workers=args.num_workers,
        pin_memory=pin_memory,
        name_of=getattr(train_set, "name", None),
    )


def build_teacher(args: argparse.Namespace, num_classes: int, device: torch.device) -> nn.Module | None:
    """The frozen ``--teacher-model`` with the weights of ``--teacher-path``; None without distillation."""
    if args.distillation_type == "none":
        return None
    teacher = create_model(args.teacher_model, num_classes=num_classes)
    load_matching(teacher, read_weights(args.teacher_path), source=args.teacher_path)
    return teacher.to(device).eval().requires_grad_(False)
