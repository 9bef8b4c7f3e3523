# SPDX-License-Identifier: Apache-2.0
"""Builds the data sets and their loaders from the flags, and counts class ids."""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, DistributedSampler

from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.data.transforms import eval_transforms, train_transforms
from detr_irpe.nested_tensor import collate
from irpe_train import distributed
from irpe_train.loader import EvalLoader, TrainLoader, fitting_batch


def build_dataset(args: argparse.Namespace, split: str, transforms: nn.Module) -> Dataset:
    """The split ``train2017`` or ``val2017`` of ``--dataset_file``."""
    if args.dataset_file == "coco_panoptic":
        instances = Path(args.coco_path) / "annotations" / "instances_val2017.json" if split == "val2017" else None
        return CocoPanoptic(
            args.coco_path, args.coco_panoptic_path, split, transforms, return_masks=args.masks, instances=instances
        )
    return CocoDetection(args.coco_path, split, transforms, return_masks=args.masks)


def validation_set(args: argparse.Namespace) -> Dataset:
    """The images of ``val2017``, prepared as in the published evaluation."""
    return build_dataset(args, "val2017", eval_transforms(args.image_size))


def training_set(args: argparse.Namespace) -> Dataset:
    """The images of ``train2017``, augmented."""
    transforms = train_transforms if args.augment == "published" else eval_transforms
    return build_dataset(args, "train2017", transforms(args.image_size))


def validation_loader(args: argparse.Namespace, val_set: Dataset, device: torch.device) -> EvalLoader:
    """Batches of ``--eval_batch_size`` images."""
    return EvalLoader(val_set, batch_size=args.eval_batch_size, **_loading(args, device))


def training_loader(args: argparse.Namespace, train_set: Dataset, device: torch.device) -> TrainLoader:
    """Batches of images, shuffled; a set smaller than the batch gives one smaller batch per epoch."""
    sampler = DistributedSampler(train_set, distributed.world_size(), distributed.rank(), seed=args.seed)
    batch_size = fitting_batch(args.batch_size, len(sampler))
    return TrainLoader(train_set, sampler, batch_size=batch_size, seed=args.seed, **_loading(args, device))


def _loading(args: argparse.Namespace, device: torch.device) -> dict:
    return dict(collate_fn=collate, num_workers=args.num_workers, pin_memory=device.type == "cuda")


def classes_of_data(sets: list[Dataset], dataset_file: str) -> int:
    """``--num_classes auto``: the largest category id plus one; 250, as published, for COCO's panoptic set."""
    largest = max(max(dataset.categories) for dataset in sets)
    return 250 if dataset_file == "coco_panoptic" and largest == 200 else largest + 1
