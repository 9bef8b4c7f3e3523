# SPDX-License-Identifier: Apache-2.0
"""Labelled images in class folders, or listed by iNaturalist's annotations."""

import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from irpe_train import outputs
from irpe_train.errors import shown
from irpe_train.logger import logger
from irpe_train.pixels import UnreadableImage, decode_image, is_hidden, report_unread

MOST_CLASSES = 100_000  # if classes are numbers; a larger number is a mistake or an attack on memory


def same_text(name: str) -> str:
    """``name`` normalised for comparison: macOS stores an accent separately from its letter."""
    return unicodedata.normalize("NFC", name)


class LabelledImages(Dataset):
    """(transformed RGB image, class number) pairs; subclasses read the bytes.

    Names and labels are arrays, not Python objects, so that a loader's workers share them instead of copying them.
    """

    def __init__(self, classes: list[str], names: list[str], labels: list[int], transform=None):
        self.classes = [same_text(name) for name in classes]
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)
        self.transform = transform
        if len(set(self.classes)) < len(classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            what = f"two classes are called {twice!r}, in two spellings of Unicode; rename one"
            raise ValueError(f"{self.name(0)}, ...: {what}")

    def __len__(self) -> int:
        return len(self.labels)

    def relabel(self, classes: list[str]) -> None:
        """Renumber the labels by the order of ``classes``, which contains all of them."""
        place = {name: number for number, name in enumerate(classes)}
        self.labels = np.array([place[name] for name in self.classes], dtype=np.int64)[self.labels]
        self.classes = list(classes)

    def keep(self, chosen: np.ndarray) -> None:
        """Drop the images where ``chosen`` is False."""
        self.names, self.labels = self.names[chosen], self.labels[chosen]
        self.origins = []  # the rest of the folder belongs to another set

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def __getitem__(self, index: int):
        try:
            data = self.read(index)
        except Exception as error:
            raise UnreadableImage(f"{self.name(index)}: cannot be read ({error})") from error
        image = decode_image(data, self.name(index))
        try:
            return image if self.transform is None else self.transform(image), int(self.labels[index])
        except Exception as error:  # not the image's fault: it must not be skipped as unreadable
            raise RuntimeError(f"{self.name(index)}: the augmentation failed on this image ({error})") from error


class FolderImages(LabelledImages):
    """``root/<class>/**/*.jpg``: one folder per class, numbered in alphabetical order. Symlinks are followed.

    Hidden files and folders (``.ipynb_checkpoints``, ``._x.jpg``) are left out.

    Raises: FileNotFoundError, ValueError: no such folder, no class folders, a class without images, or something else
        in place of an image (a pipe, a broken symlink, a symlink to a folder already read, even in another class).
    """

    def __init__(self, root: Path, transform=None):
        if not root.is_dir():
            beside = ", ".join(sorted(path.name for path in root.parent.glob("*") if path.is_dir())[:9])
            there = f" (there is {beside})" if beside else ""
            wanted = 'It should hold one folder for each class; see README, "Data", or --val-split to hold out images'
            raise FileNotFoundError(f"{root}: no such folder{there}. {wanted}")
        unread: list[str] = []
        folders, flat = _entries(root, unread)
        report_hidden(root, {name for name in os.listdir(root) if is_hidden([name])})
        if not folders:
            wanted = f"Put images in one folder per class ({root}/<class>/x.jpg)"
            wanted += "; the images here are in no class folder" if flat else ""
            raise ValueError(f"{root}: no class folders in it. {wanted}")
        names, labels, seen = [], [], {_identity(root): str(root)}
        for label, folder in enumerate(folders):
            files = list(_images_below(folder, seen, unread))
            if not files:
                looked = f"looked for {', '.join(IMG_EXTENSIONS)}"
                raise ValueError(f"{folder}: no images in this class folder ({looked}); remove the folder or fill it")
            names += files
            labels += [label] * len(files)
        report_unread(root, unread)
        if flat:
            logger.warning(f"{flat[0]}: beside the class folders; {len(flat)} images without a class are left out")
        super().__init__([os.path.basename(folder) for folder in folders], names, labels, transform)
        self.origins = list(seen.values())[1:]


def _images_below(folder: str, seen: dict[tuple[int, int], str], unread: list[str]) -> Iterator[str]:
    """The images in ``folder`` and the folders below it; ``seen``: folders that must not occur again."""
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        if (here := _identity(folder)) in seen:
            raise ValueError(f"{folder}: a symlink to a folder already read, or its target; remove the link")
        seen[here] = folder
        folders, images = _entries(folder, unread)
        yield from images
        waiting += reversed(folders)


def _entries(folder: str | Path, unread: list[str]) -> tuple[list[str], list[str]]:
    """The folders and the images in ``folder``, each in alphabetical order; ``unread`` gets the names of the others."""
    folders, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name == outputs.LIST:
                mine = f"delete {entry.path} if every image there is yours"
                raise ValueError(f"{folder}: predict wrote pictures there, which are not data; move them, or {mine}")
            if is_hidden([entry.name]):
                continue
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                if not entry.is_file():
                    raise ValueError(f"{entry.path}: neither a file nor a folder; remove it")
                images.append(entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise ValueError(f"{entry.path}: a broken link; was it a folder of images?")
            else:
                unread.append(entry.name)
    return sorted(folders, key=same_text), sorted(images)


def report_hidden(where: Path, names: set[str]) -> None:
    """Log which hidden ``names`` among the classes are left out."""
    if names:
        logger.info(f"{where}: hidden, so not classes: {shown(', '.join(sorted(names)))}")


def read_a_sample(images: Dataset, size: int = 16) -> None:
    """Read images spread over a validation set, so that UnreadableImage is raised before the first epoch, not after."""
    for index in range(0, len(images), max(1, -(-len(images) // size))):
        images[index]


def warn_of_odd_sets(train: Dataset | None, val: Dataset) -> None:
    """Warn of folders or archives that both sets read, as through a symlink, and of classes without a training image,
    as in shards that skip numbers.
    """
    empty = sorted(set(range(len(train.classes))) - set(train.labels)) if isinstance(train, LabelledImages) else []
    if empty:
        first = train.classes[empty[0]]
        logger.warning(f"train: no image of {len(empty)} of {len(train.classes)} classes: {first}, ...")
    trained = {_identity(path) for path in getattr(train, "origins", [])}
    if shared := [path for path in getattr(val, "origins", []) if _identity(path) in trained]:
        logger.warning(f"{shared[0]}: read for train and for val ({len(shared)} in all): the same images in both")


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


class INatImages(LabelledImages):
    """iNaturalist 2018 or 2019: labels of one taxonomic rank, numbered as they appear in the training annotations."""

    def __init__(self, root: Path, train: bool, year: int, category: str, transform=None):
        file, trained = root / "categories.json", root / f"train{year}.json"
        entry = categories = _read_json(file)
        annotations = _listed(trained, "annotations")
        listed = root / f"{'train' if train else 'val'}{year}.json"
        images = _listed(listed, "images")
        names, labels, numbers = [], [], {}
        try:
            ranks = {str(number): ranks for number, ranks in enumerate(categories)}  # 0.5, true and -1 are no keys
            file = trained
            for entry in annotations:
                numbers.setdefault(same_text(ranks[str(entry["category_id"])][category]), len(numbers))
            file = listed
            for entry in images:
                top, _, category_id, name = entry["file_name"].split("/")  # train_val2018/Birds/1234/x.jpg
                names.append(str(root / top / category_id / name))  # the published layout has no folder for Birds
                labels.append(numbers[same_text(ranks[category_id][category])])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: {str(entry)[:200]}: not in iNaturalist's format ({error!r})") from error
        super().__init__(list(numbers), names, labels, transform)


def _read_json(file: Path):
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; it comes with the iNaturalist data sets")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error


def _listed(file: Path, key: str) -> list:
    content = _read_json(file)
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: no list {key!r}, or nothing in it")
    return entries
