"""Read the rows of data files (JSON, JSON lines, CSV, Parquet): local, from an https server or the hub."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shared.errors import DataError
from shared.messages import FileFormat
from trainer_node.engine.data.download import fetch, is_url, public_name
from trainer_node.engine.data.hf_datasets import download
from trainer_node.engine.data.splits import FORMATS

Row = dict[str, Any]


class DataFile(NamedTuple):
    """A data file that is on this machine now."""

    path: Path
    format: FileFormat
    name: str  # as people know it


def read_rows(
    source: str,
    file_format: FileFormat,
    *,
    allow_private_urls: bool,
    keep: Path | None = None,
    tick: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """All rows of a local file, an https URL or a hub data set, as dictionaries: `located`, then `read`."""
    with tempfile.TemporaryDirectory(prefix="podium-data-") as folder:
        place = keep or Path(folder) / "data"
        return read(located(source, file_format, place, allow_private_urls=allow_private_urls, tick=tick))


def located(
    source: str,
    file_format: FileFormat,
    keep: Path,
    *,
    allow_private_urls: bool,
    tick: Callable[[str], None] = lambda text: None,
) -> list[DataFile]:
    """The files of a data reference, downloaded if need be; `tick` is called for each piece.

    `keep` is where a download stays, and where it is looked for first: a run that resumes needs the same
    rows, also when their host is down or the URL's signature has expired.
    Raises DataError if they can't be had.
    """
    name = public_name(source)
    if file_format is FileFormat.HF:
        paths = download(source, keep, allow_private=allow_private_urls, tick=tick)
        return [DataFile(path, FORMATS[path.suffix], f"{name}/{path.name}") for path in paths]
    if not is_url(source):
        return [DataFile(Path(source).expanduser(), file_format, name)]
    if not keep.exists():
        part = keep.with_name(f"{keep.name}.part")
        fetch(source, part, allow_private=allow_private_urls, tick=tick)
        part.replace(keep)
    return [DataFile(keep, file_format, name)]


def read(files: Sequence[DataFile]) -> list[Row]:
    """All rows of the files, one after the other.

    Raises DataError naming the file, and the row where one is at fault, if it can't be read or holds no row.
    """
    rows: list[Row] = []
    for file in files:
        found = _read(file.path, file.name, file.format)
        if not found:
            raise DataError(f"{file.name} holds no rows")
        rows += found
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
