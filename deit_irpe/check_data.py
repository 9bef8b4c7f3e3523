# SPDX-License-Identifier: Apache-2.0
"""``irpe classify check``: find mistakes in a data set before training on it."""

import argparse
from collections import Counter
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from deit_irpe.args import get_check_parser
from deit_irpe.data.classes import check_same_classes
from deit_irpe.data.datasets import build_dataset
from deit_irpe.data.split import split_folder
from irpe_train.errors import RunError
from irpe_train.launch import launch
from irpe_train.loader import try_all
from irpe_train.logger import logger, set_up_logging
from irpe_train.pixels import pixel_hash

MOST_SHOWN = 5  # unreadable images to name


def _label_and_pixels(images: Dataset, index: int) -> tuple[int, bytes]:
    """The class number of an image, and a hash of its pixels."""
    image, label = images[index]
    return label, pixel_hash(image)


def check_split(images: Dataset, num_workers: int) -> tuple[list[int], list[str], Counter[bytes]]:
    """Decode every image. Returns: readable images of each class, why the others are unreadable, and how often each
    picture occurs, by a hash of its pixels.
    """
    counts, reasons, pictures = [0] * len(images.classes), [], Counter()
    for found, reason in try_all(partial(_label_and_pixels, images), range(len(images)), num_workers):
        if reason:
            reasons.append(reason)
        else:
            counts[found[0]] += 1
            pictures[found[1]] += 1
    return counts, reasons, pictures


def main(args: argparse.Namespace) -> int:
    """Print the findings. Returns: 1 if training would stop or a class has no readable image, else 0."""
    set_up_logging(0)
    options = {"data_set": args.data_set, "load_tar": args.load_tar, "inat_category": args.inat_category}
    failed, classes, pictures = False, {}, {}
    for split in ("train", "val"):
        try:
            if args.val_split is None:
                images = build_dataset(args.data_path, split == "train", **options)
            else:
                images = split_folder(Path(args.data_path), split == "train", args.val_split, seed=args.seed)
        except (OSError, ValueError, ImportError, RunError) as error:
            logger.error(f"{split}: {error}")
            failed = True
            continue
        classes[split] = list(images.classes)
        counts, reasons, pictures[split] = check_split(images, args.num_workers)
        logger.info(
            f"{split}: {len(images):,} images of {len(counts)} classes, {min(counts):,} to {max(counts):,} per class"
        )
        for reason in reasons[:MOST_SHOWN]:
            logger.error(f"{split}: {reason}")
        if len(reasons) > MOST_SHOWN:
            logger.error(f"{split}: {len(reasons):,} images cannot be read, {MOST_SHOWN} of them are named above")
        empty = [name for name, count in zip(images.classes, counts, strict=True) if not count]
        if empty:
            logger.error(f"{split}: classes without a readable image: {', '.join(map(repr, empty[:MOST_SHOWN]))}")
        failed |= bool(reasons or empty)
    if len(classes) == 2:
        try:
            check_same_classes(classes["train"], classes["val"])
        except ValueError as error:
            logger.error(str(error))
            failed = True
        if again := sum(number for picture, number in pictures["val"].items() if picture in pictures["train"]):
            logger.warning(f"val: {again:,} of {pictures['val'].total():,} images are in train too, pixel for pixel")
    logger.info("not ready for training: see the errors above" if failed else "ready for training")
    return int(failed)


if __name__ == "__main__":
    launch(main, get_check_parser())
