"""Rows of CSV whose separator, quotes and escapes are found by trying, with the missing values of pandas."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, product
from typing import BinaryIO, NamedTuple

from shared.errors import DataError
from trainer_node.engine.data.row_set import AskedColumns, Projection, Row, RowSet

SAMPLE = 1 << 16  # characters that decide the dialect
MOST_UNCLOSED = 100  # quotes that never close: each costs to read the rest of the file again
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# What pandas, and so `datasets`, reads as missing.
MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"]
).union(("NA", "NULL", "NaN", "None", "n/a", "nan", "null"))
SINGLE_QUOTED = re.compile(r"(^|[,;\t|])'[^'\n]*'([,;\t|\r\n]|$)", re.MULTILINE)
SPACED = re.compile(r"""[,;\t|] +["'][^"'\n]*["']([,;\t|\r\n]|$)""", re.MULTILINE)
TOO_MANY = "more fields than the header has"
UNCLOSED = "a quote that never closes"


class Dialect(NamedTuple):
    """How fields are separated and quoted."""

    separator: str = ","
    quote: str = '"'
    escape: str | None = None
    spaced: bool = False  # a field may begin with spaces, which don't count

    def __str__(self) -> str:
        """Return the dialect in words."""
        parts = [f"fields separated by {SEPARATORS.get(self.separator, repr(self.separator))}"]
        if self.quote != '"':
            parts.append("in single quotes")
        if self.escape:
            parts.append("with backslashes before quotes")
        if self.spaced:
            parts.append("with spaces before quotes")
        return " ".join(parts)

    def records(self, lines: Iterable[str], *, strict: bool) -> Iterator[list[str]]:
        """Yield the lines as lists of fields; after an error of strict reading the next begins a record."""
        return csv.reader(
            lines,
            delimiter=self.separator,
            quotechar=self.quote,
            escapechar=self.escape,
            doublequote=self.escape is None,
            skipinitialspace=self.spaced,
            strict=strict,
        )


def read_csv(file: BinaryIO, name: str, asked: AskedColumns | None, into: RowSet) -> None:
    """Read UTF-8 text from where the file stands.

    Raises DataError if too much is damaged, UnicodeDecodeError if it isn't UTF-8.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB, is less than one long document
    start = file.tell()
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        dialect, before_header = dialect_of(text.read(SAMPLE), asked)
        if dialect != Dialect():
            into.notice(f"{name} is read as CSV with {dialect}")
        text.seek(start)
        for _ in range(before_header):
            text.readline()
        _read_records(_Records(text, dialect, name, into), name, asked, into)
    finally:
        text.detach()


def dialect_of(sample: str, asked: AskedColumns | None) -> tuple[Dialect, int]:
    """Return the dialect with most of the asked columns and fewest faults, and its header's line.

    In doubt the usual one. A first line such as `sep=;`, which Excel writes, is believed.
    """
    if said := re.match(r"sep=(.)\r?\n", sample):
        return Dialect(said[1]), 1
    quotes = "\"'" if SINGLE_QUOTED.search(sample) else '"'
    escapes = (None, "\\") if '\\"' in sample or "\\'" in sample else (None,)
    spaces = (False, True) if SPACED.search(sample) else (False,)
    candidates = [Dialect(*parts) for parts in product(SEPARATORS, quotes, escapes, spaces)]
    return min(candidates, key=lambda dialect: _faults(dialect, sample, asked)), 0


def has_header(sample: str, asked: AskedColumns) -> bool:
    """Return whether the first line of a text names all columns that are needed, as CSV."""
    dialect, skip = dialect_of(sample, asked)
    lines = sample.splitlines()[skip:]
    return bool(lines) and _faults(dialect, lines[0], asked)[0] == 0


