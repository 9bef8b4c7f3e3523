"""A look at an archive of images before it is read: nothing in it may point outside or claim absurd sizes."""

import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from irpe_train.errors import BadData

LARGEST_MEMBER = 2**30  # bytes; no image or annotation file of these data sets comes near
LARGEST_RATIO = 200  # claimed to stored; deflate cannot exceed 1032, images and JSON stay far below this


def check_archive(path: str | Path) -> None:
    """Refuse a ``.tar`` or ``.zip`` with members that are hostile; reads its headers, unpacks nothing.

    Raises: BadData: a path that leaves the folder, a link, a device, a sparse file, or a member that claims to be
        larger than an image or annotation file can be; names archive and member. Also if it is no archive at all.
    """
    path = Path(path)
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    _check_member(path, member.filename, member.file_size, member.compress_size)
        else:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not (member.isfile() or member.isdir()) or member.issparse():
                        raise BadData(f"{path}: refused: {member.name!r} is neither a plain file nor a folder")
                    _check_member(path, member.name, member.size, member.size)
    except FileNotFoundError as error:
        raise BadData(f"{path}: no such file") from error
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise BadData(f"{path}: damaged, or not a {path.suffix or 'tar'} archive ({error})") from error


def _check_member(path: Path, name: str, size: int, stored: int) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name[:2]:
        raise BadData(f"{path}: refused: member {name!r} points outside of the archive")
    if size > LARGEST_MEMBER or size > max(stored, 4096) * LARGEST_RATIO:
        raise BadData(f"{path}: refused: member {name!r} claims {size:,} bytes, stored in {stored:,}")
