from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from podium.commands.offer import check_data, first_row, local_file, read_offer
from podium.commands.up import EXAMPLES
from shared.errors import PodiumError
from shared.messages import FileFormat

GOOD: dict[str, Any] = {
    "task_id": "t",
    "task_type": "InstructTextTask",
    "model": "org/name",
    "hours_to_complete": 1,
    "dataset": "rows.json",
    "dataset_type": {"field_instruction": "q", "field_output": "a"},
}


def written(folder: Path, fields: object, rows: object = None) -> Path:
    if rows is not None:
        (folder / "rows.json").write_text(json.dumps(rows))
    path = folder / "offer.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


def test_the_example_is_good() -> None:
    note = check_data(read_offer(EXAMPLES / "offer.json"))
    assert "has the columns instruct, output" in note


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not an offer"),
        (GOOD | {"hours_to_complete": 0}, "hours_to_complete"),
        (GOOD | {"hours_to_complete": "soon"}, "hours_to_complete"),
        (GOOD | {"task_type": "Poem"}, "task_type"),
        (GOOD | {"hours": 1}, "unknown field hours"),
        ({key: GOOD[key] for key in GOOD if key != "model"}, "model"),
    ],
)
def test_a_wrong_offer_is_named(tmp_path: Path, fields: object, message: str) -> None:
    with pytest.raises(PodiumError, match=message):
        read_offer(written(tmp_path, fields))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PodiumError, match="can't be read: No such file"):
        read_offer(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"q": "x"}], "no column a; it has q"),
        ({"q": "x"}, "not a JSON array"),
        ([1], "not an object"),
    ],
)
def test_data_that_can_not_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PodiumError, match=message):
        check_data(read_offer(written(tmp_path, GOOD, rows)))


def test_a_column_the_task_type_needs_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(PodiumError, match="must name field_instruction"):
        check_data(read_offer(written(tmp_path, GOOD | {"dataset_type": {}})))


@pytest.mark.parametrize("dataset", ["https://example.org/x.json", "/no/such/file.json"])
def test_data_elsewhere_is_not_checked_and_that_is_said(tmp_path: Path, dataset: str) -> None:
    assert "not checked" in check_data(read_offer(written(tmp_path, GOOD | {"dataset": dataset})))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "q,a\nx,y\n"),
        ("rows.jsonl", '\n{"q": "x", "a": "y"}\n'),
        ("rows.json", '[{"q": "x", "a": "y"}]'),
    ],
)
def test_first_row_of_each_format(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert first_row(tmp_path / name, FileFormat(name.partition(".")[2])) == {"q": "x", "a": "y"}


def test_examples_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_file("wordnet/nouns_test.json") == EXAMPLES / "wordnet" / "nouns_test.json"
