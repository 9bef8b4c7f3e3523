# SPDX-License-Identifier: Apache-2.0
"""Checks a zip archive before it is read: no member may point outside of it or claim an absurd size."""

import zipfile
from pathlib import Path, PurePosixPath

from irpe_train.errors import BadData

LARGEST_MEMBER = 2**30  # bytes; far above any image or annotation file of these data sets
LARGEST_RATIO = 200  # claimed to stored; deflate cannot exceed 1032, images and JSON stay far below this


def check_archive(path: Path) -> list[zipfile.ZipInfo]:
    """The members of a zip archive that are files; reads its directory, unpacks nothing.

    Raises: BadData: a path that leaves the folder, or a member that claims to be larger than an image or annotation
        file can be; names archive and member. Also if it is no archive at all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except FileNotFoundError as error:
        raise BadData(f"{path}: no such file") from error
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise BadData(f"{path}: damaged, or not a .zip archive ({error})") from error
    for member in members:
        name, size, stored = member.filename, member.file_size, member.compress_size
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in name[:2]:
            raise BadData(f"{path}: refused: member {name!r} points outside of the archive")
        if size > LARGEST_MEMBER or size > max(stored, 4096) * LARGEST_RATIO:
            raise BadData(f"{path}: refused: member {name!r} claims {size:,} bytes, stored in {stored:,}")
    return [member for member in members if not member.is_dir()]
