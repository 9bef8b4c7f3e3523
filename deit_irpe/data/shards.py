"""WebDataset shards, read by index: ``--data-set WDS``."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deit_irpe.data.images import LabelledImages

IMAGES = ("jpg", "jpeg", "png", "webp")  # extensions of the image of a sample, as WebDataset has them
SPLITS = {True: "*train*.tar", False: "*val*.tar"}


class ShardImages(LabelledImages):
    """Uncompressed WebDataset shards: samples of ``key.jpg`` (or .jpeg, .png, .webp) and ``key.cls``, a class number.

    Only offsets are kept, and bytes are read at their place, as by ``TarImages``: a training that was interrupted goes
    on with the very images that were next, which a stream of shards cannot do. The order is that of the shards' names.

    Args:
        root: holds ``*train*.tar`` and ``*val*.tar``, and perhaps ``classes.txt``, the names of the classes in order.
    Raises: FileNotFoundError, ValueError: no shards, or a sample in them that has no image or no class.
    """

    def __init__(self, root: Path, train: bool, transform=None):
        self.files = sorted(root.glob(SPLITS[train]))
        if not self.files:
            raise FileNotFoundError(f"{root}: no {SPLITS[train]} there (--data-set WDS reads uncompressed shards)")
        samples = [(shard, *sample) for shard, file in enumerate(self.files) for sample in _samples(file)]
        if not samples:
            raise ValueError(f"{root}: no samples in {SPLITS[train]} (looked for .cls with one of {', '.join(IMAGES)})")
        shards, names, places, sizes, labels = zip(*samples, strict=True)
        listed = root / "classes.txt"
        count = max(labels) + 1
        classes = listed.read_text().splitlines() if listed.is_file() else [str(number) for number in range(count)]
        if min(labels) < 0 or count > len(classes):
            raise ValueError(
                f"{root}: class numbers from {min(labels)} to {max(labels)}; expected 0 to "
                f"{len(classes) - 1}" + (f", as {listed} lists" if listed.is_file() else "")
            )
        super().__init__(classes, list(names), list(labels), transform)
        self.shards, self.places, self.sizes = (np.array(values, dtype=np.int64) for values in (shards, places, sizes))

    def name(self, index: int) -> str:
        return f"{self.files[self.shards[index]]}:{super().name(index)}"

    def read(self, index: int) -> bytes:
        with open(self.files[self.shards[index]], "rb") as tar:
            tar.seek(self.places[index])
            return tar.read(self.sizes[index])


def _samples(file: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yields (name of the image, its offset, its bytes, class number) of each sample of a shard, in order."""
    for key, members in _grouped(file):
        images = [kind for kind in IMAGES if kind in members]
        if len(images) != 1 or "cls" not in members:
            raise ValueError(
                f"{file}: sample {key!r} has {', '.join(members)}; expected cls and one of {', '.join(IMAGES)}"
            )
        image, (_, label) = members[images[0]][0], members["cls"]
        if not label.isdigit():
            raise ValueError(f"{file}: {key}.cls holds {label[:20]!r}; expected a class number")
        yield image.name, image.offset_data, image.size, int(label)


def _grouped(file: Path) -> Iterator[tuple[str, dict[str, tuple[tarfile.TarInfo, str]]]]:
    """Yields each key of a shard with {extension: (member, text of a .cls)}; members of a sample stand together."""
    current: str = ""
    members: dict[str, tuple[tarfile.TarInfo, str]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                key, extension = os.path.join(folder, stem), extension.lower()
                if key != current:
                    if members:
                        yield current, members
                    current, members = key, {}
                content = tar.extractfile(member) if extension == "cls" else None
                members[extension] = member, content.read().decode(errors="replace").strip() if content else ""
    except tarfile.TarError as error:
        raise ValueError(f"{file}: not an uncompressed tar file ({error})") from error
    if members:
        yield current, members
