"""A job that was moved, and what fences it, in the ledger."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.state.ledger import Ledger, TaskState
from shared.messages.jobs import Job, Moved
from tests.log_records import (
    JOBS,
    NOW,
    STATE_A,
    claimed,
    job,
    ledger_of,
    records,
    state_of,
)


def moved_job(task: str, slot: str, source: str) -> Job:
    return msgspec.structs.replace(job(task, slot), moved_from=source, moved_at=NOW + 60)


FENCE = Moved(record_id="m", task="t", slot="a", gateway="g")


@pytest.mark.parametrize("order", [(JOBS, STATE_A), (STATE_A, JOBS)])
def test_a_moved_job_holds_its_new_slot_only(order: tuple[str, str]) -> None:
    ledger = Ledger()
    stored: dict[str, list[Any]] = {JOBS: [job("t", "a"), moved_job("t", "b", "a")], STATE_A: [FENCE]}
    for stream in order:
        for record in records(stored[stream]):
            ledger.apply(stream, record)
    assert ledger.holder("a", NOW) is None
    assert ledger.holder("b", NOW) is ledger.task("t")
    assert state_of(ledger, "t") is TaskState.QUEUED
    assert ledger.unclaimed() == []  # it moves once
    assert [each.slot for each in ledger.open_jobs()] == ["b"]
    assert ledger.malformed == 0
    task = ledger.task("t")
    assert task is not None
    assert task.job_sequence == 2


def test_a_fenced_job_keeps_its_slot_until_it_is_stored_for_another() -> None:
    ledger = ledger_of([job("t", "a")], [FENCE])
    assert ledger.holder("a", NOW) is ledger.task("t")
    assert [each.slot for each in ledger.unclaimed()] == ["a"]
    assert ledger.chain_of(job("t", "a")).moved == FENCE


@pytest.mark.parametrize(
    "second",
    [
        job("t", "b"),
        moved_job("t", "b", "c"),  # from a slot where it is not
        moved_job("t", "a", "a"),
    ],
)
def test_a_second_job_that_is_no_move_is_skipped(second: Job) -> None:
    ledger = ledger_of([job("t", "a"), second])
    assert ledger.malformed == 1
    assert ledger.holder("b", NOW) is None


def test_a_job_moves_once() -> None:
    ledger = ledger_of([job("t", "a"), moved_job("t", "b", "a"), moved_job("t", "c", "b")])
    assert (ledger.malformed, ledger.holder("c", NOW)) == (1, None)


def test_a_claimed_job_does_not_move() -> None:
    assert ledger_of([job("t", "a")], [claimed("t", "a")]).unclaimed() == []
