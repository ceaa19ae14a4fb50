"""The rows of data files, only with the columns that are asked for, and what was left out and why."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Row = dict[str, Any]

HALF = re.compile("[\ud800-\udfff]")  # one half of a UTF-16 pair, without the other


class AskedColumns(NamedTuple):
    """The columns that are read."""

    needed: tuple[str, ...]  # without one of them no row can be used
    optional: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Return all asked columns, once each."""
        return tuple(dict.fromkeys((*self.needed, *self.optional)))


@dataclass
class RowSet:
    """What reading has found so far."""

    rows: list[Row] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows that can't be read
    notices: list[str] = field(default_factory=list)  # what people should know about the reading
    columns: list[str] = field(default_factory=list)  # of the first row, also those not asked for

    def __len__(self) -> int:
        """Return the number of rows, dropped ones included."""
        return len(self.rows) + sum(self.dropped.values())

    def drop(self, reason: str, detail: str) -> None:
        """Count a row that can't be read; `detail` says where the first one is and what is wrong."""
        if reason not in self.dropped:
            self.notice(detail)
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def notice(self, text: str) -> None:
        """Note something once."""
        if text not in self.notices:
            self.notices.append(text)

    def add(self, other: RowSet) -> None:
        """Append what another file holds."""
        self.rows += other.rows
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        for text in other.notices:
            self.notice(text)
        self.columns = self.columns or other.columns


def column_names(row: Row) -> list[str]:
    """Return the columns of a row; those of a nested object by their dotted paths."""
    names: list[str] = []
    for name, value in row.items():
        names += [f"{name}.{inner}" for inner in value] if value and isinstance(value, dict) else [name]
    return names


class Projection:
    """Takes the columns that are asked for out of decoded rows.

    A name is a column's own or, if there is none, a dotted path into nested objects. `present` are the
    columns of the first row: one that differs by spaces around it is meant. None asks for every column.
    """

    def __init__(self, asked: AskedColumns | None, present: Iterable[str]) -> None:
        self._names = None if asked is None else asked.names
        stripped = {name.strip(): name for name in present}
        known = set(stripped.values())
        self._spaced = {
            name: stripped[name]
            for name in self._names or []
            if name not in known and stripped.get(name, name) != name
        }

    @property
    def roots(self) -> list[str] | None:
        """Return the keys of a row that must be decoded."""
        if self._names is None:
            return None
        keys = [self._spaced.get(name, name) for name in self._names]
        return list(dict.fromkeys([*keys, *(key.partition(".")[0] for key in keys)]))

    @property
    def is_plain(self) -> bool:
        """Return whether a row decoded with the `roots` only is already the result."""
        return self._names is None or not (self._spaced or any("." in name for name in self._names))

    def __call__(self, row: Row) -> Row:
        """Return the asked columns that the row has, under the names by which they are asked for."""
        if self._names is None:
            return row
        found: Row = {}
        for name in self._names:
            key = self._spaced.get(name, name)
            if key in row:
                found[name] = row[key]
            elif "." in key and (value := _at_path(row, key)) is not _ABSENT:
                found[name] = value
        return found


_ABSENT = object()


def _at_path(row: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            return _ABSENT
        row = row[key]
    return row


def text_of(value: Any) -> str | None:
    """Return a value as text where text is asked for; None if it is missing.

    Numbers and booleans are as Python formats them, as in the scorer's prompts; NaN and the infinities are
    missing. Raises TypeError for lists and objects.
    """
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool | int | float):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not text")


def without_halves(value: Any) -> Any:
    """Return the same value without halves of characters, which neither a tokenizer nor a file can take."""
    if isinstance(value, str):
        return value if value.isascii() else HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [without_halves(item) for item in value]
    if isinstance(value, dict):
        return {without_halves(key): without_halves(item) for key, item in value.items()}
    return value
