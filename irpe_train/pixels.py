# SPDX-License-Identifier: Apache-2.0
"""Finds image files and decodes them to RGB, for training, evaluation and prediction."""

import glob
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

from irpe_train.logger import logger
from irpe_train.outputs import OutputFolder

ORIENTATION = ExifTags.Base.Orientation
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # older Pillow opens their 16-bit grey images with 32-bit pixels
UNREAD = {".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".dng", ".cr2", ".nef", ".arw"}
PACKED = {".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"}
# Folders that macOS, NAS devices, Windows and Linux create beside a user's own, some with pictures in them.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


class UnreadableImage(OSError):
    """An image file that is missing, damaged, empty, too large or not an image; the message names it."""


def files_of(named: Sequence[str], *, besides: Path) -> list[Path]:
    """The images that files, folders and patterns name, each once, even if symlinks lead to their folder again.

    Args: besides: the folder of results. Searches skip its files, if it lies within the searched folder, and what
        predict wrote elsewhere.
    Raises: ValueError: one of them names no image.
    """
    files: dict[Path, Path] = {}
    for text in named:
        fits = not glob.has_magic(text) or Path(text).exists()  # else it is a pattern; ** matches any folders
        paths = [Path(text)] if fits else sorted(map(Path, glob.glob(text, recursive=True)))
        if not fits:
            paths = _photographs(next(p for p in Path(text).parents if not glob.has_magic(str(p))), paths, besides)
        found = [file for path in paths for file in (_files_below(path, besides) if path.is_dir() else [path])]
        if not found:
            where = "in this folder" if Path(text).is_dir() else "matches this pattern"
            raise ValueError(f"{text}: no image {where} (not counting results of predict)")
        for file in found:
            files[_place(file)] = min(files.get(_place(file), file), file, key=lambda path: len(path.parts))
    return list(files.values())


def _place(file: Path) -> Path:
    """The place of a file, with symlinks in its folder resolved; a symlink to a file is a file of its own."""
    return Path(os.path.realpath(file.parent), file.name)


def _files_below(folder: Path, besides: Path) -> list[Path]:
    found = [Path(parent, name) for parent, names in walk(folder) for name in names]
    found = _photographs(folder, found, besides)
    found = [file for file in found if not is_hidden(file.relative_to(folder).parts)]
    report_unread(folder, (file.name for file in found))
    return sorted(file for file in found if file.suffix.lower() in IMG_EXTENSIONS)


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """``folder`` and each folder below it, through symlinks as in training, with its files. Raises OSError."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:  # a symlink back, or a second one to the same folder
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        yield parent, names


def _photographs(root: Path, files: list[Path], besides: Path) -> list[Path]:
    """``files`` found below ``root``, without what predict wrote, and without ``besides`` if that is below too."""
    results_folder = Path(os.path.realpath(besides))
    below = Path(os.path.realpath(root)) in results_folder.parents  # else the images are where the results go
    folders = {root, besides} | {file.parent for file in files}
    results = {_place(folder / name) for folder in folders for name in OutputFolder(folder).results()}

    def is_result(place: Path) -> bool:
        return place in results or below and results_folder in (place, *place.parents)

    return [file for file in files if not is_result(_place(file))]


def report_unread(where: str | Path, names: Iterable[str]) -> None:
    """Warn about pictures among ``names`` that the published list of suffixes leaves out, and about archives."""
    counts = Counter(suffix for name in names if (suffix := os.path.splitext(name)[1].lower()) in UNREAD | PACKED)
    if counts:
        counted = ", ".join(f"{number} {suffix}" for suffix, number in sorted(counts.items()))
        remedy = "save pictures as .jpg, unpack archives"
        logger.warning(f"{where}: left out because their format is not read: {counted}; {remedy}")


def is_hidden(parts: Sequence[str]) -> bool:
    """Whether a file or one of its folders belongs to a program: ``.ipynb_checkpoints``, ``._x.jpg``, ``@eaDir``."""
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts)


def read_image(path: str | Path, *, upright: bool = False) -> Image.Image:
    """The image file ``path`` in RGB; see ``decode_image``. A pipe or a device is refused, not waited for."""
    path = Path(path)
    if not path.is_file():
        raise UnreadableImage(f"{path}: " + ("not a plain file" if path.exists() else "no such file"))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be read ({error.strerror or error})") from error
    return decode_image(data, path, upright=upright)


def decode_image(data: bytes, name: str | Path, *, upright: bool = False) -> Image.Image:
    """An encoded image in RGB.

    8-bit images go through ``Image.convert("RGB")``, as in the published code: transparency is dropped,
    CMYK converted, the first frame of an animation taken. Grey of 12 or 16 bits is scaled to 8. Floating-point,
    signed and 32-bit pixels are refused: their files do not say which values are black and white.

    Args:
        data: the bytes of the file.
        name: for messages.
        upright: rotate the image by its EXIF orientation. Default: as stored.
    Raises: UnreadableImage: with ``name`` and the reason.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "EPS":
                raise ValueError("it is a PostScript program, which is not run")
            turn = _orientation(image) if image.format == "TIFF" else 1
            image.load()
            rgb = to_rgb(image)
            if turn != 1:  # Pillow rotates a TIFF on loading and drops the tag: undo it
                rgb.getexif()[ORIENTATION] = {6: 8, 8: 6}.get(turn, turn)
                rgb = ImageOps.exif_transpose(rgb)
                rgb.getexif()[ORIENTATION] = turn
            return ImageOps.exif_transpose(rgb) if upright and is_turned(rgb) else rgb
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{name}: too many pixels to be a photograph ({error}); scale it down") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        unknown = "not an image, or in a format that is not read here, such as HEIC"
        reason = unknown if isinstance(error, Image.UnidentifiedImageError) else error
        raise UnreadableImage(f"{name}: this image cannot be read ({reason})") from error


def pixel_hash(image: Image.Image) -> bytes:
    """The same for two files with the same picture."""
    return hashlib.blake2b(b"%d %d " % image.size + image.tobytes(), digest_size=7).digest()


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation says that the image is stored rotated; 0 (unknown) and unreadable ones do not."""
    return _orientation(image) in range(2, 9)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises SyntaxError, struct.error, ...
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, as in ``decode_image``. Raises ValueError: its black and white are unknown."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS):
        tags = getattr(image, "tag_v2", {})  # a TIFF may have 12 bits, or 0 for white
        most = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        grey = (np.asarray(image).astype(np.int64) * 255 + most // 2) // most
        grey = 255 - grey if tags.get(ExifTags.Base.PhotometricInterpretation) == 0 else grey
        rgb = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
        rgb.info = dict(image.info)  # holds the orientation
        return rgb
    signed = 2 in getattr(image, "tag_v2", {}).get(ExifTags.Base.SampleFormat, ())
    if image.mode in ("I", "F") or signed:
        kind = "floating-point" if image.mode == "F" else "signed" if signed else "32-bit"
        raise ValueError(f"{kind} pixels, whose black and white are unknown; save it with 8 or 16 unsigned bits")
    return image.convert("RGB")
