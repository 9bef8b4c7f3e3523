# SPDX-License-Identifier: Apache-2.0
"""Annotation files as typed columns: exact integers, finite numbers, text; an error names the entry."""

import gc
import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,30}\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,3})?\s*", re.ASCII)
FLAG = range(2)  # 0 or 1, true or false
_LARGEST = float(np.finfo(np.float32).max)  # boxes and areas become float32


def read_json(path: Path) -> dict:
    """The content of a COCO JSON file, with or without a byte-order mark.

    Raises: FileNotFoundError, ValueError: it is missing, or is not a JSON object with a list 'images'.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no annotation file {path}. See README, "Data", for the expected layout.')
    collecting = gc.isenabled()
    gc.disable()  # millions of new dicts without a cycle: garbage collection would take longer than reading
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{path}: not a COCO annotation file (no list 'images' in it)")
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

    def integers(
        self, field: str, default: int | Sequence[int] | None = None, valid: range | None = None
    ) -> np.ndarray:
        """One integer of every entry, ``(n,)`` int64; ``"12"`` and ``12.0`` are 12.

        Args:
            default: the value of a field that is missing or null; None refuses it.
            valid: the only accepted values; true and false are 1 and 0 if both are valid.
        """
        values, truth = self._values(field, default), valid == FLAG
        wanted = "an integer" if valid is None else f"an integer from {valid[0]} to {valid[-1]}"
        column = _array(values, np.int64, {int})
        if column is None:
            column = np.array(self._parsed(field, values, lambda value: _integer(value, truth), wanted), dtype=np.int64)
        if valid is not None and len(column) and not valid[0] <= column.min() <= column.max() <= valid[-1]:
            self._parsed(field, column.tolist(), lambda value: value if value in valid else None, wanted)
        return column

    def numbers(self, field: str, default: Sequence[float]) -> np.ndarray:
        """One finite number of every entry, ``(n,)`` float64; ``default`` if it is missing or null."""
        values = self._values(field, default)
        column = _array(values, np.float64, {int, float})
        return column if column is not None else np.array(self._parsed(field, values, _number, "a finite number"))

    def boxes(self, field: str) -> np.ndarray:
        """Four finite numbers of every entry, ``(n, 4)`` float64."""
        values = self._values(field, None)
        column = None
        if not set(map(type, values)) - {list} and not set(map(len, values)) - {4}:
            column = _array(list(chain.from_iterable(values)), np.float64, {int, float})
        if column is None:
            column = np.array(self._parsed(field, values, _box, "a list of four finite numbers"))
        return column.reshape(-1, 4)

    def texts(self, field: str) -> list[str]:
        """Nonempty text of every entry."""
        return self._parsed(field, self._values(field, None), _text, "text")

    def _parsed(self, field: str, values: list, parse: Callable, wanted: str) -> list:
        """``parse`` of every value. Raises ValueError if any is None, with the first places."""
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


def _array(values: list, dtype: type, kinds: set[type]) -> np.ndarray | None:
    """The fast path: an array if all values have these types and are in range, else None."""
    if set(map(type, values)) - kinds:
        return None
    try:
        column = np.array(values, dtype=dtype)
    except OverflowError:
        return None
    return column if dtype is np.int64 or (np.abs(column) <= _LARGEST).all() else None


def _integer(value, truth: bool) -> int | None:
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:  # above, floats are not exact
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) and not truth:
        return None
    return int(value) if -(2**63) <= value < 2**63 else None


def _number(value) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
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
