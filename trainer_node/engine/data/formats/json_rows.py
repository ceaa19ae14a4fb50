"""Rows of JSON: an array, one object per line, objects after each other, wrapped rows, columns as lists.

msgspec decodes only the columns that are asked for. What it refuses but Python and pandas write (NaN,
Infinity, half characters, numbers beyond a double) goes by Python's own decoder, which is ten times slower.
So does what there may not be memory for: msgspec 0.22 ends the process where Python raises MemoryError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO, NamedTuple, TypedDict

import msgspec

from shared.errors import DataError
from trainer_node.engine.data.formats.json_tables import rows_of_object
from trainer_node.engine.data.row_set import (
    AskedColumns,
    Projection,
    Row,
    RowSet,
    column_names,
    without_halves,
)
from trainer_node.engine.limits import has_memory

HEAD = 1 << 20  # bytes that are searched for the first row, whose columns are needed
BLOCK = 1 << 20  # bytes of lines that memory is looked at for
SPACE = re.compile(r"\s*")
AROUND = " \t\r\n\ufeff\x1e"  # the first row: a joined file's mark, or that of a JSON sequence
NEXT_ROW = re.compile(r"\}\s*,\s*(?=\{)")  # what may be the end of a damaged element of an array
BETWEEN = re.compile("[\\s,\ufeff\x1e]*")  # between objects: also commas, marks of joined files and sequences
MARK_SIZES = {  # what one of these can stand for, besides the characters of strings
    b'"': 40,  # half a string's head
    b",": 56,  # a number and its place in a list
    b":": 128,  # a number and its place in a dictionary
    b"[": 128,
    b"{": 256,
}
WIDEST = 4  # bytes of each character of a string that has one emoji
MOST_PER_BYTE = WIDEST + max(MARK_SIZES.values())
MOST_DAMAGED = 100  # elements of an array: each error counts the lines before it
INVALID = "not valid JSON"
NOT_OBJECT = "not a JSON object"

# NaN and the infinities are missing values, as in pandas and `datasets`; text may have line breaks.
_decode = json.JSONDecoder(parse_constant=lambda _: None, strict=False).raw_decode


def read_json(file: BinaryIO, name: str, asked: AskedColumns | None, into: RowSet) -> None:
    """Read UTF-8 text of any of these forms from where the file stands.

    Raises DataError if it is none of them, UnicodeDecodeError if a column that is asked for isn't UTF-8.
    """
    start = file.tell()
    head = file.read(HEAD)
    file.seek(start)
    first = head.lstrip(AROUND.encode())[:1]
    if not first:
        return
    if first not in (b"[", b"{"):
        begin = head.lstrip()[:60].decode("utf-8", "replace")
        raise DataError(
            f"{name} is not valid JSON: it begins with {begin!r}, not with [ or {{; "
            "if it is CSV or Parquet, name that as the file format"
        )
    into.columns = _first_columns(head)
    rows = _Rows(name, asked, into)
    if first == b"[":
        _read_array(file, rows)
    else:
        _read_objects(file, start, rows)
    if rows.broken:
        into.notice(
            f"{name}: half a character (a lone surrogate) became U+FFFD in {rows.broken} rows, first in "
            f"{rows.first_broken}"
        )


class _InvalidError(DataError):
    """The text is not JSON."""


class _Damaged(NamedTuple):
    """An element of an array that is not JSON, and is followed by others."""

    begin: str
    error: ValueError


class _Rows:
    """Collects what is asked for of decoded objects."""

    def __init__(self, name: str, asked: AskedColumns | None, into: RowSet) -> None:
        self.name, self.asked, self.into = name, asked, into
        self._notices = len(into.notices)  # of before
        self.broken, self.first_broken = 0, ""  # rows with half a character, and where the first one is
        self.project = Projection(asked, into.columns)
        roots = self.project.roots
        fields = {root: Any for root in roots or []}
        self.type: Any = (
            dict[str, Any] if roots is None else TypedDict("Fields", fields, total=False)  # type: ignore
        )

    def add(self, value: Any, place: str) -> None:
        """Collect a row that Python's decoder made."""
        if not isinstance(value, dict):
            text = f"{self.name}, {place}: a row must be a JSON object with named columns, not {value!r:.40}"
            self.into.drop(NOT_OBJECT, text)
            return
        row = self.project(value)
        whole = without_halves(row)
        if whole != row:
            self.broken, self.first_broken = self.broken + 1, self.first_broken or place
        self.into.rows.append(whole)

    def reset(self) -> None:
        """Forget the rows: they are read another way."""
        self.broken, self.first_broken = 0, ""
        self.into.rows.clear()
        self.into.dropped.clear()
        del self.into.notices[self._notices :]

    @property
    def mostly_read(self) -> bool:
        """Return whether more rows could be read than not."""
        return len(self.into.rows) > sum(self.into.dropped.values())


def _read_array(file: BinaryIO, rows: _Rows) -> None:
    content = file.read()
    if not _is_safe([content]):
        _read_text(content.decode(), rows)
        return
    try:
        found: list[Row] = msgspec.json.decode(content, type=list[rows.type])  # type: ignore[name-defined]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        _read_text(content.decode(), rows)
        return
    rows.into.rows += found if rows.project.is_plain else map(rows.project, found)


