"""From the ledger's results to tables: in any order of reading, and rebuilt only when needed."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.learning.evidence import Evidence
from gateway.learning.learner import Learner
from gateway.policy.model_family import model_family
from gateway.state.ledger import Ledger
from shared import subjects
from shared.broker.bus import Record
from shared.clock import DAY_S
from shared.messages.encoding import encode
from shared.messages.jobs import Job, Result, ResultStatus, Score
from shared.messages.offers import Decision, Offer, TaskType
from shared.messages.runs import ErrorCode

NOW = 1_800_000_000.0
JOBS = subjects.JOBS_STREAM


class World:
    """A ledger, a learner on it, and a clock."""

    def __init__(self) -> None:
        self.now = NOW
        self.ledger = Ledger()
        evidence = Evidence(prior_strength=10.0, half_life_s=30 * DAY_S, family=model_family)
        self.learner = Learner(self.ledger, evidence, lambda: self.now)
        self.sequence = 0

    def apply(self, stream: str, subject: str, message: Any) -> None:
        self.sequence += 1
        self.ledger.apply(stream, Record(self.sequence, subject, encode(message)))

    def job(self, task: str, slot: str = "a") -> None:
        offer = Offer(
            task_id=task, task_type=TaskType.CHAT, model="org/llama", hours_to_complete=1, dataset="d"
        )
        decision = Decision(task_id=task, task=task, accepted=True, reason="", slot=slot)
        values: dict[str, Any] = {
            "record_id": "j",
            "task_id": task,
            "task": task,
            "slot": slot,
            "gateway": "g",
        }
        job = Job(**values, offer=offer, decision=decision, received_at=NOW, deadline_at=NOW)
        self.apply(JOBS, subjects.job(slot, task), job)

    def result(
        self,
        task: str,
        slot: str = "a",
        at: float = NOW,
        status: str = "failed",
        code: ErrorCode | None = None,
    ) -> None:
        values: dict[str, Any] = {"record_id": "r", "task_id": task, "task": task, "slot": slot, "at": at}
        values["code"] = code
        self.apply(
            subjects.state_stream(slot),
            subjects.state(slot, task),
            Result(**values, status=ResultStatus(status)),
        )

    def success(self) -> float:
        return self.learner.tables().task_success.rate("ChatTask").value


@pytest.fixture
def world() -> World:
    return World()


def test_a_result_changes_the_rate_of_its_type(world: World) -> None:
    assert world.success() == 0.90
    world.job("one")
    assert world.success() == 0.90
    world.result("one")
    assert world.success() == pytest.approx(9 / 11)
    world.job("two", "b")
    world.result("two", "b", status="submitted")
    world.job("three")
    world.result("three", status="cancelled")
    assert world.success() == pytest.approx(10 / 12)
    world.job("four")
    world.result("four", code=ErrorCode.BAD_DATA)
    assert world.success() == pytest.approx(10 / 12)
    world.job("five")
    world.result("five", code=ErrorCode.MODEL_UNAVAILABLE)
    assert world.success() == pytest.approx(10 / 13)
    world.job("six")
    world.result("six", code=ErrorCode.DATA_UNAVAILABLE)
    assert world.success() == pytest.approx(10 / 14)


def test_a_result_that_is_read_before_its_job_waits_for_it(world: World) -> None:
    world.result("one")
    assert world.success() == 0.90
    world.job("one")
    assert world.success() == pytest.approx(9 / 11)
    world.learner.apply_results()
    assert world.learner.evidence.results == 1


def test_a_result_on_another_slot_than_the_job_is_none_of_the_task(world: World) -> None:
    world.job("one", "a")
    world.result("one", "b")
    assert world.success() == 0.90


def test_a_clock_that_is_ahead_does_not_age_the_rest(world: World) -> None:
    for task in ("one", "two", "three"):
        world.job(task)
        world.result(task)
    before = world.success()
    world.job("ahead")
    world.result("ahead", at=NOW + 1e9)
    assert world.success() == pytest.approx(9 / 14)
    assert world.success() < before


def test_tables_are_made_anew_for_new_evidence_and_once_a_minute(world: World) -> None:
    world.job("one")
    world.result("one")
    first = world.learner.tables()
    world.now += 59
    assert world.learner.tables() is first
    world.now += 2
    second = world.learner.tables()
    assert second is not first
    world.learner.note_score(
        Score(
            record_id="s",
            task_id="one",
            task="one",
            task_type=TaskType.CHAT,
            model="org/llama",
            quality_score=3.0,
            scored_at=NOW,
        )
    )
    assert world.learner.tables().task_weight.rate("ChatTask").value == pytest.approx(3.5 / 11, abs=1e-5)
    world.now -= 1000  # the clock was set back
    assert world.learner.tables() is not second
