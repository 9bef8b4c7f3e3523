# SPDX-License-Identifier: Apache-2.0
"""Annotation files as typed columns: exact integers, finite numbers, text; an error names the entry."""

import contextlib
import gc
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,30}\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,3})?\s*", re.ASCII)
FLAG = range(2)  # 0 or 1, true or false
INT64 = range(-(2**63), 2**63)
_LARGEST = float(np.finfo(np.float32).max)  # boxes and areas become float32


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For reading millions of entries, which form no cycles: searching for cycles would take longer than reading."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_json(path: Path) -> dict:
    """The content of a COCO JSON file, with or without a byte-order mark.

    Raises: FileNotFoundError, ValueError: it is missing, or is not a JSON object with a list 'images'.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no annotation file {path}. See README, "Data", for the expected layout.')
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{path}: not a COCO annotation file (no list 'images' in it)")
    return content


def _object(pairs: list[tuple]) -> dict:
    """A JSON object. Raises ValueError: it has two values of one name, of which Python would keep the last."""
    content = dict(pairs)
    for name, value in pairs if len(content) < len(pairs) else ():
        if content[name] != value:
            raise ValueError(f"two values of {name!r} in one object: keep one")
    return content


class JsonList:
    """A list of objects in a JSON file, read field by field.

    Args:
        path: the file, for messages.
        place: the list's key in the file, such as ``annotations``.
        entries: the list; None (missing) is an empty one.
        name_of: the name of entry number ``index`` in messages; default ``place[index]``.
    Raises: ValueError: it is not a list, or an entry is not an object.
    """

    def __init__(
        self, path: Path, place: str, entries: list[dict] | None, name_of: Callable[[int], str] | None = None
    ) -> None:
        self.path, self.entries = path, [] if entries is None else entries
        self.name_of = name_of or (lambda index: f"{place}[{index}]")
        if not isinstance(self.entries, list):
            raise ValueError(f"{path}: its {place!r} is {_shown(entries)}; expected a list")
        for index, entry in enumerate(self.entries):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: {self.name_of(index)} is {_shown(entry)}; expected an object")

    def __len__(self) -> int:
        return len(self.entries)

    def integers(self, field: str, default: int | Sequence[int] | None = None, valid: range = INT64) -> np.ndarray:
        """One integer of every entry, ``(n,)`` int64; ``"12"`` and ``12.0`` are 12.

        Args:
            default: the value of a field that is missing or null; None refuses it.
            valid: the only accepted values; true and false are 1 and 0 if both are valid.
        """
        wanted = "an integer" if valid == INT64 else f"an integer from {valid[0]} to {valid[-1]}"
        return np.array(self._parsed(field, default, partial(_integer, valid=valid), wanted), dtype=np.int64)

    def numbers(self, field: str, default: Sequence[float]) -> np.ndarray:
        """One finite number of every entry, ``(n,)`` float64; ``default`` if it is missing or null."""
        return np.array(self._parsed(field, default, _number, "a finite number"), dtype=np.float64)

    def boxes(self, field: str) -> np.ndarray:
        """Four finite numbers of every entry, ``(n, 4)`` float64."""
        boxes = self._parsed(field, None, _box, "a list of four finite numbers")
        return np.array(boxes, dtype=np.float64).reshape(-1, 4)

    def texts(self, field: str) -> list[str]:
        """Nonempty text of every entry."""
        return self._parsed(field, None, _text, "text")

    def paths(self, field: str) -> list[str]:
        """A path of every entry, without ``./``."""
        return [re.sub(r"(?<![^/])\./+", "", path) for path in self.texts(field)]

    def _parsed(self, field: str, default, parse: Callable, wanted: str) -> list:
        """``parse`` of every value. Raises ValueError if any is None, with the first places."""
        values = self._values(field, default)
        parsed = [parse(value) for value in values]
        if None in parsed:
            wrong = [index for index, value in enumerate(parsed) if value is None]
            places = ", ".join(f"{self.name_of(i)}[{field!r}] is {_shown(values[i])}" for i in wrong[:3])
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"{self.path}: {places}{more}; expected {wanted}")
        return parsed

    def _values(self, field: str, default) -> list:
        values = [entry.get(field) for entry in self.entries]
        if None not in values:
            return values
        if default is None:
            lacking = values.index(None)
            raise ValueError(f"{self.path}: {self.name_of(lacking)} lacks {field!r}: {_shown(self.entries[lacking])}")
        defaults = [default] * len(values) if isinstance(default, int) else default
        return [other if value is None else value for value, other in zip(values, defaults, strict=True)]


def _integer(value, valid: range) -> int | None:
    if type(value) is not int:
        text = isinstance(value, str) and _INTEGER.fullmatch(value)
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53  # above, floats are not exact
        if not (text or whole or isinstance(value, bool) and valid == FLAG):
            return None
        value = int(value)
    return value if value in valid else None


def _number(value) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:
        return None  # also NaN, for which no comparison is true
    return float(value)


def _box(value) -> list[float] | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [_number(side) for side in value]
    return None if None in numbers else numbers


def _text(value) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        return value if value.encode() else None
    except UnicodeEncodeError:  # a lone surrogate: valid in JSON, but not in a file name
        return None


def _shown(value) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:80]}..."
