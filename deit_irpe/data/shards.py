# SPDX-License-Identifier: Apache-2.0
"""WebDataset shards, read by index: ``--data-set WDS``."""

import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np

from deit_irpe.data.images import MOST_CLASSES, LabelledImages, same_text
from deit_irpe.data.tar_files import tar_members
from irpe_train.pixels import is_hidden
from irpe_train.text_files import read_text

IMAGES = ("jpg", "jpeg", "png", "webp")  # image extensions of a sample, as in WebDataset
BESIDE = r"\.((md5|sha\d+)(sums?)?|idx|index|json|txt)$"  # checksums and indexes, x.tar.md5
SPLITS = {True: ("train", "training"), False: ("val", "valid", "validation")}  # words in the name of a shard


class ShardImages(LabelledImages):
    """Uncompressed WebDataset shards: samples of ``key.jpg`` (or .jpeg, .png, .webp) and ``key.cls``, a class number.

    Only offsets are kept, and bytes are read in place, as in ``TarImages``: an interrupted run resumes at exactly the
    next image, which a stream of shards cannot do. Shards are ordered by name.

    Args: root: holds ``imagenet-train-0000.tar``, ``imagenet-val-0000.tar`` and the like, with ``train`` or ``val`` as
        a word of the name, and perhaps ``classes.txt``, the names of the classes in order.
    Raises: FileNotFoundError, ValueError: no shards, a damaged one, or a sample without an image or class.
    """

    def __init__(self, root: Path, train: bool, transform=None):
        self.files = [file for file in sorted(root.iterdir()) if _split_of(file) is train]
        if not self.files:
            word = SPLITS[train][0]
            raise FileNotFoundError(
                f"{root}: no *{word}*.tar there (--data-set WDS reads uncompressed shards, with {word} as a word in "
                f"their names: imagenet-{word}-0000.tar)"
            )
        places: dict[str, Path] = {}
        for file in self.files:
            if places.setdefault(os.path.realpath(file), file) != file:
                raise ValueError(f"{file}: a link to a shard that is read already; remove it")
        samples = [(shard, *sample) for shard, file in enumerate(self.files) for sample in _samples(file)]
        if not samples:
            raise ValueError(f"{root}: no samples in {self.files[0].name} and the like (looked for .cls and an image)")
        shards, names, places, sizes, labels = zip(*samples, strict=True)
        listed, count = root / "classes.txt", max(labels) + 1
        named = os.path.lexists(listed)
        classes = class_list(listed) if named else [str(number) for number in range(min(count, MOST_CLASSES))]
        if count > len(classes):
            raise ValueError(
                f"{root}: class numbers from {min(labels)} to {max(labels)}; expected 0 to "
                f"{len(classes) - 1}" + (f", as {listed} lists" if named else "; or list them in classes.txt")
            )
        super().__init__(classes, list(names), list(labels), transform)
        self.origins = self.files
        self.shards, self.places, self.sizes = (np.array(values, dtype=np.int64) for values in (shards, places, sizes))

    def name(self, index: int) -> str:
        return f"{self.files[self.shards[index]]}:{super().name(index)}"

    def read(self, index: int) -> bytes:
        with open(self.files[self.shards[index]], "rb") as tar:
            tar.seek(self.places[index])
            return tar.read(self.sizes[index])


def class_list(file: Path) -> list[str]:
    """The names of the classes, one per line, in order. Raises: ValueError: two are equal, or one is empty."""
    try:
        names = [same_text(line.strip()) for line in read_text(file, errors="strict").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from error
    seen: set[str] = set()
    for line, name in enumerate(names, 1):
        if not name or name in seen:
            raise ValueError(f"{file}: line {line}: {f'{name!r} comes twice' if name else 'empty'}; one class per line")
        seen.add(name)
    return names


def _split_of(file: Path) -> bool | None:
    """True for a shard of training, False for one of validation, None for another file."""
    name = file.name.lower()
    if not re.search(r"\.tar(\.\w+)?$|\.tgz$", name) or is_hidden([name]) or re.search(BESIDE, name):
        return None
    words = set(re.split(r"[^a-z]+", name))
    found = [train for train, of_split in SPLITS.items() if words & set(of_split)]
    if len(found) > 1 or not found and ("train" in name or "val" in name) and "test" not in words:
        raise ValueError(f"{file}: is it for training or for validation? Name it imagenet-train-0000.tar, or -val-")
    if found and not file.is_file():
        raise ValueError(f"{file}: named like a shard, but not a file (a broken symlink?); fix or remove it")
    if found and not name.endswith(".tar"):
        raise ValueError(f"{file}: no plain .tar, which allows random access: unpack or finish it, or move it away")
    return found[0] if found else None


def _samples(file: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yields (name of the image, its offset, its bytes, class number) of each sample of a shard, in order."""
    with open(file, "rb") as shard:
        for key, members in _grouped(file):
            images = [kind for kind in IMAGES if kind in members]
            if len(images) != 1 or "cls" not in members:
                raise ValueError(
                    f"{file}: sample {key!r} has {', '.join(members)}; expected cls and one of {', '.join(IMAGES)}"
                )
            place, size = members["cls"]
            shard.seek(place)
            label = shard.read(min(size, 1000)).decode(errors="replace").strip()
            if size > 1000 or not (label.isascii() and label.isdigit()):
                raise ValueError(f"{file}: {key}.cls holds {label!r:.40}; expected a class number")
            yield f"{key}.{images[0]}", *members[images[0]], int(label)


def _grouped(file: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yields each key of a shard with {extension: (offset, bytes)}; members of a sample are consecutive.

    As in WebDataset, the key includes the folder and ends at the first dot of the file name.
    """
    files = ((PurePosixPath(member.name), member) for member in tar_members(file) if member.isreg())
    seen = ((path, member) for path, member in files if not is_hidden(path.parts))  # macOS packs ._x.jpg with x.jpg
    for key, sample in groupby(seen, lambda one: str(one[0].with_name(one[0].name.partition(".")[0]))):
        members: dict[str, tuple[int, int]] = {}
        for path, member in sample:
            extension = path.name.partition(".")[2].lower()
            if extension in members:
                raise ValueError(f"{file}: sample {key!r} has two .{extension}; pack it again with one of each")
            members[extension] = member.offset_data, member.size
        yield key, members
