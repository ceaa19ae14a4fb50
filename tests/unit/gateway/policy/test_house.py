"""The house policy: order of its checks, exact sentences, earned terms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from gateway.learning.rates import LearnedRates, Rate, Table
from gateway.policy.house import maximum_accuracy, priority_of
from gateway.policy.interface import PolicyView, SlotFacts
from shared.messages.hardware import Hardware
from shared.messages.offers import DecisionKind, Offer, TaskType
from shared.planning.feasibility import Feasibility, check_offer
from shared.planning.hardware import parse_hardware

H100 = parse_hardware("4xH100-80GB")
CPU = parse_hardware("cpu-8x32GB")


def offer(**fields: Any) -> Offer:
    values: dict[str, Any] = {
        "task_id": "t",
        "task_type": TaskType.INSTRUCT,
        "model": "meta-llama/Llama-3.2-1B",
        "hours_to_complete": 4.0,
        "dataset": "d",
    }
    return Offer(**(values | fields))


def free(slot: str, hardware: Hardware | None = H100) -> SlotFacts:
    return SlotFacts(slot=slot, busy=False, live=True, hardware=hardware)


def busy(slot: str) -> SlotFacts:
    return SlotFacts(slot=slot, busy=True, live=True, hardware=H100)


def down(slot: str) -> SlotFacts:
    return SlotFacts(slot=slot, busy=False, live=False)


def fits(_offer: Offer, _hours: float, _hardware: Hardware) -> Feasibility:
    return Feasibility(True, "it fits")


def does_not_fit(_offer: Offer, _hours: float, _hardware: Hardware) -> Feasibility:
    return Feasibility(False, "70 billion parameters need 9 hours")


def view(*slots: SlotFacts, **fields: Any) -> PolicyView:
    values: dict[str, Any] = {
        "slots": slots or (free("a"), free("b")),
        "tables": LearnedRates(),
        "expected": H100,
        "max_hours": 96.0,
        "deadline_margin_s": 150.0,
        "feasible": fits,
    }
    return PolicyView(**(values | fields))


def test_the_house_accepts_what_fits() -> None:
    verdict = maximum_accuracy(offer(), view())
    assert verdict.accepted
    assert verdict.reason == "Accepted for ranking #1 optimization - priority 1.000"
    assert (verdict.slot, verdict.priority) == ("a", 1.0)


@pytest.mark.parametrize(
    ("offered", "seen", "reason"),
    [
        (offer(), view(busy("a"), busy("b")), "At maximum accuracy capacity (2 jobs for #1)"),
        # capacity is looked at before the hours
        (
            offer(hours_to_complete=97.0),
            view(busy("a"), busy("b")),
            "At maximum accuracy capacity (2 jobs for #1)",
        ),
        (offer(), view(*(busy(s) for s in "abcd")), "At maximum accuracy capacity (4 jobs for #1)"),
        (offer(hours_to_complete=97.0), view(), "Job duration too long (>96 hours)"),
        (offer(hours_to_complete=96.01), view(), "Job duration too long (>96 hours)"),
        # and the hours before the priority
        (offer(hours_to_complete=97.0), view(down("a"), down("b")), "Job duration too long (>96 hours)"),
        (offer(hours_to_complete=13.0), view(max_hours=12.5), "Job duration too long (>12.5 hours)"),
        (
            offer(),
            view(feasible=does_not_fit),
            "Priority 0.635 below #1 threshold; 70 billion parameters need 9 hours",
        ),
        (
            offer(),
            view(busy("a"), down("b")),
            "Priority 0.685 below #1 threshold; "
            "no free and live slot shows 4xH100-80GB (a: busy, b: not live)",
        ),
        (
            offer(),
            view(free("a", CPU), free("b", None), feasible=does_not_fit),
            "Priority 0.285 below #1 threshold; 70 billion parameters need 9 hours; "
            "no free and live slot shows 4xH100-80GB (a: cpu, b: unknown hardware)",
        ),
    ],
)
def test_refusals_word_for_word(offered: Offer, seen: PolicyView, reason: str) -> None:
    verdict = maximum_accuracy(offered, seen)
    assert not verdict.accepted
    assert verdict.slot is None
    assert verdict.reason == reason
    assert verdict.terms is not None
    assert verdict.priority == priority_of(verdict.terms)


def test_96_hours_are_not_too_long() -> None:
    assert maximum_accuracy(offer(hours_to_complete=96.0), view()).accepted


def test_full_is_a_warning_with_the_counts() -> None:
    verdict = maximum_accuracy(offer(), view(busy("a"), busy("b")))
    assert verdict.warning == "At maximum accuracy capacity: 2/2 jobs"
    assert maximum_accuracy(offer(), view()).warning is None


@pytest.mark.parametrize(
    ("slots", "chosen"),
    [
        ((busy("a"), free("b")), "b"),
        ((down("a"), free("b")), "b"),
        ((free("a", CPU), free("b")), "b"),
        ((free("box2-a"), free("a")), "box2-a"),
    ],
)
def test_the_first_free_live_slot_with_the_right_hardware_is_taken(
    slots: tuple[SlotFacts, ...], chosen: str
) -> None:
    assert maximum_accuracy(offer(), view(*slots)).slot == chosen


def test_a_slot_that_was_heard_of_but_is_silent_now_is_not_taken() -> None:
    silent = SlotFacts(slot="a", busy=False, live=False, hardware=H100)
    verdict = maximum_accuracy(offer(), view(silent))
    assert verdict.reason.endswith("(a: not live)")


def test_a_slot_that_failed_its_self_test_is_not_taken() -> None:
    sick = SlotFacts(slot="a", busy=False, live=True, hardware=H100, faults=("memory: another process",))
    verdict = maximum_accuracy(offer(), view(sick))
    assert verdict.slot is None
    assert verdict.reason.endswith("(a: failed its self-test, memory: another process)")
    assert maximum_accuracy(offer(), view(sick, free("b"))).slot == "b"


def test_a_drained_slot_is_not_taken() -> None:
    drained = SlotFacts(slot="a", busy=False, live=True, hardware=H100, drained=True)
    verdict = maximum_accuracy(offer(), view(drained))
    assert verdict.slot is None
    assert verdict.reason.endswith("(a: drained by an operator)")
    assert maximum_accuracy(offer(), view(drained, free("b"))).slot == "b"


def test_a_slot_whose_log_is_full_is_not_taken() -> None:
    full = SlotFacts(slot="a", busy=False, live=True, hardware=H100, full="STATE-a is 96% full")
    verdict = maximum_accuracy(offer(), view(full))
    assert (verdict.slot, verdict.kind) == (None, DecisionKind.LOG_FULL)
    assert verdict.reason.endswith("(a: STATE-a is 96% full, a job's records might not be stored)")
    assert maximum_accuracy(offer(), view(full, busy("b"))).kind is DecisionKind.LOG_FULL
    assert maximum_accuracy(offer(), view(full, free("b"))).slot == "b"
    wrong = replace(full, hardware=CPU)  # it would get no job with room, either
    assert maximum_accuracy(offer(), view(wrong)).kind is DecisionKind.HARDWARE


def test_cpu_slots_earn_the_bonus_where_cpus_are_expected() -> None:
    verdict = maximum_accuracy(offer(), view(free("a", CPU), expected=parse_hardware("cpu")))
    assert verdict.accepted
    assert verdict.terms is not None
    assert verdict.terms.h100_maximum_bonus.cause == "slot a is free, live and shows cpu"


def test_the_plan_is_asked_with_the_hours_that_are_left_and_the_chosen_slot() -> None:
    asked = []

    def feasible(_: Offer, hours: float, hardware: Hardware) -> Feasibility:
        asked.append((hours, hardware.name))
        return Feasibility(True, "")

    maximum_accuracy(offer(), view(feasible=feasible))
    maximum_accuracy(offer(), view(down("a"), feasible=feasible))
    assert asked == [(pytest.approx(4 - 150 / 3600), "4xH100-80GB")] * 2


def test_an_offer_that_is_over_before_it_starts_is_refused_with_why() -> None:
    verdict = maximum_accuracy(offer(hours_to_complete=150 / 3600), view())
    assert verdict.reason == (
        "Priority 0.635 below #1 threshold; "
        "0.0416667 hours leave no time: 150 s are kept as a margin before the deadline"
    )


def test_image_tasks_are_refused_by_the_real_planner() -> None:
    def feasible(offered: Offer, hours: float, hardware: Hardware) -> Feasibility:
        return check_offer(offered.model, offered.model_params_count, offered.task_type, hours, hardware)

    verdict = maximum_accuracy(offer(task_type=TaskType.IMAGE), view(feasible=feasible))
    assert verdict.reason.startswith(
        "Priority 0.635 below #1 threshold; task type ImageTask is not supported"
    )
    assert maximum_accuracy(offer(), view(feasible=feasible)).accepted


def test_learned_rates_alone_never_replace_an_earned_bonus() -> None:
    best = Table(1.0)
    tables = LearnedRates(task_weight=best, model_performance=best, task_success=best)
    verdict = maximum_accuracy(offer(), view(down("a"), tables=tables))
    assert not verdict.accepted
    assert verdict.priority == pytest.approx(0.85)


def test_bad_rates_sink_an_offer_that_fits() -> None:
    tables = LearnedRates(
        model_performance=Table(0.75, {"llama": Rate(0.1, "lost 9 of 10")}),
        task_success=Table(0.9, {"InstructTextTask": Rate(0.1, "9 of 10 failed")}),
    )
    verdict = maximum_accuracy(offer(), view(tables=tables))
    assert verdict.reason == "Priority 0.818 below #1 threshold"
    assert verdict.terms is not None
    assert verdict.terms.model_performance.cause == "lost 9 of 10"


slot_facts = st.builds(
    SlotFacts,
    slot=st.sampled_from("abcd"),
    busy=st.booleans(),
    live=st.booleans(),
    hardware=st.sampled_from([None, CPU, H100]),
)
tables = st.builds(
    lambda a, b, c: LearnedRates(task_weight=Table(a), model_performance=Table(b), task_success=Table(c)),
    *[st.floats(0, 1)] * 3,
)


@given(
    slots=st.lists(slot_facts, min_size=1, max_size=4, unique_by=lambda facts: facts.slot),
    hours=st.floats(0.01, 200),
    learned=tables,
    feasible=st.sampled_from([fits, does_not_fit]),
)
def test_whatever_is_seen_an_accepted_offer_has_earned_both_bonuses(
    slots: list[SlotFacts], hours: float, learned: LearnedRates, feasible: Any
) -> None:
    verdict = maximum_accuracy(
        offer(hours_to_complete=hours), view(*slots, tables=learned, feasible=feasible)
    )
    if verdict.terms is not None:
        assert verdict.priority == priority_of(verdict.terms)
        assert 0 <= verdict.priority <= 1
    if verdict.accepted:
        assert verdict.terms is not None
        assert verdict.terms.maximum_accuracy_bonus.value == verdict.terms.h100_maximum_bonus.value == 1.0
        taken = next(facts for facts in slots if facts.slot == verdict.slot)
        assert taken.live
        assert not taken.busy
        assert taken.hardware == H100
        assert hours <= 96
