"""What needs an operator: each trouble is an alert that says what to do, and no trouble is none."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from gateway.state.ledger import Ledger
from gateway.state.presence import Presence
from gateway.views.alerts import AlertLevel, alerts_of
from gateway.views.schemas import GatewayInfo, MirrorInfo
from shared import subjects
from shared.broker.bus import Record
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.jobs import Claimed, Job, Result, ResultStatus, SlotDrain
from shared.messages.offers import Decision, Offer, TaskType
from shared.messages.slots import Heartbeat
from shared.settings import Settings

NOW = 100_000.0
CPU = Hardware(device="cpu", count=2, memory_bytes=8 << 30)
GOOD = GatewayInfo(
    gateway="g",
    version="1",
    now=NOW,
    not_ready=None,
    settings={},
    folded={},
    malformed_records=0,
    malformed_messages=0,
    lost_decisions=0,
    denied=[],
    mirror=MirrorInfo("/m", {}, False),
)


class House:
    """One slot with a live node, and a job in the logs."""

    def __init__(
        self,
        *,
        alive: bool = True,
        faults: tuple[str, ...] = (),
        warnings: tuple[str, ...] = (),
        expected: str = "cpu",
    ) -> None:
        self.settings = Settings(slots=("a",), expected_hardware=expected)
        self.ledger = Ledger()
        self.presence = Presence(5.0)
        self.stored = 0
        if alive:
            beat = Heartbeat(slot="a", node="n", epoch=1, hardware=CPU)
            found = {"faults": list(faults), "warnings": list(warnings)}
            self.presence.note_heartbeat(replace(beat, **found))

    def store(self, stream: str, subject: str, message: Any) -> None:
        self.stored += 1
        self.ledger.apply(stream, Record(sequence=self.stored, subject=subject, data=encode(message)))

    def job(self, received_at: float = NOW - 10, due_in_s: float = 3600.0) -> None:
        offer = Offer(task_id="t", task_type=TaskType.CHAT, model="m", hours_to_complete=1.0, dataset="d")
        job = Job(
            record_id="j",
            task_id="t",
            task="t",
            slot="a",
            gateway="g",
            offer=offer,
            decision=Decision(task_id="t", task="t", accepted=True, reason="yes", slot="a"),
            received_at=received_at,
            deadline_at=NOW + due_in_s,
        )
        self.store(subjects.JOBS_STREAM, subjects.job("a", "t"), job)

    def chain(self, message: Any) -> None:
        self.store(subjects.state_stream("a"), subjects.state("a", "t"), message)

    def alerts(self, info: GatewayInfo = GOOD) -> list[str]:
        found = alerts_of(info, self.ledger, self.presence, self.settings, NOW)
        assert all(alert.do for alert in found)
        order = [alert.level for alert in found]
        assert order == sorted(order, key=lambda level: level is not AlertLevel.ERROR)
        return [f"{alert.level}: {alert.what}" for alert in found]


def ended(status: ResultStatus, **fields: Any) -> Result:
    return Result(record_id="r", task="t", task_id="t", slot="a", status=status, at=NOW - 60, **fields)


CLAIMED = Claimed(record_id="c", task="t", slot="a", node="n", epoch=1, attempt=1)


def test_a_full_log_is_an_alert() -> None:
    house = House()
    full = replace(GOOD, full_log="JOBS is 96% full (983 of 1024 MiB)")
    assert house.alerts(full) == ["error: no offer is accepted: JOBS is 96% full (983 of 1024 MiB)"]
    full = replace(GOOD, full_slots={"a": "STATE-a is 96% full (983 of 1024 MiB)"})
    assert house.alerts(full) == [
        "error: no offer is accepted for slot a: STATE-a is 96% full (983 of 1024 MiB)"
    ]


def test_no_trouble_is_no_alert() -> None:
    house = House()
    house.job()
    house.chain(CLAIMED)
    assert house.alerts() == []
    house.chain(ended(ResultStatus.SUBMITTED, deadline_margin_s=20.0))
    assert house.alerts() == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"not_ready": "not connected"}, "error: no offer is decided: not connected"),
        ({"denied": ["publish is denied"]}, "error: publish is denied"),
        ({"mirror": MirrorInfo("/m", {}, True, "disk full")}, "error: the mirror of the logs is not written"),
        ({"lost_decisions": 3}, "warning: 3 decisions are not in"),
        ({"malformed_records": 2}, "warning: 2 records of the logs"),
    ],
)
def test_troubles_of_the_gateway(change: dict[str, Any], expected: str) -> None:
    (found,) = House().alerts(replace(GOOD, **change))
    assert found.startswith(expected)


def test_a_slot_with_other_hardware_is_no_silent_cpu() -> None:
    expected = "error: slot a shows cpu instead of 4xH100-80GB: no offer is accepted for it"
    assert House(expected="4xH100-80GB").alerts() == [expected]


def test_a_drained_slot_is_not_forgotten() -> None:
    house = House()
    drain = SlotDrain(record_id="d", slot="a", drained=True, reason="new disk", at=NOW - 7200)
    house.store(subjects.JOBS_STREAM, subjects.drain("a"), drain)
    assert house.alerts() == ["warning: slot a has been drained for 2.0 h: it gets no new job (new disk)"]
    house.store(subjects.JOBS_STREAM, subjects.drain("a"), replace(drain, drained=False))
    assert house.alerts() == []


def test_a_slot_without_node_or_with_a_fault() -> None:
    silent = House(alive=False)
    assert silent.alerts() == ["error: slot a has no live node"]
    silent.job()
    assert silent.alerts() == ["error: slot a has no live node; it holds t"]
    assert House(faults=("GPU 3 is slow",)).alerts() == ["error: slot a: GPU 3 is slow"]


def test_a_slot_that_works_worse_than_it_should() -> None:
    house = House(warnings=("kernels: training is slower",))
    assert house.alerts() == ["warning: slot a: kernels: training is slower"]
    house.job()
    assert house.alerts()[0] == "warning: slot a: kernels: training is slower"


@pytest.mark.parametrize(
    ("trouble", "what"),
    [
        ({"alive": False}, "slot a has no live node"),
        ({"faults": ("GPU 3 is slow",)}, "slot a: GPU 3 is slow"),
        ({"expected": "4xH100-80GB"}, "slot a shows cpu instead of 4xH100-80GB: no offer is accepted for it"),
    ],
)
def test_a_drained_slot_without_a_job_may_be_repaired(trouble: dict[str, Any], what: str) -> None:
    house = House(**trouble)
    drain = SlotDrain(record_id="d", slot="a", drained=True, reason="new disk", at=NOW - 7200)
    drained = "warning: slot a has been drained for 2.0 h: it gets no new job (new disk)"
    house.store(subjects.JOBS_STREAM, subjects.drain("a"), drain)
    assert house.alerts() == [f"warning: {what}", drained]
    house.job()
    troubles, _ = house.alerts()
    assert troubles.startswith(f"error: {what}"), "its job is lost"


@pytest.mark.parametrize(
    ("received_at", "due_in_s", "claimed", "expected"),
    [
        (NOW - 100, 3600.0, False, "warning: t has waited for its node for 100 s"),
        (NOW - 100, 30.0, True, "error: t is due in 30 s and not submitted (running)"),
        (NOW - 100, -5.0, True, "error: t is 5 s late and not submitted (running)"),
    ],
)
def test_a_job_that_may_miss_its_deadline(
    received_at: float, due_in_s: float, claimed: bool, expected: str
) -> None:
    house = House()
    house.job(received_at, due_in_s)
    if claimed:
        house.chain(CLAIMED)
    assert house.alerts() == [expected]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (ended(ResultStatus.FAILED, reason="no memory"), "warning: t failed: no memory"),
        (ended(ResultStatus.EXPIRED, reason="no node"), "warning: t expired: no node"),
        (
            ended(ResultStatus.SUBMITTED, deadline_margin_s=-9.0),
            "warning: t was submitted 9 s after its deadline",
        ),
    ],
)
def test_a_bad_end_is_shown_for_a_day(result: Result, expected: str) -> None:
    house = House()
    house.job()
    house.chain(result)
    assert house.alerts() == [expected]
    old = House()
    old.job()
    old.chain(replace(result, at=NOW - 90_000))
    assert old.alerts() == []


def test_a_task_whose_states_are_damaged_is_an_error() -> None:
    house = House()
    house.job(due_in_s=-5.0)
    house.chain(CLAIMED)
    house.chain(Decision(task_id="t", task="t", accepted=True, reason="no state"))
    (found,) = house.alerts()
    assert found.startswith("error: t is stuck: the newest record of its states can't be read (")
