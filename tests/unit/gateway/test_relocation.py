"""How long a job may stay unclaimed."""

from __future__ import annotations

from gateway.relocation import Waiting
from shared.messages.jobs import Job
from shared.messages.offers import Decision, Offer, TaskType


def job(record_id: str) -> Job:
    return Job(
        record_id=record_id,
        task_id="t",
        task="t",
        slot="a",
        gateway="g",
        offer=Offer(task_id="t", task_type=TaskType.CHAT, model="m", hours_to_complete=1, dataset="d"),
        decision=Decision(task_id="t", task="t", accepted=True, reason="", slot="a"),
        received_at=0.0,
        deadline_at=3600.0,
    )


def test_a_job_waits_from_when_it_was_first_seen() -> None:
    now = [100.0]
    waiting = Waiting(60.0, clock=lambda: now[0])
    one, other = job("1"), job("2")
    assert waiting.too_long([one]) == []
    now[0] = 130.0
    assert waiting.too_long([one, other]) == []
    now[0] = 160.0
    assert waiting.too_long([one, other]) == [one]
    now[0] = 190.0
    assert waiting.too_long([one, other]) == [one, other]


def test_a_job_that_was_claimed_meanwhile_or_an_outage_starts_the_count_again() -> None:
    now = [0.0]
    waiting = Waiting(60.0, clock=lambda: now[0])
    waiting.too_long([job("1")])
    now[0] = 50.0
    waiting.too_long([])
    now[0] = 70.0
    assert waiting.too_long([job("1")]) == []
    waiting.start_over()
    now[0] = 140.0
    assert waiting.too_long([job("1")]) == []
