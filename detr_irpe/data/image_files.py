# SPDX-License-Identifier: Apache-2.0
"""Image files of one split, read from a folder, or in place from a zip archive."""

import contextlib
import os
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

import torch

from detr_irpe.data.packed_strings import PackedStrings
from irpe_train.errors import BadData, some

LARGEST_MEMBER = 2**30  # bytes; far above any image or annotation file of these data sets
LARGEST_RATIO = 200  # claimed to stored; deflate cannot exceed 1032, images and JSON stay far below this
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of the name and of the extra field


class FilesInFolder:
    """The files ``names`` of one folder.

    Args:
        folder: where they are.
        names: file names as the annotations give them, relative to the folder, in data set order.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.path = folder
        named = {os.path.dirname(name) for name in names}
        named |= {unicodedata.normalize(form, below) for below in named for form in ("NFC", "NFD")}  # macOS stores NFD
        entries = (
            (below, one) for below in named if os.path.isdir(folder / below) for one in os.scandir(folder / below)
        )
        present = {os.path.join(below, one.name) for below, one in entries if one.is_file()}  # a pipe would never end
        names = _as_stored(names, present)
        self._names = PackedStrings(os.fsencode(name) for name in names)
        # Path.is_file raises for a name that is too long.
        self.missing = [name for name in names if name not in present and not os.path.isfile(folder / name)]

    def name(self, index: int) -> str:
        return str(self.path / os.fsdecode(self._names[index]))

    def read(self, index: int) -> bytes:
        """The bytes of file number ``index``. Raises OSError: it is missing or unreadable."""
        return Path(self.name(index)).read_bytes()


class FilesInZip:
    """The members ``names`` of one zip archive, read in place by any number of processes.

    The archive's directory is read once; only the offsets of the images are kept, in shared memory. Every process
    opens the archive itself at its first read, so that workers never move each other's file position.

    Args:
        archive: ``train2017.zip`` or the like; members may be in a folder with the archive's name, as in COCO's.
        names: file names as the annotations give them, in data set order.
    Raises: BadData: the archive is damaged, or a member's name or size is hostile.
    """

    def __init__(self, archive: Path, names: Sequence[str]) -> None:
        self.path = archive
        self._names = PackedStrings(name.encode() for name in names)
        members = members_of(archive)
        names = _as_stored(names, members)
        self.missing = [name for name in names if name not in members]
        places = [members.get(name, (-1, 0, 0, 0, 0)) for name in names]
        self._places = torch.tensor(places, dtype=torch.int64).reshape(-1, 5).share_memory_()
        self._file, self._process = None, None

    def name(self, index: int) -> str:
        return f"{self.path}:{self._names[index].decode()}"

    def read(self, index: int) -> bytes:
        """The bytes of member number ``index``. Raises OSError: it is missing, damaged or not what it claims to be."""
        offset, stored_size, size, method, checksum = self._places[index].tolist()
        if offset < 0:
            raise FileNotFoundError(f"{self.name(index)}: no such member in the archive")
        if self._process != os.getpid():
            self._file, self._process = self.path.open("rb"), os.getpid()
        self._file.seek(offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise OSError(f"{self.name(index)}: the archive is damaged (no file header at byte {offset})")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        self._file.seek(name_length + extra_length, os.SEEK_CUR)
        content = self._file.read(stored_size)
        if method == zipfile.ZIP_DEFLATED:
            try:  # one byte more than promised is enough to detect a zip bomb
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error as error:
                raise OSError(f"{self.name(index)}: the archive is damaged ({error})") from error
        if len(content) != size or zlib.crc32(content) != checksum:
            raise OSError(f"{self.name(index)}: the archive is damaged (size or checksum differs)")
        return content

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_process": None}


def open_images(
    root: Path, split: str, names: Sequence[str], listed_in: Path, *, flag: str = "--coco_path"
) -> FilesInFolder | FilesInZip:
    """The images ``names`` in ``root/split/``, or in ``root/split.zip`` if there is no such folder.

    Args: listed_in: the file with the names. flag: the flag for ``root``. Both for messages.
    Raises: ValueError: a name could lead outside. FileNotFoundError: neither exists, or some images are missing.
    """
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or set(name) & set("\\:\0\r\n"):
            wanted = f"expected a relative name, with / between folders, inside {split}"
            raise ValueError(f"{listed_in}: unsafe file name {name!r}; {wanted}")
    folder, archive = root / split, root / f"{split}.zip"
    if folder.is_dir():
        images = FilesInFolder(folder, names)
    elif archive.is_file():
        images = FilesInZip(archive, names)
    else:
        raise FileNotFoundError(f'{flag} {root}: no {split}/ or {split}.zip there. See README, "Data".')
    if images.missing:
        missing = f"missing images that {listed_in} lists: {len(images.missing)} ({some(images.missing)})"
        raise FileNotFoundError(f"{images.path}: {missing}. Extract or download the set again.")
    return images


def _as_stored(names: Sequence[str], stored: Collection[str]) -> list[str]:
    """``names`` as spelled in ``stored``, which may write accents differently: macOS decomposes them."""
    variants = {unicodedata.normalize("NFC", name): name for name in stored}
    return [name if name in stored else variants.get(unicodedata.normalize("NFC", name), name) for name in names]


def members_of(path: Path) -> dict[str, tuple[int, int, int, int, int]]:
    """Offset, stored size, size, method and checksum of every file in a zip archive, by its name below the archive's
    own folder; reads its directory, unpacks nothing.

    Raises: BadData: it is no archive, or a member (named) has a path that leaves the folder, claims to be larger than
        an image or annotation file can be, has the name of another, or is packed in an unusual way.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except FileNotFoundError as error:
        raise BadData(f"{path}: no such file") from error
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise BadData(f"{path}: damaged, or not a .zip archive ({error})") from error
    members = {}
    for info in infos:
        if not info.flag_bits & 0x800:  # Info-ZIP and macOS write UTF-8 without saying so; zipfile takes it for cp437
            with contextlib.suppress(UnicodeError):
                info.filename = info.filename.encode("cp437").decode()
        size, stored, parts = info.file_size, info.compress_size, PurePosixPath(info.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in info.filename[:2]:
            raise BadData(f"{path}: refused: member {info.filename!r} points outside the archive")
        if size > LARGEST_MEMBER or size > max(stored, 4096) * LARGEST_RATIO:
            raise BadData(f"{path}: refused: member {info.filename!r} claims {size:,} bytes, stored in {stored:,}")
        if info.is_dir():
            continue
        name = str(parts).removeprefix(path.stem + "/")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadData(f"{path}: member {name!r} is encrypted or packed in an unusual way; pack it again")
        if name in members:
            raise BadData(f"{path}: two members are called {name!r}; pack it again with one of each")
        members[name] = (info.header_offset, stored, size, info.compress_type, info.CRC)
    return members
