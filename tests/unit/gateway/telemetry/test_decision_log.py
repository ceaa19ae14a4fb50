"""The gateway's own file of decisions."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from gateway.telemetry import decision_log
from gateway.telemetry.decision_log import DecisionLog
from shared.messages.offers import BareOffer, Decision, Offer, TaskType


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


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let writes beyond a size be short, and then fail, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_write_that_is_cut_counts_as_lost_and_spoils_no_later_line(tmp_path: Path) -> None:
    path, room = tmp_path / "decisions.jsonl", 1 << 24  # far more than what the test itself may write
    log = DecisionLog(path)
    log.add(decision("one"), OFFER)
    await log.flush()
    line = path.stat().st_size
    with path.open("wb") as file:
        file.seek(room - line * 3 // 2)
        file.write(b"\n")
    with no_file_larger_than(room):
        for task in ("one", "two", "three"):
            log.add(decision(task), OFFER)
        await log.flush()
    assert path.stat().st_size == room
    assert log.lost == 3
    log.add(decision("four"), OFFER)
    await log.flush()
    assert [each.task for each in log.read_page(2).decisions] == ["four", "one"]
    assert log.lost == 3


async def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "MOST_WAITING", 2)
    log = DecisionLog(tmp_path / "decisions.jsonl")
    for number in range(5):
        log.add(decision(str(number)), OFFER)
    assert len(await log.flush()) == 2
    assert log.lost == 3


async def test_pages_go_back_to_the_first_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "BLOCK", 700)  # a line has about 500 bytes
    log = DecisionLog(tmp_path / "decisions.jsonl")
    assert log.read_page(5).decisions == []
    for number in range(23):
        log.add(decision(f"t{number}"), OFFER)
    await log.flush()
    seen, before, pages = [], None, 0
    while pages == 0 or before is not None:
        page = log.read_page(5, before)
        seen += [each.task for each in page.decisions]
        before, pages = page.next, pages + 1
    assert seen == [f"t{number}" for number in reversed(range(23))]
    assert pages == 5


async def test_a_page_skips_a_line_that_a_crash_cut(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path)
    log.add(decision("one"), OFFER)
    await log.flush()
    with path.open("a") as file:
        file.write('{"task_id": "tw\n')
    log.add(decision("three"), OFFER)
    await log.flush()
    assert [each.task for each in log.read_page(9).decisions] == ["three", "one"]
    assert [each.task for each in log.read_page(1).decisions] == ["three"]
