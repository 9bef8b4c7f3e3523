# SPDX-License-Identifier: Apache-2.0
"""Uncompressed tar files, read in place: every member is checked before the first one is used."""

import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from deit_irpe.data.images import LabelledImages, report_hidden, same_text
from irpe_train import outputs
from irpe_train.pixels import PACKED, is_hidden, report_unread

BLOCK = 512  # bytes: a tar file consists of such blocks, and ends with two of zeros


def tar_members(file: Path, inside: BinaryIO | None = None, name: str = "") -> Iterator[tarfile.TarInfo]:
    """The plain files and folders of an uncompressed tar file, in order.

    tarfile mistakes a damaged header, or a file cut between two members, for the end of the archive. Here the archive
    must end with its end marker and zeros.

    Args: file: the tar file. inside: a tar that is a member of it, called ``name``.
    Raises: ValueError: the archive is damaged, truncated or compressed; a member is a link, a device or sparse, or
        points outside the archive; two members have the same name. Names archive and member.
    """
    where = f"{file}: {name}" if inside else str(file)
    try:
        with tarfile.open(None if inside else file, "r:", inside) as tar:
            seen, last = set(), "at its start"
            if not tar.offset:  # no members: tarfile of Python 3.10 would look for the next one before the start
                tar.fileobj.seek(0)
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep them all
                path = str(PurePosixPath(member.name))
                if problem := _problem(member, path):
                    raise ValueError(f"{where}: {path!r} {problem}")
                if path in seen:
                    raise ValueError(f"{where}: two members are called {path!r}; pack it again with one of each")
                if member.isreg():
                    seen.add(path)
                last = f"after {path!r}"
                yield member
            tar.fileobj.seek(tar.offset)
            if len(marker := tar.fileobj.read(BLOCK)) < BLOCK:
                raise ValueError(f"{where}: it was cut {last}: the end marker of a tar file is missing; copy it again")
            if any(marker):
                wanted = "neither the header of a member nor the end marker"
                raise ValueError(f"{where}: damaged {last}: {wanted}; copy it again")
            while rest := tar.fileobj.read(2**20):
                if any(rest):
                    also = f"it continues after its end marker ({last})"
                    raise ValueError(f"{where}: {also}: pack everything in one archive")
    except (tarfile.TarError, EOFError, OverflowError, RecursionError, UnicodeError) as error:
        raise ValueError(f"{where}: not an uncompressed tar file, or damaged ({error})") from error


def _problem(member: tarfile.TarInfo, path: str) -> str | None:
    parts = PurePosixPath(path.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        return "points outside the archive: refused"
    if not (member.isreg() or member.isdir()) or member.issparse():
        return "is a link, a device or sparse: pack plain files (GNU tar: -h --hard-dereference)"
    return None


class TarImages(LabelledImages):
    """An uncompressed tar file: ``<class>/**/x.jpg``, or (as ImageNet is distributed) one inner tar for each class.

    Only offsets are kept, and bytes are read in place: nothing is unpacked, and workers share one file safely.
    Classes, images and their order are those of ``FolderImages``, so a folder and its tar are the same data set. A
    single folder named like the tar (``train/`` in ``train.tar``) may enclose the classes.

    Raises: FileNotFoundError; ValueError: see ``tar_members``; an image in no class folder, a class without images.
    """

    def __init__(self, file: Path, transform=None):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file (--load-tar reads train.tar and val.tar)")
        images, folders, hidden, unread = [], [], set(), []
        for path, place, size in _listing(file):
            if path[-1:] == (outputs.LIST,):  # the root, `.`, has no parts
                raise ValueError(f"{file}: {'/'.join(path)}: predict wrote pictures there, which are not data")
            if is_hidden(path):
                hidden |= {path[0]} if is_hidden(path[:1]) else set()
            elif size is None:
                folders.append(path)
            elif path[-1].lower().endswith(IMG_EXTENSIONS):
                images.append((path, place, size))
            elif PurePosixPath(path[-1]).suffix.lower() in PACKED:
                raise ValueError(
                    f"{file}: {'/'.join(path)}: images packed in it are not read; pack files or plain .tar"
                )
            else:
                unread.append(path[-1])
        report_hidden(file, hidden)
        report_unread(file, unread)
        if not images:
            raise ValueError(f"{file}: no images in it (looked for {', '.join(IMG_EXTENSIONS)})")
        if twice := [path for path, count in Counter(path for path, *_ in images).items() if count > 1]:
            raise ValueError(f"{file}: two members are {'/'.join(twice[0])}, one of them in a tar; pack it once")
        below = [path[0] == file.stem and len(path) > 2 for path, *_ in images]
        if any(below) and not all(below):
            other = "/".join(images[below.index(False)][0])
            raise ValueError(f"{file}: there are images below {file.stem}/ and {other}: which folders are the classes?")
        cut = int(all(below))
        if flat := next((path for path, *_ in images if len(path) < 2 + cut), None):
            raise ValueError(f"{file}: {'/'.join(flat)} is not in a class folder; expected <class>/x.jpg")
        by_class = defaultdict(list, {path[cut]: [] for path in folders if len(path) > cut})
        for path, place, size in images:
            by_class[path[cut]].append((path, place, size))
        if empty := sorted(name for name, members in by_class.items() if not members):
            raise ValueError(f"{file}: {empty[0]}: no images in this class folder; leave it out or fill it")
        if len(by_class) == 1 and all(len(path) > 2 + cut for path, *_ in images):
            (name,) = by_class
            raise ValueError(f"{file}: everything is below {name}/: is that the class? Pack <class>/x.jpg at the top")
        classes = sorted(by_class, key=same_text)
        members = [(n, *one) for n, name in enumerate(classes) for one in sorted(by_class[name], key=_as_walked)]
        labels, paths, places, sizes = zip(*members, strict=True)
        super().__init__(classes, [f"{file}:{'/'.join(path)}" for path in paths], list(labels), transform)
        self.file, self.origins = file, [file]
        self.places, self.sizes = np.array(places, dtype=np.int64), np.array(sizes, dtype=np.int64)

    def read(self, index: int) -> bytes:
        with open(self.file, "rb") as tar:
            tar.seek(self.places[index])
            return tar.read(self.sizes[index])


def _listing(file: Path) -> Iterator[tuple[tuple[str, ...], int, int | None]]:
    """Yields (path, offset in the file, bytes); None for the bytes of a folder. An inner tar becomes a folder."""
    for member in tar_members(file):
        path = PurePosixPath(member.name).parts
        if member.isdir():
            yield path, 0, None
        elif member.name.lower().endswith(".tar") and not is_hidden(path):
            yield (*path[:-1], path[-1][:-4]), 0, None
            with tarfile.open(file, "r:") as outer:
                for image in tar_members(file, outer.extractfile(member), member.name):
                    inner = (*path[:-1], path[-1][:-4], *PurePosixPath(image.name).parts)
                    yield inner, member.offset_data + image.offset_data, None if image.isdir() else image.size
        else:
            yield path, member.offset_data, member.size


def _as_walked(member: tuple[tuple[str, ...], int, int]) -> tuple:
    """Sorts paths as ``FolderImages`` lists them: in each folder first its files, then the folders in it."""
    *folders, name = member[0]
    return *((1, same_text(folder)) for folder in folders), (0, name)
