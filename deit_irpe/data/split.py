# SPDX-License-Identifier: Apache-2.0
"""One folder of classes becomes a training and a validation set: ``--val-split``."""

import os
from pathlib import Path

import numpy as np

from deit_irpe.data.images import FolderImages, same_text
from irpe_train.distributed import is_main
from irpe_train.logger import logger
from irpe_train.text_files import read_text, write_text


def split_folder(
    root: Path,
    train: bool,
    fraction: float,
    *,
    seed: int = 0,
    written: Path | None = None,
    trained: Path | None = None,
    transform=None,
) -> FolderImages:
    """The training or the validation part of ``root/train``, or of ``root`` if there is no such folder.

    The same share of each class is held out, at least one image; which ones depends only on the names and ``seed``.

    Args:
        written: a file that lists the held-out images, one per line. If it exists, it decides: its images stay held
            out, and images added later are trained on. Otherwise it is written.
        trained: such a file from the run that the weights come from; it takes precedence.
    Raises: ValueError: all or none of a class would be held out; there is a validation folder, or a name with a line
        break; a file on the list is gone.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--val-split {fraction:g}: give the share of images to hold out, such as 0.2")
    if (root / "val").exists():
        raise ValueError(f"--val-split: {root / 'val'} already exists; leave out --val-split, or move that folder")
    folder = folder_to_split(root)
    images = FolderImages(folder, transform)
    names = [same_text(Path(images.name(index)).relative_to(folder).as_posix()) for index in range(len(images))]
    if broken := [name for name in names if len(name.splitlines()) > 1]:
        raise ValueError(f"--val-split: {broken[0]!r} has a line break in its name; rename this file")
    file = next((file for file in (trained, written) if file is not None and os.path.lexists(file)), None)
    if file is not None:
        listed = set(filter(None, same_text(read_text(file, errors="surrogateescape")).splitlines()))
        if gone := sorted(listed - set(names)):
            raise ValueError(
                f"{file}: {gone[0]} is not in {folder}; {len(gone)} of {len(listed)} are not: restore or unlist them"
            )
        held_out = np.array([name in listed for name in names])
        for label, name in enumerate(images.classes):
            held = held_out[images.labels == label]
            if held.all() or not held.any():
                count = f"{held.sum()} of {len(held)} images of class {name!r} are held out"
                raise ValueError(f"{file}: {count}; expected some, not all. Edit the list, or remove it")
        if not train:
            logger.info(f"--val-split: {held_out.sum()} of {len(images)} images are held out, as {file} lists")
    else:
        if trained is not None and not train:
            logger.warning(f"{trained}: no such list, so --seed {seed} holds out images; some may have been trained on")
        held_out = _draw(images, fraction, seed)
    if written is not None and not os.path.lexists(written) and is_main():
        written.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{name}\n" for name, held in zip(names, held_out, strict=True) if held)
        write_text(written, lines, errors="surrogateescape")  # atomic: other ranks see all of it or nothing
        logger.info(f"--val-split: {held_out.sum()} of {len(images)} images are held out; {written} lists them")
    images.keep(held_out != train)
    return images


def folder_to_split(root: Path) -> Path:
    """``root/train``, or ``root`` if there is no such folder."""
    return root / "train" if (root / "train").is_dir() else root


def lists_images(file: Path, root: Path) -> bool:
    """Whether ``file`` exists and lists images of ``root``, not of other data."""
    names = read_text(file, errors="surrogateescape").splitlines() if file.is_file() else []
    return any((folder_to_split(root) / name).is_file() for name in names)


def _draw(images: FolderImages, fraction: float, seed: int) -> np.ndarray:
    held_out = np.zeros(len(images), dtype=bool)
    for label, name in enumerate(images.classes):
        members = np.flatnonzero(images.labels == label)
        if len(members) < 2:
            raise ValueError(f"--val-split: class {name!r} has one image; expected two or more, one for each part")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[np.random.default_rng([seed % 2**64, label]).permutation(members)[:count]] = True
    return held_out
