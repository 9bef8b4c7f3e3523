"""``main(args)``: a run of DETR, from the flags to the last line of its log."""

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, DistributedSampler

from detr_irpe.args import check_args, get_args_parser
from detr_irpe.check_data import quick_check
from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.coco_eval import CocoEvaluator, format_figures
from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.data.panoptic_eval import PanopticEvaluator, format_quality
from detr_irpe.data.transforms import eval_transforms, train_transforms
from detr_irpe.engine import evaluate, train_one_epoch
from detr_irpe.models import build_model
from detr_irpe.models.finetune import load_for_finetuning
from detr_irpe.nested_tensor import collate
from irpe_train import card, distributed, zoo
from irpe_train.checkpoint import load_matching, model_weights, read_checkpoint, read_weights, write_checkpoint
from irpe_train.distributed import logger
from irpe_train.loader import EvalLoader, TrainLoader
from irpe_train.metrics import SmoothedValue, count_parameters
from irpe_train.precision import Precision
from irpe_train.preemption import Preemption
from irpe_train.run_log import RunLog, banner, changed_flags, record_start
from irpe_train.seeding import seed_everything
from irpe_train.state import Checkpoints, TrainState
from irpe_train.steps import Steps

CHECKPOINT_KEYS = ("model", "optimizer", "lr_scheduler", "epoch", "args")  # published, in this order


