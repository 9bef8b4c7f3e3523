# SPDX-License-Identifier: Apache-2.0
"""Builds the data sets, their loaders and Mixup from the flags."""

import argparse
from pathlib import Path

import torch
from timm.data import Mixup
from torch.utils.data import Dataset, DistributedSampler

from deit_irpe.args import image_size, mixes
from deit_irpe.data.datasets import build_dataset, repeated_augmentation_sampler
from deit_irpe.data.split import folder_to_split, lists_images, split_folder
from deit_irpe.data.transforms import build_transform
from irpe_train import distributed
from irpe_train.errors import blamed_on
from irpe_train.loader import EvalLoader, TrainLoader, fitting_batch


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
        starts = not args.eval and args.resume in ("", "auto")  # uses the list of --finetune, unless it has its own
        source = args.finetune if starts else args.resume or args.finetune
        trained = None if source in ("", "auto") else Path(source).parent / "val_split.txt"
        if starts and trained and (written and written.exists() or not lists_images(trained, Path(args.data_path))):
            trained = None
        lists = dict(written=written, trained=trained)
        return split_folder(Path(args.data_path), train, args.val_split, seed=args.seed, **lists, transform=transform)
    options = dict(data_set=args.data_set, load_tar=args.load_tar, inat_category=args.inat_category)
    return build_dataset(args.data_path, train, **options, transform=transform)


def validation_loader(args: argparse.Namespace, val_set: Dataset, device: torch.device) -> EvalLoader:
    """Batches 1.5 times as large as in training."""
    batch_size = int(1.5 * args.batch_size)
    return EvalLoader(val_set, batch_size=batch_size, shard=args.dist_eval, **_loading(args, device))


def training_loader(args: argparse.Namespace, train_set: Dataset, device: torch.device) -> TrainLoader:
    """Batches of training images; a set smaller than the batch gives one smaller batch per epoch."""
    rank, world_size = distributed.rank(), distributed.world_size()
    if args.repeated_aug:
        sampler = repeated_augmentation_sampler(train_set, world_size, rank)
    else:
        sampler = DistributedSampler(train_set, world_size, rank, shuffle=True, seed=args.seed)
    batch_size = fitting_batch(args.batch_size, len(sampler), multiple=2 if mixes(args) else 1)
    if batch_size < 1:
        raise ValueError("one training image per process, but Mixup and CutMix mix two: add --mixup 0 --cutmix 0")
    return TrainLoader(train_set, sampler, batch_size=batch_size, seed=args.seed, **_loading(args, device))


def _loading(args: argparse.Namespace, device: torch.device) -> dict:
    return dict(num_workers=args.num_workers, pin_memory=args.pin_mem and device.type == "cuda")


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Mixup and CutMix; None if both are off."""
    if not mixes(args):
        return None
    with blamed_on("--mixup*, --cutmix*, --smoothing"):
        kinds = args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode
        return Mixup(*kinds, label_smoothing=args.smoothing, num_classes=num_classes)
