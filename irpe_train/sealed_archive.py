# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` with a checksum of the whole file at its end: zip's checksums skip headers, and torch has none."""

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import torch

from irpe_train.errors import BadCheckpoint, first_line

USE_ANOTHER = "; copy it again or use an earlier one"


def save_sealed(contents: dict, file: BinaryIO) -> None:
    """``torch.save`` to an empty file, then the checksum, as the archive's comment."""
    summed = _Summed(file)
    torch.save(contents, summed)
    file.seek(-2, os.SEEK_END)
    file.write(_seal(summed.crc32))


def check_archive(path: Path, size: int) -> None:
    """Compare checksums and sizes. torch stores members uncompressed, so one larger than the file is hostile.

    A file from ``save_sealed`` ends with a checksum of the whole file, other archives have one for each member.
    """
    with open(path, "rb") as file:
        magic = file.read(4)
        file.seek(max(0, size - 2 - 0xFFFF))  # the longest comment, and its length
        tail = file.read()
    if magic != b"PK\x03\x04":  # torch's format before 1.6, which has no checksums
        return
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
            comment, names = archive.comment, archive.namelist()
            sealed = comment[:4] == b"irpe" or comment[5:10] == b"crc32"  # ours, even with a damaged letter
            damaged = None if sealed or claimed > size else archive.testzip()
    except Exception as error:
        raise BadCheckpoint(f"checkpoint {path}: damaged or truncated ({first_line(error)}){USE_ANOTHER}") from error
    if not any(name.endswith("/data.pkl") for name in names) or any(name.endswith("constants.pkl") for name in names):
        kind = "an exported or scripted model, or another archive"
        raise BadCheckpoint(f"checkpoint {path}: not weights that torch.save wrote, but {kind}")
    if claimed > size:
        raise BadCheckpoint(f"checkpoint {path}: refused: its members claim {claimed:,} bytes in a file of {size:,}")
    ending = _ending(comment)
    if sealed and ending != _seal(_crc32_of_archive(path, size - len(ending))):
        damaged = "its contents"
    if not tail.endswith(ending):
        raise BadCheckpoint(f"checkpoint {path}: damaged or truncated (its end){USE_ANOTHER}")
    if damaged:
        raise BadCheckpoint(f"checkpoint {path}: damaged: {damaged} and its checksum differ{USE_ANOTHER}")


def _seal(crc32: int) -> bytes:
    """The last bytes of a zip archive whose comment is a checksum."""
    return _ending(b"irpe crc32 %08x" % crc32)


def _ending(comment: bytes) -> bytes:
    """The end of a zip archive: the length of its comment, and the comment."""
    return struct.pack("<H", len(comment)) + comment


def _crc32_of_archive(path: Path, size: int) -> int:
    """CRC-32 of the archive before it was sealed: its first ``size`` bytes, and an empty comment."""
    crc32 = 0
    with open(path, "rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 22))):
            crc32 = zlib.crc32(chunk, crc32)
            size -= len(chunk)
    return zlib.crc32(struct.pack("<H", 0), crc32)


class _Summed:
    """A file written from front to back, and its CRC-32."""

    def __init__(self, file):
        self.file, self.crc32, self.flush = file, 0, file.flush

    def write(self, chunk) -> int:
        self.crc32 = zlib.crc32(chunk, self.crc32)
        return self.file.write(chunk)
