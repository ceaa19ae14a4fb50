from __future__ import annotations

from pathlib import Path

import pytest

from podium.dataset_type import dataset_type, refuse_unknown
from shared.errors import SettingsError
from shared.messages.offers import DatasetType

TEXT = '{"field_instruction": "q", "field_output": "a"}'


def test_it_is_json_or_a_file(tmp_path: Path) -> None:
    wanted = DatasetType(field_instruction="q", field_output="a")
    assert dataset_type(TEXT) == wanted
    (tmp_path / "columns.json").write_text(TEXT)
    assert dataset_type(str(tmp_path / "columns.json")) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no.json", "--dataset-type is neither a JSON object nor a readable file"),
        ("{", "--dataset-type is invalid"),
        ('{"field_instruction": 3}', "--dataset-type is invalid: .*field_instruction"),
        (
            '{"field_instruction": "q", "field_outptu": "a"}',
            "--dataset-type: unknown 'field_outptu'; is 'field_output' meant?",
        ),
        ('{"rows": 3}', "--dataset-type: unknown 'rows'; the names are system_prompt, "),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataset_type(text)


def test_known_names_are_not_refused() -> None:
    refuse_unknown({"field_output": "a"}, "here")
    refuse_unknown(None, "here")
