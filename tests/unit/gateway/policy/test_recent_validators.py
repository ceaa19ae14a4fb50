"""Who has asked lately, besides one validator."""

from __future__ import annotations

from gateway.policy.recent_validators import MOST_KEPT, RecentValidators


def test_another_validator_counts_until_the_window_is_over() -> None:
    now = [0.0]
    validators = RecentValidators(10.0, clock=lambda: now[0])
    validators.note("a")
    assert not validators.has_other_than("a")
    assert validators.has_other_than("b")
    validators.note("b")
    assert validators.has_other_than("a")
    now[0] = 10.0
    assert not validators.has_other_than("a")


def test_operators_have_no_name_and_are_not_counted() -> None:
    validators = RecentValidators(10.0)
    validators.note("")
    assert not validators.has_other_than("a")


def test_the_oldest_name_is_dropped_when_there_are_too_many() -> None:
    validators = RecentValidators(1e9)
    for number in range(MOST_KEPT + 5):
        validators.note(f"v{number}")
    validators.note("v5")
    assert len(validators._seen) == MOST_KEPT
    assert "v4" not in validators._seen
    assert list(validators._seen)[-1] == "v5"
