"""JSON where memory is short: its decoded size is foreseen, and Python's decoder reads the same rows."""

from __future__ import annotations

import gc
import io
import json
import tracemalloc
from typing import Any

import msgspec
import pytest

from trainer_node.engine.data.formats import json_rows
from trainer_node.engine.data.formats.json_rows import decoded_size, read_json
from trainer_node.engine.data.row_set import AskedColumns, Row, RowSet

ASKED = AskedColumns(("q", "a"))
ROWS = [{"q": f"question {number}", "a": "an answer, \U0001f600"} for number in range(300)]
ARRAY = json.dumps(ROWS).encode()
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)

CONTENTS = {
    "rows": [{"instruction": "Say, in a word: " * 20, "output": "ab" * 20}] * 500,
    "emoji": ["\U0001f600" + "a" * 500] * 100,
    "short texts": ["ab"] * 3000,
    "empty objects": [{}] * 3000,
    "empty arrays": [[]] * 3000,
    "arrays of one": [[0]] * 3000,
    "nested objects": [{"a": {"b": {}}}] * 3000,
    "large objects": [{str(key): key + 0.5 for key in range(86)}] * 20,
    "floats": [number + 0.5 for number in range(3000)],
    "large integers": [1 << 62] * 3000,
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_no_content_decodes_to_more_than_is_foreseen(content: Any) -> None:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    gc.collect()
    tracemalloc.start()
    try:
        found = msgspec.json.decode(text)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == content
    assert most <= decoded_size(text)


def rows_of(content: bytes) -> list[Row]:
    found = RowSet()
    read_json(io.BytesIO(content), "data", ASKED, found)
    return found.rows


class Memory:
    """As much as is said; what was asked for is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, left: int) -> None:
        self.left = left
        self.asked: list[int] = []
        monkeypatch.setattr(json_rows, "has_memory", self.has_memory)

    def has_memory(self, size: int) -> bool:
        self.asked.append(size)
        return size <= self.left


@pytest.mark.parametrize("content", [ARRAY, LINES], ids=["array", "lines"])
def test_short_of_memory_the_same_rows_are_read(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of(content) == ROWS
    size = decoded_size(content)
    memory = Memory(monkeypatch, left=size - 1)
    monkeypatch.setattr(msgspec.json, "decode", None)  # what the array would be read by
    assert rows_of(content) == ROWS
    assert memory.asked[0] == json_rows.MOST_PER_BYTE * len(content) > size
    assert memory.asked[-1] == size


def test_memory_is_looked_at_for_each_block_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", 4096)
    memory = Memory(monkeypatch, left=1 << 40)
    assert rows_of(LINES) == ROWS
    assert len(memory.asked) == -(-len(LINES) // 4096)
    assert sum(memory.asked) == json_rows.MOST_PER_BYTE * len(LINES)
