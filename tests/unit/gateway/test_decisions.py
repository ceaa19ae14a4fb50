"""The gateway's own file of decisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway import decisions
from gateway.decisions import DecisionLog
from shared.messages import Decision


def decision(task: str) -> Decision:
    return Decision(task_id=task, task=task, accepted=False, reason="no")


async def test_decisions_are_appended_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decisions.jsonl"
    for tasks in (("one", "two"), (), ("three",)):
        log = DecisionLog(path)
        for task in tasks:
            log.add(decision(task))
        await log.flush()
    assert [json.loads(line)["task"] for line in path.read_text().splitlines()] == ["one", "two", "three"]


async def test_a_file_that_can_not_be_written_is_counted_not_raised(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)  # a folder
    log.add(decision("one"))
    await log.flush()
    assert log.lost == 1


async def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "MOST_WAITING", 2)
    log = DecisionLog(tmp_path / "decisions.jsonl")
    for number in range(5):
        log.add(decision(str(number)))
    assert len(await log.flush()) == 2
    assert log.lost == 3
