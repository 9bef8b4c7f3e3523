"""Folders that Hugging Face ``datasets`` loads, through timm's reader: ``--data-set HFDS``."""

from pathlib import Path

from deit_irpe.data.images import LabelledImages

SPLITS = {True: ("train",), False: ("validation", "val", "test")}  # the first that is there


class HuggingFaceImages(LabelledImages):
    """One split of a local folder: Parquet files, or images with metadata; columns ``image`` and ``label``.

    Raises: ImportError: ``datasets`` is not installed. ValueError: no such split, or other columns.
    """

    def __init__(self, root: Path, train: bool, transform=None):
        try:
            import datasets
        except ImportError as error:
            raise ImportError("--data-set HFDS reads with Hugging Face datasets: pip install datasets") from error
        from timm.data.readers.reader_hfds import ReaderHfds

        there = datasets.get_dataset_split_names(str(root))
        self.split = next((name for name in SPLITS[train] if name in there), None)
        if self.split is None:
            raise ValueError(f"{root}: no split {' or '.join(SPLITS[train])}; there is {', '.join(there)}")
        features = datasets.load_dataset(str(root), split=self.split).features
        if missing := {"image", "label"} - features.keys():
            raise ValueError(f"{root}: no column {' nor '.join(sorted(missing))}; there is {', '.join(features)}")
        self.reader = ReaderHfds(str(root), split=self.split)
        labels = self.reader.dataset.select_columns("label")[:]["label"]
        classes = getattr(features["label"], "names", None) or [str(number) for number in range(max(labels) + 1)]
        super().__init__(list(classes), [""] * len(labels), labels, transform)
        self.root = root

    def name(self, index: int) -> str:
        return f"{self.root}: {self.split}, image {index}"

    def read(self, index: int) -> bytes:
        file, _ = self.reader[index]
        with file:
            return file.read()