def _faults(dialect: Dialect, sample: str, asked: AskedColumns | None) -> tuple[int, bool, int, int]:
    """Asked columns that are missing; a header of one field; faulty rows; fields that still have quotes."""
    records = dialect.records(io.StringIO(sample, newline=""), strict=True)
    rows: list[list[str]] = []
    errors = 0
    while True:
        try:
            rows.append(next(records))
        except StopIteration:
            break
        except csv.Error:
            errors += 1
    rows = [row for row in rows if row]
    header = [field.strip() for field in rows[0]] if rows else []
    missing = len(set(asked.needed) - set(header)) if asked else 0
    uneven = sum(len(row) != len(header) for row in rows)
    other = "'" if dialect.quote == '"' else '"'
    enclosed = sum(len(field) > 1 and field[0] == field[-1] == other for row in rows for field in row)
    spaced = sum(_is_spaced(field, dialect.quote) for row in rows for field in row)
    return missing, len(header) < 2, errors + uneven, enclosed + spaced


def _is_spaced(field: str, quote: str) -> bool:
    """Return whether a field still has its quotes, because of spaces before them."""
    text = field.lstrip(" ")
    return len(field) > len(text) > 1 and text[0] == text[-1] == quote


class _Records:
    """The records of a file, also those that break the rules of quoting."""

    def __init__(self, text: Iterable[str], dialect: Dialect, name: str, into: RowSet) -> None:
        self.odd = 0  # records with a quote inside a quoted field
        self._text, self._dialect, self._name, self._into = iter(text), dialect, name, into
        self._returned: deque[str] = deque()
        self._taken: list[str] = []
        self._number = 0
        self._unclosed = 0

    def __iter__(self) -> Iterator[list[str]]:
        """Yield each record's fields."""
        strict = self._dialect.records(self._lines(), strict=True)
        while True:
            self._taken.clear()
            self._number += 1
            try:
                fields = next(strict)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error):
                    self._skip_unclosed()
                    strict = self._dialect.records(self._lines(), strict=True)
                    continue
                self.odd += 1
                fields = next(self._dialect.records(chain(list(self._taken), self._lines()), strict=False))
            yield fields

    def _lines(self) -> Iterator[str]:
        while True:
            line = self._returned.popleft() if self._returned else next(self._text, None)
            if line is None:
                return
            self._taken.append(line)
            yield line

    def _skip_unclosed(self) -> None:
        """Drop the line in which the quote opens, and return those that it has swallowed."""
        self._unclosed += 1
        if self._unclosed > MOST_UNCLOSED:
            raise DataError(f"{self._name} is not usable CSV: more than {MOST_UNCLOSED} quotes never close")
        self._into.drop(
            UNCLOSED,
            f"{self._name}, row {self._number - 1}: a quote never closes: {self._taken[0].strip():.60}",
        )
        self._returned.extendleft(reversed(self._taken[1:]))


def _read_records(records: _Records, name: str, asked: AskedColumns | None, into: RowSet) -> None:
    numbered = enumerate(fields for fields in records if fields)
    header = [field.strip() for field in next(numbered, (0, []))[1]]
    into.columns = list(header)
    columns = _columns(header, name, asked, into)
    for number, fields in numbered:
        if len(fields) > len(header) and any(fields[len(header) :]):
            into.drop(
                TOO_MANY, f"{name}, row {number}: {len(fields)} fields, and the header has {len(header)}"
            )
            continue
        row: Row = {}
        for column, place in columns:
            value = fields[place] if place < len(fields) else ""
            row[column] = None if value in MISSING else value
        into.rows.append(row)
    if records.odd:
        into.notice(
            f"{name}: {records.odd} rows have a quote in a quoted field that isn't doubled; they are read as "
            "pandas reads them"
        )


def _columns(
    header: Sequence[str], name: str, asked: AskedColumns | None, into: RowSet
) -> list[tuple[str, int]]:
    """Return the asked columns and their places."""
    roots = Projection(asked, header).roots
    columns = []
    for column in dict.fromkeys(header):
        if roots is None or column in roots:
            columns.append((column, header.index(column)))
            if header.count(column) > 1:
                into.notice(f"{name} has {header.count(column)} columns {column!r}: the first one is read")
    return columns
