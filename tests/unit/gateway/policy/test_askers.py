"""Who has asked lately, besides one validator."""

from __future__ import annotations

from gateway.policy.askers import MOST_KEPT, Askers


def test_another_validator_counts_until_the_window_is_over() -> None:
    now = [0.0]
    askers = Askers(10.0, clock=lambda: now[0])
    askers.note("a")
    assert not askers.others_than("a")
    assert askers.others_than("b")
    askers.note("b")
    assert askers.others_than("a")
    now[0] = 10.0
    assert not askers.others_than("a")


def test_operators_have_no_name_and_are_not_counted() -> None:
    askers = Askers(10.0)
    askers.note("")
    assert not askers.others_than("a")


def test_the_oldest_name_is_dropped_when_there_are_too_many() -> None:
    askers = Askers(1e9)
    for number in range(MOST_KEPT + 5):
        askers.note(f"v{number}")
    askers.note("v5")
    assert len(askers._seen) == MOST_KEPT
    assert "v4" not in askers._seen
    assert list(askers._seen)[-1] == "v5"
