"""Labelled images where they lie: in class folders, in a tar file, or listed by iNaturalist's annotations."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from irpe_train.pixels import decode_image


class LabelledImages(Dataset):
    """(transformed RGB image, class number) pairs; subclasses say where the bytes are.

    Names and labels are arrays, not Python objects: the workers of a loader share them instead of copying them.
    """

    def __init__(self, classes: list[str], names: list[str], labels: list[int], transform=None):
        self.classes = classes
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def __getitem__(self, index: int):
        image = decode_image(self.read(index), self.name(index))
        try:
            return image if self.transform is None else self.transform(image), int(self.labels[index])
        except Exception as error:  # not the image's fault: it must not be skipped as an unreadable one
            raise RuntimeError(f"{self.name(index)}: the augmentation failed on this image ({error})") from error


class FolderImages(LabelledImages):
    """``root/<class>/**/*.jpg``: one folder a class, numbered in alphabetical order."""

    def __init__(self, root: Path, transform=None):
        _need(
            root.is_dir(),
            FileNotFoundError,
            f'{root}: no such folder. It should hold one folder for each class; see README, "Data"',
        )
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        _need(
            classes,
            ValueError,
            f"{root}: no class folders in it. Images lie in one folder for each class "
            f"({root}/<class>/x.jpg)" + ("; the images here lie flat" if _images_below(root) else ""),
        )
        names, labels = [], []
        for label, name in enumerate(classes):
            files = _images_below(root / name)
            _need(
                files,
                ValueError,
                f"{root / name}: no images in this class folder (looked for "
                f"{', '.join(IMG_EXTENSIONS)}); remove the folder or fill it",
            )
            names += files
            labels += [label] * len(files)
        super().__init__(classes, names, labels, transform)


def _images_below(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        found += [os.path.join(parent, file) for file in sorted(files) if file.lower().endswith(IMG_EXTENSIONS)]
    return found


class TarImages(LabelledImages):
    """An uncompressed tar file: ``<class>/x.jpg`` members, or (as ImageNet is handed out) one inner tar for each class.

    Only offsets are kept, and bytes are read at their place: nothing is unpacked, and workers share one file safely.
    Classes and images are in the order of ``FolderImages``, so a folder and its tar are the same data set.
    """

    def __init__(self, file: Path, transform=None):
        _need(file.is_file(), FileNotFoundError, f"{file}: no such file (--load-tar reads train.tar and val.tar)")
        try:
            members = sorted(_tar_members(file))
        except tarfile.TarError as error:
            raise ValueError(f"{file}: not an uncompressed tar file ({error})") from error
        _need(members, ValueError, f"{file}: no images in it (looked for {', '.join(IMG_EXTENSIONS)})")
        flat = [name for label, name, _, _ in members if not label]
        _need(not flat, ValueError, f"{file}: {', '.join(flat[:1])} lies in no class folder; expected <class>/x.jpg")
        classes = sorted({label for label, *_ in members})
        number = {label: index for index, label in enumerate(classes)}
        super().__init__(
            classes,
            [f"{file}:{name}" for _, name, _, _ in members],
            [number[label] for label, *_ in members],
            transform,
        )
        self.file = file
        self.places = np.array([place for *_, place, _ in members], dtype=np.int64)
        self.sizes = np.array([size for *_, size in members], dtype=np.int64)

    def read(self, index: int) -> bytes:
        with open(self.file, "rb") as tar:
            tar.seek(self.places[index])
            return tar.read(self.sizes[index])


def _tar_members(file: Path):
    """Yields (class, name, offset in the file, bytes) of every image."""
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            _need(
                ".." not in Path(member.name).parts and not Path(member.name).is_absolute(),
                ValueError,
                f"{file}: refused: {member.name!r} points outside of the archive",
            )
            if not member.isreg() or member.issparse():
                continue
            if member.name.lower().endswith(".tar"):
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    for image in inner:
                        if image.isreg() and image.name.lower().endswith(IMG_EXTENSIONS):
                            yield Path(member.name).stem, image.name, member.offset_data + image.offset_data, image.size
            elif member.name.lower().endswith(IMG_EXTENSIONS):
                yield Path(member.name).parent.name, member.name, member.offset_data, member.size


class INatImages(LabelledImages):
    """iNaturalist 2018 or 2019: labels of one taxonomic rank, numbered as they appear in the training annotations."""

    def __init__(self, root: Path, train: bool, year: int, category: str, transform=None):
        ranks = _read_json(root / "categories.json")
        numbers: dict[str, int] = {}
        for annotation in _read_json(root / f"train{year}.json")["annotations"]:
            numbers.setdefault(ranks[annotation["category_id"]][category], len(numbers))
        names, labels = [], []
        for image in _read_json(root / f"{'train' if train else 'val'}{year}.json")["images"]:
            top, _, category_id, file = image["file_name"].split("/")  # train_val2018/Birds/1234/x.jpg
            names.append(str(root / top / category_id / file))  # the published layout has no folder for Birds
            labels.append(numbers[ranks[int(category_id)][category]])
        super().__init__(list(numbers), names, labels, transform)


def _read_json(file: Path):
    _need(file.is_file(), FileNotFoundError, f"{file}: no such file; the iNaturalist data sets bring it")
    return json.loads(file.read_text())


def _need(condition, error: type[Exception], message: str) -> None:
    if not condition:
        raise error(message)
