"""What DeiT is trained on: class folders, tar files, shards, other data sets, and their transforms."""

from deit_irpe.data.datasets import build_dataset, check_same_classes, repeated_augmentation_sampler
from deit_irpe.data.transforms import build_transform

__all__ = ["build_dataset", "build_transform", "check_same_classes", "repeated_augmentation_sampler"]
