"""Read the rows of a data file: JSON, JSON lines, CSV or Parquet, from this machine or over https."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from shared.errors import DataError, EngineError
from shared.messages import ErrorCode, FileFormat
from trainer_node.engine.fetch import fetch, is_url, public_name

Row = dict[str, Any]


def read_rows(
    source: str,
    file_format: FileFormat,
    *,
    allow_private_urls: bool,
    keep: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """All rows of a local file or an https URL, as dictionaries; `tick` is called for each piece downloaded.

    `keep` is where a download stays, and where it is looked for first: a run that resumes needs the same
    rows, also when their host is down or the URL's signature has expired.
    Raises DataError naming the file, and the row where one is at fault, if it can't be read or holds no row.
    """
    name = public_name(source)
    if file_format is FileFormat.HF:
        raise EngineError(
            ErrorCode.UNSUPPORTED,
            f"{name}: hub data sets can't be read by id; give a JSON, CSV or Parquet file or URL",
        )
    if is_url(source):
        with tempfile.TemporaryDirectory(prefix="podium-data-") as folder:
            path = keep or Path(folder) / "data"
            if not path.exists():
                part = path.with_name(f"{path.name}.part")
                fetch(source, part, allow_private=allow_private_urls, tick=tick)
                part.replace(path)
            rows = _read(path, name, file_format)
    else:
        rows = _read(Path(source).expanduser(), name, file_format)
    if not rows:
        raise DataError(f"{name} holds no rows")
    return rows


def _read(path: Path, name: str, file_format: FileFormat) -> list[Row]:
    try:
        if file_format is FileFormat.CSV:
            return _read_csv(path, name)
        if file_format is FileFormat.PARQUET:
            return _read_parquet(path, name)
        return _read_json(path, name)
    except FileNotFoundError as error:
        raise DataError(f"no such data file: {name}") from error
    except RecursionError as error:
        raise DataError(f"{name} is not usable: it is nested too deeply") from error
    except OSError as error:
        raise DataError(f"can't read {name}: {error.strerror or error}") from error


def _read_json(path: Path, name: str) -> list[Row]:
    """An array of objects or, whatever the format is called, one per line: upstream's loader takes both."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    if not content:
        return []
    if content[:1] == b"[":
        try:
            values = msgspec.json.decode(content, type=list[Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{name} is not valid JSON: {error}") from error
        return [_row(value, name, number) for number, value in enumerate(values, 1)]
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(msgspec.json.decode(line), name, number))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{name}, line {number}: not valid JSON: {error}") from error
    return rows


def _row(value: Any, name: str, number: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{name}, row {number}: a row must be a JSON object with named columns, not {value!r:.40}"
        )
    return value


def _read_csv(path: Path, name: str) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB, is less than one long document
    number = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = []
            for row in csv.DictReader(file, strict=True):
                number += 1
                row.pop(None, None)  # fields beyond the header have no name
                rows.append(dict(row))
            return rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{name}, after row {number - 1}: not valid CSV in UTF-8: {error}") from error


def _read_parquet(path: Path, name: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} is not a readable Parquet file: {error}") from error
    return rows
