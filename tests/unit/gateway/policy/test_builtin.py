"""Policies by name: what the further ones take, and what becomes of somebody else's that goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.learning.rates import LearnedRates, Rate, Table
from gateway.policy.builtin import BUILT_IN, expected_value, first_come, task_work, win_chance
from gateway.policy.house import maximum_accuracy
from gateway.policy.interface import PolicyView, SlotFacts
from gateway.policy.loader import load_policy
from shared.errors import SettingsError
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.offers import BareOffer, Decision, TaskType
from shared.planning.feasibility import Feasibility, check_offer
from shared.planning.hardware import parse_hardware

H100 = parse_hardware("4xH100-80GB")
CPU = parse_hardware("cpu-8x32GB")
BAD = LearnedRates(
    task_weight=Table(0.25, {"InstructTextTask": Rate(0.02, "lost")}),
    task_success=Table(0.9, {"InstructTextTask": Rate(0.3, "failed")}),
)


def offer(**fields: Any) -> BareOffer:
    values: dict[str, Any] = {
        "task_id": "t",
        "task_type": TaskType.INSTRUCT,
        "model": "meta-llama/Llama-3.2-1B",
        "hours_to_complete": 4.0,
    }
    return BareOffer(**(values | fields))


def feasible(offered: BareOffer, hours: float, hardware: Hardware) -> Feasibility:
    return check_offer(offered.model, offered.model_params_count, offered.task_type, hours, hardware)


def view(*slots: SlotFacts, **fields: Any) -> PolicyView:
    values: dict[str, Any] = {
        "slots": slots or (SlotFacts(slot="a", busy=False, live=True, hardware=H100),),
        "tables": LearnedRates(),
        "expected": H100,
        "max_hours": 96.0,
        "deadline_margin_s": 150.0,
        "feasible": feasible,
    }
    return PolicyView(**(values | fields))


FULL = view(SlotFacts(slot="a", busy=True, live=True, hardware=H100))
LOG_FULL = view(SlotFacts(slot="a", busy=False, live=True, hardware=H100, full="96% full"))
DOWN = view(SlotFacts(slot="a", busy=False, live=False))


@pytest.mark.parametrize(
    ("offered", "seen", "reason"),
    [
        (offer(), FULL, "All 1 slots are busy"),
        (offer(hours_to_complete=97.0), FULL, "All 1 slots are busy"),
        (offer(hours_to_complete=97.0), view(), "Job duration too long (>96 hours)"),
        (offer(hours_to_complete=97.0), DOWN, "Job duration too long (>96 hours)"),
        (offer(), DOWN, "No slot: no free and live slot shows 4xH100-80GB (a: not live)"),
        (
            offer(),
            LOG_FULL,
            "No slot: no free and live slot shows 4xH100-80GB "
            "(a: 96% full, a job's records might not be stored)",
        ),
        (
            offer(task_type=TaskType.IMAGE),
            view(),
            "No plan: task type ImageTask is not supported by the engine",
        ),
    ],
)
@pytest.mark.parametrize("policy", [first_come, expected_value])
def test_what_neither_takes(policy: Any, offered: BareOffer, seen: PolicyView, reason: str) -> None:
    verdict = policy(offered, seen)
    assert (verdict.accepted, verdict.reason, verdict.policy) == (False, reason, policy.__name__)
    assert verdict.terms is not None


def test_first_come_takes_what_fits_whatever_was_learned() -> None:
    verdict = first_come(offer(), view(tables=BAD))
    assert verdict.slot == "a"
    assert verdict.reason.startswith("Accepted: fits 4xH100-80GB and leaves about")


def test_expected_value_takes_what_gains_and_says_how_much() -> None:
    verdict = expected_value(offer(), view())
    assert verdict.slot == "a"
    assert verdict.reason == "Accepted: 2.60 points expected = 4.0 x (3 x 0.250 - 0.100), 0.65 per hour"
    assert verdict.priority == pytest.approx(0.65)


def test_expected_value_refuses_what_loses_or_gains_too_little() -> None:
    lost = expected_value(offer(), view(tables=BAD))
    assert lost.slot is None
    assert lost.reason == (
        "Too little to win: -2.56 points expected = 4.0 x (3 x 0.020 - 0.700), -0.64 per hour, not above 0"
    )
    assert maximum_accuracy(offer(), view(tables=BAD)).accepted  # which the house policy still takes
    assert expected_value(offer(), view(min_points_per_hour=0.64)).accepted
    assert not expected_value(offer(), view(min_points_per_hour=0.66)).accepted


def test_a_family_that_does_well_raises_the_chance_but_not_above_delivery() -> None:
    tables = LearnedRates(
        task_weight=Table(0.25, {"DpoTask": Rate(0.9, "won")}),
        model_performance=Table(0.75, {"llama": Rate(0.9, "well"), "qwen": Rate(0.15, "badly")}),
    )
    assert win_chance(offer(), tables, "llama") == pytest.approx(0.30)
    assert win_chance(offer(), tables, "qwen") == pytest.approx(0.05)
    assert win_chance(offer(task_type=TaskType.DPO), tables, "llama") == 0.90


@pytest.mark.parametrize(
    ("hours", "parameters", "work"),
    [
        (1, 500_000_000, 2.0),  # upstream's own figures
        (4, 1_200_000_000, 4.0),
        (7, 8_000_000_000, 14.967),
        (10, 70_000_000_000, 40.0),
        (0.01, 1, 1.0),
    ],
)
def test_the_weight_of_a_task_is_upstreams(hours: float, parameters: int, work: float) -> None:
    assert task_work(offer(hours_to_complete=hours, model_params_count=parameters)) == pytest.approx(
        work, abs=1e-3
    )


def test_a_size_may_come_from_the_name_or_be_assumed() -> None:
    assert task_work(offer(model="org/x-4b", hours_to_complete=4)) == 8.0
    assert task_work(offer(model="org/x", hours_to_complete=7)) == 14.0


slots = st.lists(
    st.builds(
        SlotFacts,
        slot=st.sampled_from("abcd"),
        busy=st.booleans(),
        live=st.booleans(),
        hardware=st.sampled_from([None, CPU, H100]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda facts: facts.slot,
)


@given(
    slots=slots,
    hours=st.floats(5e-324, 1.7e308),
    parameters=st.one_of(st.none(), st.integers(1, 10**15)),
    task_type=st.sampled_from(list(TaskType)),
    floor=st.floats(-10, 10),
    name=st.sampled_from(sorted(BUILT_IN)),
)
def test_every_policy_gives_only_free_live_slots_and_a_decision_that_can_be_sent(
    slots: list[SlotFacts], hours: float, parameters: int | None, task_type: TaskType, floor: float, name: str
) -> None:
    offered = offer(hours_to_complete=hours, model_params_count=parameters, task_type=task_type)
    verdict = BUILT_IN[name](offered, view(*slots, min_points_per_hour=floor))
    assert verdict.policy == name
    if verdict.slot is not None:
        taken = next(facts for facts in slots if facts.slot == verdict.slot)
        assert taken.live
        assert not taken.busy
        assert hours <= 96
    sent = Decision(task_id="t", task="t", accepted=verdict.accepted, reason="", priority=verdict.priority)
    assert msgspec.json.decode(encode(sent), type=Decision).priority == verdict.priority


MODULE = """
from gateway.policy.interface import Verdict

