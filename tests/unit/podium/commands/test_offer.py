from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from podium.commands.offer import check_data, local_file, read_offer
from podium.commands.up import EXAMPLES
from shared.errors import PodiumError

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
        ('{"x": ' + "[" * 100_000, "nested too deeply"),
        ("[1]", "is not an offer"),
        (GOOD | {"hours_to_complete": 0}, "hours_to_complete"),
        (GOOD | {"hours_to_complete": "soon"}, "hours_to_complete"),
        (GOOD | {"task_type": "Poem"}, "task_type"),
        (GOOD | {"hours": 1}, "unknown field 'hours'; is 'hours_to_complete' meant"),
        (
            GOOD | {"dataset_type": {"field_instruction": "q", "field_outptu": "a"}},
            "dataset_type: unknown 'field_outptu'; is 'field_output' meant",
        ),
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
        ([], "holds no rows"),
        ([{"q": "x"}], "no row has the column 'a'; the columns of row 1 are 'q'"),
        ([1], "must be a JSON object"),
    ],
)
def test_data_that_can_not_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PodiumError, match=message):
        check_data(read_offer(written(tmp_path, GOOD, rows)))


def test_a_column_the_task_type_needs_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(PodiumError, match="field_instruction is missing"):
        check_data(read_offer(written(tmp_path, GOOD | {"dataset_type": {}})))


@pytest.mark.parametrize("dataset", ["https://example.org/x.json", "/no/such/file.json"])
def test_data_elsewhere_is_not_checked_and_that_is_said(tmp_path: Path, dataset: str) -> None:
    assert "not checked" in check_data(read_offer(written(tmp_path, GOOD | {"dataset": dataset})))


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        ("rows.csv", "q;a\nx;y\n", "has the columns q, a in 1 rows; rows.csv is read as CSV with fields"),
        (
            "rows.jsonl",
            '\n{"q": "x", "a": "y"}\n{"q": 1, "a": 2}\n{"q"\n',
            "in 2 rows of 3; rows.jsonl, line 4",
        ),
        ("rows.json", '{"q": "x", "a": NaN}', "in 1 rows"),
    ],
)
def test_data_is_read_as_the_trainer_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, note: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    fields = GOOD | {"dataset": name, "file_format": name.partition(".")[2]}
    assert note in check_data(read_offer(written(tmp_path, fields)))


def test_examples_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_file("wordnet/nouns_test.json") == EXAMPLES / "wordnet" / "nouns_test.json"
