"""The house policy refuses what is not delivered here, and only that, until the evidence has faded."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from bench.conformance.histories import (
    ALL_FAILED,
    CHAT,
    GEMMA,
    HISTORIES,
    INSTRUCT,
    LLAMA,
    PHI,
    History,
    days_until_accepted,
    offer_of,
    verdict_after,
    view_after,
)
from gateway.policy.builtin import BUILT_IN
from gateway.policy.house import BREAK_EVEN, maximum_accuracy
from gateway.policy.interface import SlotFacts
from shared.messages.offers import DecisionKind
from shared.planning.feasibility import Feasibility


def test_a_hundred_failures_of_a_hundred_are_refused_with_the_counts() -> None:
    verdict = verdict_after(ALL_FAILED)
    assert not verdict.accepted
    assert verdict.kind is DecisionKind.PRIORITY
    assert verdict.reason == (
        "Priority 0.162 below #1 threshold; 0.0 of 100.0 of ChatTask with gemma delivered (with other "
        "families 0.0 of 0.0, in other types 0.0 of 0.0; prior 0.900 of 10 trials): 0.082 +- 0.026 is "
        "below the break-even of 0.77"
    )
    assert verdict.terms is not None
    assert verdict.terms.maximum_accuracy_bonus.value == verdict.terms.h100_maximum_bonus.value == 0.0


def test_they_come_back_when_the_evidence_has_faded() -> None:
    days = days_until_accepted(ALL_FAILED)
    assert days is not None
    assert 30 < days < 200
    assert not verdict_after(ALL_FAILED, days - 1).accepted
    assert all(verdict_after(ALL_FAILED, days + more).accepted for more in (0, 1, 100, 1000))


@pytest.mark.parametrize(
    ("history", "accepted"),
    [
        (History(runs=()), True),
        (History(runs=((CHAT, GEMMA, 0, 2),)), True),  # bad luck
        (History(runs=((CHAT, GEMMA, 0, 6),)), False),
        (History(runs=((CHAT, GEMMA, 0, 100),), model=LLAMA), True),  # one bad pair
        (History(runs=((CHAT, GEMMA, 0, 100),), task_type=INSTRUCT), True),
        (History(runs=((CHAT, GEMMA, 0, 9), (CHAT, LLAMA, 0, 9)), model=PHI), False),  # a bad type
        (History(runs=((CHAT, GEMMA, 0, 9), (INSTRUCT, GEMMA, 0, 9))), False),  # a bad family
        (History(runs=((CHAT, GEMMA, 95, 5),)), True),
        (History(runs=((CHAT, GEMMA, 60, 40),)), False),
    ],
)
def test_what_each_history_leads_to(history: History, accepted: bool) -> None:
    assert verdict_after(history).accepted is accepted


@pytest.mark.parametrize("history", HISTORIES)
def test_every_history_is_forgiven(history: History) -> None:
    assert days_until_accepted(history) is not None


def test_a_missed_bonus_keeps_its_own_cause() -> None:
    view = replace(
        view_after(ALL_FAILED),
        slots=(SlotFacts(slot="a", busy=False, live=False),),
        feasible=lambda *_: Feasibility(False, "it does not fit"),
    )
    verdict = maximum_accuracy(offer_of(ALL_FAILED), view)
    assert verdict.kind is DecisionKind.PLAN
    assert verdict.reason == (
        "Priority 0.162 below #1 threshold; it does not fit; "
        "no free and live slot shows 4xH100-80GB (a: not live)"
    )


def test_other_policies_do_not_use_the_evidence_of_pairs() -> None:
    assert BUILT_IN["first_come"](offer_of(ALL_FAILED), view_after(ALL_FAILED)).accepted


def test_the_break_even_is_what_upstreams_score_gives_at_house_rates() -> None:
    won, failed = 0.25, 0.10  # of the jobs: the house values of task_weight and task_success

    def points(won: float, failed: float) -> float:
        return (3 * won - failed) ** 2 / (won + failed)

    step = 1e-6
    win = (points(won + step, failed) - points(won, failed)) / step
    failure = (points(won, failed) - points(won, failed + step)) / step
    cost = failure / win
    assert cost / (cost + won / (1 - failed)) == pytest.approx(BREAK_EVEN, abs=0.005)
