"""The table of offers in docs/deciding.md is what the code says; what must pass passes, the rest does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.conformance.offers import EXAMPLES, Example, page_with, verdict_on
from gateway.policy.house import THRESHOLD

PAGE = Path(__file__).parents[4] / "docs" / "deciding.md"
TAKEN = {"small model", "8B, preference pairs", "70B, chat", "unknown size", "CPU slot, small model"}


def test_the_published_table_is_the_one_the_code_makes() -> None:
    """After a deliberate change: `python -m bench offers --write docs/deciding.md`."""
    page = PAGE.read_text()
    assert page_with(page) == page


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.what)
def test_what_fits_is_above_the_threshold_and_what_does_not_is_below(example: Example) -> None:
    verdict = verdict_on(example)
    assert verdict.accepted == (example.what in TAKEN)
    assert verdict.priority is not None
    assert verdict.terms is not None
    earned = verdict.terms.maximum_accuracy_bonus.value and verdict.terms.h100_maximum_bonus.value
    assert (verdict.priority > THRESHOLD) == bool(earned)
    assert verdict.accepted or not earned or verdict.reason == "Job duration too long (>96 hours)"


def test_a_page_without_the_marks_is_not_written() -> None:
    with pytest.raises(ValueError, match="the page lacks"):
        page_with("# Deciding\n")