def main(args: argparse.Namespace) -> None:
    """Train, or with ``--eval`` evaluate."""
    check_args(args)
    typed = argparse.Namespace(**vars(args))  # what config.yaml repeats; below, some flags are resolved in place

    # --- device and seed
    device = distributed.start(device=args.device, dist_url=args.dist_url, timeout=args.dist_timeout)
    seed_everything(args.seed + distributed.rank(), deterministic=args.deterministic)
    precision = Precision(args.amp, device)
    differs = changed_flags(
        get_args_parser(),
        args,
        ignore=(
            "config",
            "coco_path",
            "coco_panoptic_path",
            "output_dir",
            "device",
            "num_workers",
            "resume",
            "tensorboard",
        ),
    )

    # --- data
    val_set = build_dataset(args, "val2017", eval_transforms(args.image_size))
    val_loader = EvalLoader(
        val_set,
        batch_size=args.eval_batch_size,
        collate_fn=collate,
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        name_of=val_set.describe,
    )
    sets = [val_set]
    if not args.eval:
        transforms = train_transforms if args.augment == "published" else eval_transforms
        train_set = build_dataset(args, "train2017", transforms(args.image_size))
        sampler = DistributedSampler(train_set, distributed.world_size(), distributed.rank(), seed=args.seed)
        loader = TrainLoader(
            train_set,
            sampler,
            batch_size=args.batch_size,
            seed=args.seed,
            collate_fn=collate,
            num_workers=args.num_workers,
            pin_memory=device.type == "cuda",
            name_of=train_set.describe,
        )
        sets.append(train_set)
    if args.num_classes == "auto":
        args.num_classes = number_of_classes(sets, args.dataset_file)
    for dataset in sets:
        quick_check(dataset, args.num_classes)

    # --- model
    model, criterion, postprocessors = build_model(argparse.Namespace(**vars(args) | {"resume": will_resume(args)}))
    if "panoptic" in postprocessors:
        postprocessors["panoptic"].is_thing_map = {i: i in val_set.things for i in range(args.num_classes)}
    start_from(model, args)
    model.to(device)
    criterion.to(device)
    n_parameters = count_parameters(model)
    logger.info(f"number of params: {n_parameters}")

    # --- evaluate only
    if args.eval:
        evaluate_only(args, model, criterion, postprocessors, val_loader, precision, n_parameters)
        return

    # --- optimizer
    rest, backbone = trainable_parameters(model)
    groups = [{"params": rest}, {"params": backbone, "lr": args.lr_backbone}]
    # fused: several times quicker on the CPU; on GPUs PyTorch's own choice, which loss scaling and old checkpoints fit.
    fused = True if device.type == "cpu" else None
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=fused)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop)
    wrapped = distributed.wrap(model, device, compile=args.compile, deterministic=args.deterministic)

    # --- resume
    state = TrainState(
        model,
        optimizer,
        lr_scheduler,
        scaler=precision.scaler,
        epoch=args.start_epoch,
        extra={"categories": train_set.categories},
    )
    checkpoints = Checkpoints(args.output_dir, args, CHECKPOINT_KEYS)
    resumed = checkpoints.resume(state, args.resume)

    # --- loop
    images_per_step = args.batch_size * distributed.world_size()
    record_start(get_args_parser(), typed)
    banner(
        "run",
        {
            "data": f"{len(train_set)} training and {len(val_set)} validation images, "
            f"{len(train_set.categories)} categories",
            "model": f"{args.backbone}, encoding {args.enc_rpe2d or 'none'}, {args.num_classes} class ids, "
            f"{args.amp} asked for and {precision.amp} used",
            "effective batch": f"{images_per_step * args.accumulate} images an update: {args.batch_size} x "
            f"{distributed.world_size()} process(es) x {args.accumulate} accumulated (published: 16)",
            "effective lr": f"{args.lr:g}, backbone {args.lr_backbone:g}, a tenth every {args.lr_drop} epochs",
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
    state.meters.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
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
                max_norm=args.clip_max_norm,
                header=f"Epoch: [{epoch}]",
                images_per_step=images_per_step,
            )
            lr_scheduler.step()
            kept = (epoch + 1) % args.lr_drop == 0 or (epoch + 1) % 100 == 0
            steps.finish_training(train_stats, also=(f"checkpoint{epoch:04}.pth",) if kept else ())
        test_stats, curves = score(args, model, criterion, postprocessors, val_loader, precision)
        improved = state.best is None or test_stats["coco_eval_bbox"][0] > state.best
        state.best = test_stats["coco_eval_bbox"][0] if improved else state.best
        log.write(
            {
                **{f"train_{name}": value for name, value in state.train_stats.items()},
                **{f"test_{name}": value for name, value in test_stats.items()},
                "epoch": epoch,
                "n_parameters": n_parameters,
            }
        )
        write_eval(args.output_dir, curves, ("eval/latest.pth", f"eval/{epoch:03}.pth")[: 1 + (epoch % 50 == 0)])
        state.next_epoch()
        checkpoints.save(state, also=("best.pth",) if improved else ())
    logger.info(f"Training time {time.strftime('%H:%M:%S', time.gmtime(time.monotonic() - began))}")


def evaluate_only(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: dict,
    val_loader: EvalLoader,
    precision: Precision,
    n_parameters: int,
) -> None:
    """``--eval``: the weights of ``--resume`` (or of ``--pretrained``, ``--finetune``) on the validation set."""
    source = str(Path(args.output_dir) / Checkpoints.NAME) if args.resume == "auto" else args.resume
    if source:
        checkpoint = read_checkpoint(source)
        load_matching(model, model_weights(checkpoint, source=source), source=source)
        here = val_loader.dataset.categories
        trained_on = checkpoint.get("categories", here)
        if any(trained_on.get(i) != name for i, name in here.items()):
            logger.warning(f"checkpoint {source} was trained on the categories {trained_on}, and this set has {here}")
    elif not (args.pretrained or args.finetune):
        logger.warning("--eval without --resume: this evaluates a model that was never trained")
    stats, curves = score(args, model, criterion, postprocessors, val_loader, precision)
    write_eval(args.output_dir, curves, ("eval.pth",))
    if args.expect and distributed.is_main():
        names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
        measured = dict(zip(names, stats["coco_eval_bbox"], strict=False)) | {"n_parameters": n_parameters}
        data = [Path(args.coco_path) / "annotations" / "instances_val2017.json"]
        if not card.expect(
            args.expect,
            [args.pretrained, Path(source).stem, args.enc_rpe2d],
            measured,
            checkpoint=source or args.finetune or None,
            data=data,
            output_dir=args.output_dir,
        ):
            raise SystemExit(1)


def score(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: dict,
    val_loader: EvalLoader,
    precision: Precision,
) -> tuple[dict, dict | None]:
    """Evaluate, score and print; returns what ``log.txt`` has after ``test_``, and what ``eval.pth`` holds."""
    annotations = Path(args.coco_path) / "annotations" / "instances_val2017.json"
    evaluator = CocoEvaluator(annotations, [kind for kind in ("bbox", "segm") if kind in postprocessors])
    panoptic = None
    if "panoptic" in postprocessors:
        folder = Path(args.output_dir) / "panoptic_eval" if args.output_dir else None
        panoptic = PanopticEvaluator(val_loader.dataset, folder)
    stats = evaluate(model, criterion, postprocessors, val_loader, evaluator, panoptic, precision)
    scored = evaluator.summarize()
    if scored is not None:
        for kind, name in (("bbox", "coco_eval_bbox"), ("segm", "coco_eval_masks")):
            if kind in scored:
                logger.info(format_figures(scored[kind].stats, kind))
                stats[name] = scored[kind].stats
    quality = panoptic.summarize() if panoptic is not None else None
    if quality is not None:
        logger.info(format_quality(quality))
        stats |= {"PQ_all": quality["All"], "PQ_th": quality["Things"], "PQ_st": quality["Stuff"]}
    return distributed.from_main(stats), scored["bbox"].eval if scored is not None else None


def write_eval(output_dir: str, curves: dict | None, names: tuple[str, ...]) -> None:
    """Write the scorer's curves under each of ``names``, on the main process, if there is an output folder."""
    if output_dir and curves is not None:
        for name in names:
            write_checkpoint(curves, Path(output_dir) / name)


def build_dataset(args: argparse.Namespace, split: str, transforms: nn.Module) -> Dataset:
    """The split ``train2017`` or ``val2017`` of ``--dataset_file``."""
    if args.dataset_file == "coco_panoptic":
        return CocoPanoptic(args.coco_path, args.coco_panoptic_path, split, transforms, return_masks=args.masks)
    return CocoDetection(args.coco_path, split, transforms, return_masks=args.masks)


def number_of_classes(sets: list[Dataset], dataset_file: str) -> int:
    """``--num_classes auto``: the largest category id plus one; 250, as published, for COCO's panoptic set."""
    largest = max(max(dataset.categories) for dataset in sets)
    return 250 if dataset_file == "coco_panoptic" and largest == 200 else largest + 1


def will_resume(args: argparse.Namespace) -> str:
    """``--resume``, or nothing for an ``auto`` that will find no checkpoint: then the backbone needs its weights."""
    files = [Path(args.output_dir) / name for name in (Checkpoints.NAME, Checkpoints.PREVIOUS)]
    new = args.resume == "auto" and not any(file.exists() for file in files)
    return distributed.from_main("" if new else args.resume)


def start_from(model: nn.Module, args: argparse.Namespace) -> None:
    """Load ``--pretrained``, ``--finetune`` or ``--frozen_weights``, and say what did not carry over."""
    if args.pretrained:
        args.finetune = str(zoo.fetch(args.pretrained))
    if args.finetune:
        for key, what in load_for_finetuning(model, read_weights(args.finetune), source=args.finetune).items():
            logger.info(f"--finetune: {key} {what}")
    if args.frozen_weights:
        load_matching(model.detr, read_weights(args.frozen_weights), source=args.frozen_weights)


def trainable_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All that is trained: outside of the backbone, and in it."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for name, p in trained if "backbone" not in name], [p for name, p in trained if "backbone" in name]
