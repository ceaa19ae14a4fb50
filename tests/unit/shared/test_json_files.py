"""Files of our own that were damaged on disk: each counts as absent, and is named once in the log."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from msgspec import Struct
from structlog.testing import capture_logs

from shared.json_files import DamagedFileError, load_json, read_json, read_json_if_possible

DAMAGES = {
    "empty": b"",
    "cut": b'{"name": "o',
    "zeros": b"\0" * 64,
    "no UTF-8": b'{"name": "\xff\xfe"}',
    "no UTF-8 in a table": b'{"name": "n", "more": {"\xff": 1}}',
    "of another kind": b'{"name": 3}',
    "nested": b'{"more": {"x": ' + b"[" * 100_000,
}


class Note(Struct, frozen=True):
    """What the file should hold."""

    name: str
    more: dict[str, int] = {}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "note.json"


def test_a_whole_one_is_read(path: Path) -> None:
    path.write_bytes(msgspec.json.encode(Note("n")))
    assert load_json(path, Note) == read_json(path, Note) == read_json_if_possible(path, Note) == Note("n")


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_counts_as_absent_and_is_named_once(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with capture_logs() as lines:
        assert [read_json(path, Note), read_json_if_possible(path, Note)] == [None, None]
    assert [str(path) in line["reason"] for line in lines] == [True]
    with pytest.raises(DamagedFileError, match=r"note\.json is damaged: "):
        load_json(path, Note)


def test_an_absent_one_is_no_news(path: Path) -> None:
    path.with_name("file").touch()
    with capture_logs() as lines:
        assert read_json(path, Note) is None
        assert read_json(path.with_name("file") / "note.json", Note) is None
    assert lines == []


def test_one_that_can_not_be_read_is_an_error_unless_all_goes_on_without_it(path: Path) -> None:
    path.mkdir()  # a mode that forbids reading holds for no root
    with pytest.raises(IsADirectoryError, match=r"note\.json"):
        read_json(path, Note)
    with capture_logs() as lines:
        assert read_json_if_possible(path, Note) is None
    assert [line["reason"] for line in lines] == [f"{path} can't be read: {os.strerror(21)}"]
