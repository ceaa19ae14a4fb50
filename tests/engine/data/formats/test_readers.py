"""Many rows and many files: what is counted, what is said once, what is left of a file that can't be read."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from shared.errors import DataError
from shared.messages.offers import FileFormat
from trainer_node.engine.data.formats import content
from trainer_node.engine.data.formats.readers import DataFile, read
from trainer_node.engine.data.row_set import AskedColumns

ASKED = AskedColumns(("q",))


def written(folder: Path, name: str, data: bytes) -> DataFile:
    path = folder / name
    path.write_bytes(data)
    return DataFile(path, FileFormat.JSONL, name)


def test_several_files_are_one_set(tmp_path: Path) -> None:
    files = [
        written(tmp_path, "a.jsonl", b'{"q": 1}\n{"q": 2}\n{"q"\n'),
        written(tmp_path, "b.jsonl", b'{"q": 3}\n{"q": 4}\n{"q": \n'),
    ]
    found = read(files, ASKED)
    assert [row["q"] for row in found.rows] == [1, 2, 3, 4]
    assert found.dropped == {"not valid JSON": 2}
    assert [text.partition(":")[0] for text in found.notices] == ["a.jsonl, line 3", "b.jsonl, line 3"]
    assert len(found) == 6


def test_a_thousand_broken_rows_are_one_notice(tmp_path: Path) -> None:
    rows = b"".join(json.dumps({"q": f"{number} \ud83d"}).encode() + b"\n" for number in range(1000))
    found = read([written(tmp_path, "a.jsonl", rows)], ASKED)
    assert len(found.rows) == 1000
    assert found.notices == [
        "a.jsonl: half a character (a lone surrogate) became U+FFFD in 1000 rows, first in line 1"
    ]


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MAX_BYTES", 1 << 20)
    bomb = written(tmp_path, "a.jsonl.gz", gzip.compress(bytes(5 << 20)))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz unpacks to more than 0\.0 GB"):
        read([bomb], ASKED)


def test_other_columns_take_no_memory(tmp_path: Path) -> None:
    rows = b"".join(
        json.dumps({"q": str(number), "other": "x" * 5000}).encode() + b"\n" for number in range(2000)
    )
    file = written(tmp_path, "a.jsonl", rows)  # 10 MB
    tracemalloc.start()
    try:
        assert len(read([file], ASKED).rows) == 2000
        assert (
            tracemalloc.get_traced_memory()[1] < 4e6
        )  # a head of 1 MiB, decoded to find the columns, is most
    finally:
        tracemalloc.stop()
