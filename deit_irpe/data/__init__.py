# SPDX-License-Identifier: Apache-2.0
"""DeiT's data: class folders, tar files, shards and other sets, their classes and transforms."""

from deit_irpe.data.datasets import build_dataset

__all__ = ["build_dataset"]
