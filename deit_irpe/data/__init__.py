# SPDX-License-Identifier: Apache-2.0
"""DeiT's data: class folders, tar files, shards and other sets, their classes and transforms."""

from deit_irpe.data.classes import check_resumed_classes, check_same_classes, renumber, stored_classes
from deit_irpe.data.datasets import build_dataset
from deit_irpe.data.images import warn_of_odd_sets
from deit_irpe.data.split import split_folder
from deit_irpe.data.transforms import build_transform

__all__ = [
    "build_dataset",
    "build_transform",
    "check_resumed_classes",
    "check_same_classes",
    "renumber",
    "split_folder",
    "stored_classes",
    "warn_of_odd_sets",
]
