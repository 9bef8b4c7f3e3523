# SPDX-License-Identifier: Apache-2.0
"""Folders that Hugging Face ``datasets`` loads: ``--data-set HFDS``."""

import contextlib
from pathlib import Path

from deit_irpe.data.images import MOST_CLASSES, LabelledImages
from irpe_train.errors import import_optional, in_one_line

SPLITS = {True: ("train",), False: ("validation", "val", "test")}  # the first that exists


class HuggingFaceImages(LabelledImages):
    """One split of a local folder: Parquet files, or images with metadata; columns ``image`` and ``label``.

    A label is a class number or a class name; classes without numbers are in alphabetical order, as in an image folder.

    Raises: ImportError: ``datasets`` is not installed. ValueError: no such split, other columns, or a wrong label.
    """

    def __init__(self, root: Path, train: bool, transform=None):
        datasets = import_optional("datasets", "--data-set HFDS reads with Hugging Face datasets")
        with _explained(root):
            files = {str(name): of for name, of in datasets.load_dataset_builder(str(root)).config.data_files.items()}
        self.root, self.split = root, next((name for name in SPLITS[train] if name in files), None)
        if self.split is None:
            raise ValueError(f"{root}: no split {' or '.join(SPLITS[train])}; it has {', '.join(files)}")
        with _explained(root):
            dataset = datasets.load_dataset(str(root), split=self.split)
        features = dataset.features
        if missing := {"image", "label"} - features.keys():
            raise ValueError(f"{root}: no column {' or '.join(sorted(missing))}; it has {', '.join(features)}")
        with _explained(root):
            self.images = dataset.cast_column("image", datasets.Image(decode=False)).select_columns("image")
        labels = list(dataset.select_columns("label")[:]["label"])
        names = getattr(features["label"], "names", None)
        _refuse_other_names(files[self.split], names)
        if names and dataset.info.builder_name == "imagefolder":
            _refuse_mixed_folders({Path(image["path"]).parent for image in self.images[:]["image"]}, root)
        classes, labels = _numbered(labels, names, f"{root}: {self.split}")
        super().__init__(classes, [""] * len(labels), labels, transform)

    def name(self, index: int) -> str:
        return f"{self.root}: {self.split}, image {index}"

    def read(self, index: int) -> bytes:
        image = self.images[index]["image"]
        return image["bytes"] or Path(image["path"]).read_bytes()


@contextlib.contextmanager
def _explained(root: Path):
    try:
        yield
    except Exception as error:  # datasets and pyarrow raise dozens of types; most do not name the folder
        cause = error.__cause__ or error  # behind "An error occurred while generating the dataset"
        reason = f"{type(cause).__name__}: {in_one_line(cause)}"
        raise ValueError(f"{root}: Hugging Face datasets cannot load it ({reason})") from error


def _refuse_other_names(files: list[str], names: list[str] | None) -> None:
    """``datasets`` takes the names of the classes from one file, and applies them to the numbers in all others."""
    from datasets import Features
    from pyarrow import ArrowInvalid, ipc, parquet

    for file in (file for file in files if file.endswith((".parquet", ".arrow"))):
        with contextlib.suppress(ArrowInvalid):  # a variant of Arrow that has no names
            schema = parquet.read_schema(file) if file.endswith(".parquet") else ipc.open_stream(file).schema
            own = getattr(Features.from_arrow_schema(schema).get("label"), "names", names)
            if own != names:
                how = "renumber its labels (Dataset.align_labels_with_mapping)"
                raise ValueError(f"{file}: its classes are {own!s:.80}, those of other files {names!s:.80}; {how}")


def _refuse_mixed_folders(folders: set[Path], root: Path) -> None:
    """``datasets`` takes the last folder of a path as the class, and any called ``train`` or ``val`` as a split."""
    above = sorted({folder.parent for folder in folders})
    if len(above) > 1:
        instead = "Leave out --data-set HFDS: class folders are then read as they are"
        raise ValueError(
            f"{root}: {above[0]} and {above[1]} both have folders that datasets takes as classes. {instead}"
        )


def _numbered(labels: list, names: list[str] | None, where: str) -> tuple[list[str], list[int]]:
    """The classes, and the class numbers in the column ``label``."""
    if not labels:
        raise ValueError(f"{where}: no images")
    named, most = names is None and isinstance(labels[0], str), len(names) if names else MOST_CLASSES
    for number, label in enumerate(labels):
        if not (isinstance(label, str) and label.strip() if named else type(label) is int and 0 <= label < most):
            expected = f"0 to {most - 1}" if names else "0, 1, 2, ... or, for all images, the name of a class"
            raise ValueError(f"{where}: image {number} has the label {label!r}; expected {expected}")
    if named:
        names = sorted(set(labels))
        numbers = {name: number for number, name in enumerate(names)}
        return names, [numbers[label] for label in labels]
    return list(names or map(str, range(max(labels) + 1))), labels
