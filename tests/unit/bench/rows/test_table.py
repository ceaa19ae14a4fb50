"""Data files of every kind are read right, or refused with what was found and what to do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from bench.rows.case import Case, answer_of, fault_of
from bench.rows.table import CASES, page_with

PAGE = Path(__file__).parents[4] / "docs" / "data.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_right_value(case: Case) -> None:
    assert not fault_of(case, answer_of(case))


def test_the_published_table_is_the_one_the_code_makes() -> None:
    """After a deliberate change: `python -m bench rows --write docs/data.md`."""
    page = PAGE.read_text()
    assert page_with(page) == page


def test_a_page_without_the_marks_is_not_written() -> None:
    with pytest.raises(ValueError, match="the page lacks"):
        page_with("# Data files\n")


def test_the_table_is_large_and_its_names_differ() -> None:
    assert len(CASES) >= 60
    assert not [name for name, count in Counter(case.name for case in CASES).items() if count > 1]


@pytest.mark.parametrize("field", ["right", "dropped", "notices", "refusal"])
def test_a_wrong_value_is_found(field: str) -> None:
    (case,) = (case for case in CASES if case.name == "a_bad_line.jsonl")
    wrong: dict[str, object] = {
        "right": case.right[:-1],
        "dropped": {"not valid JSON": 2},
        "notices": (),
        "refusal": "refused",
    }
    assert fault_of(msgspec.structs.replace(case, **{field: wrong[field]}), answer_of(case))