def picky(offer, view):
    return Verdict(reason="because", slot="a", priority=0.5)

def busy_slot(offer, view):
    return Verdict(reason="because", slot="b")

def broken(offer, view):
    return 1 / 0

def silent(offer, view):
    return None

def endless(offer, view):
    return Verdict(reason="", slot="a", priority=float("inf"))

def alone(offer):
    return None

async def later(offer, view):
    return None

number = 7
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_policies.py").write_text(MODULE)
    (tmp_path / "does_not_load.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_policies"
    sys.modules.pop("my_policies", None)


def test_a_policy_of_ones_own(module: str) -> None:
    verdict = load_policy(f"{module}:picky")(offer(), view())
    assert (verdict.slot, verdict.reason, verdict.policy) == ("a", "because", "my_policies:picky")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("busy_slot", "it chose slot 'b', which is not free"),
        ("broken", "ZeroDivisionError: division by zero"),
        ("silent", "it returned a NoneType, not a Verdict"),
        ("endless", "its priority is inf"),
    ],
)
def test_what_it_does_wrong_refuses_the_offer(module: str, function: str, why: str) -> None:
    busy = SlotFacts(slot="b", busy=True, live=True, hardware=H100)
    free = SlotFacts(slot="a", busy=False, live=True, hardware=H100)
    drained = SlotFacts(slot="b", busy=False, live=True, hardware=H100, drained=True)
    full = SlotFacts(slot="b", busy=False, live=True, hardware=H100, full="STATE-b is 96% full")
    for other in (busy, drained, full):
        verdict = load_policy(f"{module}:{function}")(offer(), view(free, other))
        assert (verdict.slot, verdict.reason) == (None, f"Policy my_policies:{function} failed: {why}")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "maximal",
            "unknown policy 'maximal': it is maximum_accuracy, expected_value, first_come, or module",
        ),
        ("my_policies:", "unknown policy"),
        (":picky", "unknown policy"),
        ("my_policies:nothing", "can't be imported: AttributeError"),
        ("no_such_module:x", "can't be imported: ModuleNotFoundError"),
        ("does_not_load:x", "can't be imported: RuntimeError: no licence"),
        ("my_policies:number", "must be a plain function"),
        ("my_policies:later", "must be a plain function"),
        ("my_policies:alone", "must take two arguments"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(module: str, name: str, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        load_policy(name)
