# SPDX-License-Identifier: Apache-2.0
"""The data sets of DeiT by name, and repeated augmentation."""

from pathlib import Path

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler
from torchvision import datasets

from deit_irpe.args import SETS
from deit_irpe.data.hugging_face import HuggingFaceImages
from deit_irpe.data.images import FolderImages, INatImages
from deit_irpe.data.shards import ShardImages
from deit_irpe.data.tar_files import TarImages


def build_dataset(
    data_path: str | Path,
    train: bool,
    *,
    data_set: str = "IMNET",
    load_tar: bool = False,
    inat_category: str = "name",
    transform=None,
) -> Dataset:
    """The training or validation set, with ``classes`` (their names, in order).

    Raises: FileNotFoundError, ValueError: something is missing or empty; the message says what was expected.
        ImportError: ``HFDS`` without Hugging Face ``datasets``.
    """
    root, split = Path(data_path), "train" if train else "val"
    if not root.is_dir():
        raise FileNotFoundError(
            f'--data-path {data_path}: no such folder; give the one with train/ and val/ (README, "Data")'
        )
    if data_set == "CIFAR":
        try:
            return datasets.CIFAR100(root, train=train, transform=transform)
        except RuntimeError as error:
            wanted = "Unpack cifar-100-python.tar.gz there"
            raise FileNotFoundError(f"{root}: no cifar-100-python/ there ({error}). {wanted}") from error
    if data_set in ("INAT", "INAT19"):
        return INatImages(root, train, 2018 if data_set == "INAT" else 2019, inat_category, transform)
    if data_set == "WDS":
        return ShardImages(root, train, transform)
    if data_set == "HFDS":
        return HuggingFaceImages(root, train, transform)
    if data_set != "IMNET":
        raise ValueError(f"build_dataset: unknown data_set {data_set!r}; expected one of {', '.join(SETS)}")
    if load_tar:
        return TarImages(root / f"{split}.tar", transform)
    return FolderImages(root / split, transform)


def repeated_augmentation_sampler(dataset: Dataset, world_size: int, rank: int) -> Sampler:
    """Three differently augmented copies of an image in one global batch; an epoch is as long as without them.

    As published, the length is cut to a multiple of 256 images; smaller sets, which would be left empty, are used
    whole. Source: Hoffer et al., "Augment your batch"; Berman et al., "MultiGrain".
    """
    whole = 256 if len(dataset) >= 256 else 0
    return RepeatAugSampler(dataset, world_size, rank, num_repeats=3, selected_round=whole)