def _read_objects(file: BinaryIO, start: int, rows: _Rows) -> None:
    """Read one object per line; else objects over several lines, or a single one, which may hold all rows."""
    if _read_lines(file, rows, begun_well=False) and len(rows.into) > 1 and rows.mostly_read:
        return
    rows.reset()
    file.seek(start)
    try:
        _read_text(file.read().decode(), rows)
    except _InvalidError:  # perhaps lines, and the first one is damaged
        rows.reset()
        file.seek(start)
        _read_lines(file, rows, begun_well=True)
        if not rows.mostly_read:
            raise


def _read_lines(file: BinaryIO, rows: _Rows, *, begun_well: bool) -> bool:
    """Read one object per line; return False at once if the first isn't one, unless it has `begun_well`."""
    decode: Callable[[bytes], Row] = msgspec.json.Decoder(rows.type).decode
    found, project = rows.into.rows, None if rows.project.is_plain else rows.project
    for number, (line, is_safe) in enumerate(_lines(file), 1):
        try:
            row = decode(line) if is_safe else None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            row = None
        if row is not None:
            found.append(row if project is None else project(row))
        elif not _read_line(line.decode(), number, rows):
            if not (begun_well or found):
                return False
            begin = line.strip()[:60].decode(errors="replace")
            rows.into.drop(INVALID, f"{rows.name}, line {number}: {INVALID}: {begin!r}")
    return True


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yield lines, and whether there is memory for what is decoded of them."""
    while lines := file.readlines(BLOCK):
        is_safe = _is_safe(lines)
        for line in lines:
            yield line, is_safe


def _is_safe(texts: list[bytes]) -> bool:
    """Return whether there is memory for what is decoded of some texts, whatever it is or by its marks."""
    most = MOST_PER_BYTE * sum(map(len, texts))
    return has_memory(most) or has_memory(sum(map(decoded_size, texts)))


def decoded_size(text: bytes) -> int:
    """Return the most bytes that the objects of JSON can take, in CPython; two to five times what most do."""
    characters = len(text) * (1 if text.isascii() else WIDEST)
    return characters + sum(size * text.count(mark) for mark, size in MARK_SIZES.items())


def _read_line(line: str, number: int, rows: _Rows) -> bool:
    """Read a line that isn't simply one object; return whether it is valid."""
    try:
        values = list(_values(line))
    except (ValueError, RecursionError):
        return False
    for value in values:
        rows.add(value, f"line {number}")
    return True


def _read_text(text: str, rows: _Rows) -> None:
    """Read a whole file with Python's decoder."""
    number, only = 0, None
    damaged: list[str] = []
    try:
        for number, value in enumerate(_values(text), 1):
            only = value if number == 1 else None
            if isinstance(value, _Damaged):
                damaged.append(f"row {number}: {value.error}")
                rows.into.drop(INVALID, f"{rows.name}, row {number}: {INVALID}: {value.begin!r}")
                if len(damaged) > MOST_DAMAGED:
                    break
            else:
                rows.add(value, f"row {number}")
    except ValueError as error:
        raise _InvalidError(f"{rows.name} is {INVALID}: {_explained(error, text, number + 1)}") from error
    if len(damaged) > MOST_DAMAGED or (damaged and not rows.mostly_read):
        raise _InvalidError(f"{rows.name} is {INVALID}: {damaged[0]}")
    if isinstance(only, dict) and text.lstrip(AROUND)[0] == "{":
        _read_only(only, rows)


def _read_only(value: Row, rows: _Rows) -> None:
    """Read a file's only object: a row, or one that holds the rows."""
    found, notice = rows_of_object(value, rows.asked, rows.name)
    if not notice:
        return
    rows.reset()
    rows.into.notice(notice)
    rows.into.columns = column_names(found[0])
    rows.project = Projection(rows.asked, rows.into.columns)
    for number, row in enumerate(found, 1):
        rows.add(row, f"row {number}")


def _values(text: str) -> Iterator[Any]:
    """Yield the objects of a text and the elements of its arrays. Raises ValueError."""
    position = _after(BETWEEN, text, 0)
    while position < len(text):
        if text[position] == "[":
            position = yield from _elements(text, position)
        else:
            value, position = _decode(text, position)
            yield value
        position = _after(BETWEEN, text, position)


def _elements(text: str, position: int) -> Generator[Any, None, int]:
    """Yield the elements of the array that begins there, one by one; returns where it ends."""
    position = _after(SPACE, text, position + 1)
    while not text.startswith("]", position):
        try:
            value, end = _decode(text, position)
        except json.JSONDecodeError as error:
            found = NEXT_ROW.search(text, error.pos)
            if found is None:
                raise
            value, end = _Damaged(text[position : position + 60], error), found.start() + 1
        yield value
        position = _after(SPACE, text, end)
        if text.startswith(",", position):
            position = _after(SPACE, text, position + 1)
        elif not text.startswith("]", position):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    return position + 1


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position


def _explained(error: ValueError, text: str, row: int) -> str:
    if isinstance(error, json.JSONDecodeError) and (
        error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    ):
        return f"it ends inside row {row}, so a part of the file is missing"
    return f"row {row}: {error}"


def _first_columns(head: bytes) -> list[str]:
    """Return the columns of the first object, if it is in the head."""
    begin = head.find(b"{")
    try:
        row, _ = _decode(head[begin:].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return []
    return column_names(row) if isinstance(row, dict) else []
