"""Rows from files of every format, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from shared.errors import DataError
from shared.messages.offers import FileFormat
from trainer_node.engine.data.examples import read_rows


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    rows = [{"ask": "one, two\n", "say": 'a "b"'}, {"ask": "\u00e4", "say": "c"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "a.csv").write_text('\ufeffask,say\r\n"one, two\n","a ""b"""\r\n\u00e4,c\r\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for kind in (FileFormat.JSON, FileFormat.JSONL, FileFormat.CSV, FileFormat.PARQUET):
        assert read_rows(str(tmp_path / f"a.{kind}"), kind, allow_private_urls=False).rows == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "a.json holds no rows"),
        ("a.json", b"[]", "a.json holds no rows"),
        ("a.json", b'[{"a": 1}', "a.json is not valid JSON"),
        ("a.json", b"[" * 100_000, "a.json is not usable: it is nested too deeply"),
        ("a.json", b"[5, 6]", "a.json, row 1: a row must be a JSON object"),
        ("a.jsonl", b'{"a": \n{"a": \n', "a.jsonl is not valid JSON: it ends inside row 1"),
        ("a.csv", b"", "a.csv holds no rows"),
        ("a.csv", b"a,b\n\xff\xfe,1\n", "a.csv is not UTF-8, nor text in a western encoding"),
        ("a.parquet", b"PAR1 not really", "a.parquet is not a readable Parquet file"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name), FileFormat(name[2:]), allow_private_urls=False)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        read_rows(str(tmp_path / "none.json"), FileFormat.JSON, allow_private_urls=False)
    with pytest.raises(DataError, match="can't read"):
        read_rows(str(tmp_path), FileFormat.JSON, allow_private_urls=False)
