"""Read the rows of data files on this machine: JSON, CSV or Parquet, by their content, not their name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shared.errors import DataError, DataUnavailableError
from shared.messages.offers import FileFormat
from trainer_node.engine.data.columns import refuse_missing
from trainer_node.engine.data.formats.content import (
    HEAD,
    PARQUET,
    as_utf8,
    from_other_encoding,
    head_of,
    refuse_foreign,
    unpacked,
)
from trainer_node.engine.data.formats.csv_rows import has_header, read_csv
from trainer_node.engine.data.formats.json_rows import read_json
from trainer_node.engine.data.formats.parquet_rows import read_parquet
from trainer_node.engine.data.row_set import AskedColumns, RowSet

JSON = re.compile(rb'\s*(\[\s*[{\]]|\{\s*["}])')


class DataFile(NamedTuple):
    """A data file that is on this machine now."""

    path: Path
    format: FileFormat
    name: str  # as people know it


def read(files: Sequence[DataFile], asked: AskedColumns | None = None) -> RowSet:
    """Read all rows of the files in order, with the columns that are asked for; None asks for all.

    Raises DataError naming the file if one can't be read or holds no row, if most of its rows are damaged, or
    if no row has a column that is needed.
    """
    total = RowSet()
    for file in files:
        found = _read(file, asked)
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in found.dropped.items())
        if not found.rows:
            told = f" that can be read ({reasons}). {found.notices[-1]}" if reasons else ""
            raise DataError(f"{file.name} holds no rows{told}")
        if sum(found.dropped.values()) > len(found.rows):
            raise DataError(
                f"{file.name}: most of its {len(found)} rows can't be read ({reasons}). {found.notices[-1]}"
            )
        total.add(found)
    if asked is not None:
        names = ", ".join(file.name for file in files[:3])
        refuse_missing(asked, total.rows, total.columns, names)
    return total


def _read(file: DataFile, asked: AskedColumns | None) -> RowSet:
    try:
        with ExitStack() as opened:
            return _read_opened(opened, file, asked)
    except FileNotFoundError as error:
        raise DataError(f"no such data file: {file.name}") from error
    except RecursionError as error:
        raise DataError(f"{file.name} is not usable: it is nested too deeply") from error
    except OSError as error:
        kind = DataUnavailableError if error.errno else DataError  # Arrow's for damaged pages have no number
        raise kind(f"can't read {file.name}: {error.strerror or error}") from error


def _read_opened(opened: ExitStack, file: DataFile, asked: AskedColumns | None) -> RowSet:
    found = RowSet()
    packed = opened.enter_context(file.path.open("rb"))
    plain = opened.enter_context(unpacked(packed, file.name, found))
    head = head_of(plain)
    if head.startswith(PARQUET):
        read_parquet(file.path if plain is packed else plain, file.name, asked, found)
        return found
    refuse_foreign(head, file.name)
    text = opened.enter_context(as_utf8(plain, head, file.name, found))
    read = _reader_of(text, file, asked, found)
    try:
        read(text, file.name, asked, found)
    except UnicodeDecodeError:
        found = RowSet(notices=found.notices)
        text = opened.enter_context(from_other_encoding(plain, file.name, found))
        read(text, file.name, asked, found)
    return found


def _reader_of(
    text: BinaryIO, file: DataFile, asked: AskedColumns | None, found: RowSet
) -> Callable[[BinaryIO, str, AskedColumns | None, RowSet], None]:
    """Return the reader of a text: JSON by its first character, CSV by a header with the needed columns."""
    start = text.tell()
    begin = text.read(HEAD)
    text.seek(start)
    if JSON.match(begin):
        return read_json
    if file.format is FileFormat.CSV:
        return read_csv
    if asked is not None and has_header(begin.decode("utf-8", "replace"), asked):
        found.notice(f"{file.name} is CSV, though its format is called {file.format}")
        return read_csv
    if file.format is FileFormat.PARQUET:
        raise DataError(f"{file.name} is not a readable Parquet file: it begins with {begin[:16]!r}")
    return read_json
