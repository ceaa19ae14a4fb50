"""The gateway's own file of decisions."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from gateway.telemetry import decision_log
from gateway.telemetry.decision_log import DecisionLog
from shared.messages import BareOffer, Decision, Offer, TaskType


def decision(task: str) -> Decision:
    return Decision(task_id=task, task=task, accepted=False, reason="no")


OFFER = Offer(
    task_id="t",
    task_type=TaskType.DPO,
    model="org/m",
    hours_to_complete=2.5,
    dataset="https://h/secret?sign=1",
)


async def test_decisions_are_appended_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decisions.jsonl"
    for tasks in (("one", "two"), (), ("three",)):
        log = DecisionLog(path)
        for task in tasks:
            log.add(decision(task), OFFER)
        await log.flush()
    assert [json.loads(line)["task"] for line in path.read_text().splitlines()] == ["one", "two", "three"]


async def test_a_line_says_what_was_offered_but_not_the_data(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path)
    log.add(decision("one"), OFFER)
    await log.flush()
    (line,) = path.read_text().splitlines()
    assert "secret" not in line
    written = msgspec.json.decode(line, type=Decision)
    assert written.offer == BareOffer(
        task_id="t", task_type=TaskType.DPO, model="org/m", hours_to_complete=2.5
    )
    assert msgspec.structs.replace(written, offer=None) == decision("one")


async def test_a_file_that_can_not_be_written_is_counted_not_raised(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)  # a folder
    log.add(decision("one"), OFFER)
    await log.flush()
    assert log.lost == 1


async def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "MOST_WAITING", 2)
    log = DecisionLog(tmp_path / "decisions.jsonl")
    for number in range(5):
        log.add(decision(str(number)), OFFER)
    assert len(await log.flush()) == 2
    assert log.lost == 3
