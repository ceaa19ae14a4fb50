from __future__ import annotations

import argparse
import io
import time
from typing import Any

import pytest
from rich.console import Console

from gateway.views.schemas import SlotView, TaskState, TaskView
from podium.client import NotFoundError
from podium.commands import watch
from podium.commands.status import slots_table, tasks_table
from podium.commands.watch import WatchView, drawn, line
from shared.errors import PodiumError
from shared.messages.jobs import Result, ResultStatus
from shared.messages.offers import Decision
from shared.messages.runs import Metrics, Phase, Progress


def view(state: TaskState = TaskState.RUNNING, **fields: Any) -> TaskView:
    values: dict[str, Any] = {
        "task_id": "t",
        "task": "t",
        "slot": "a",
        "state": state,
        "decision": Decision(task_id="t", task="t", accepted=True, reason="r"),
        "model": None,
        "task_type": None,
        "hours_to_complete": None,
        "received_at": 0.0,
        "deadline_at": time.time() + 60,
        "attempts": 1,
        "node": None,
        "epoch": None,
        "progress": None,
        "result": None,
    }
    return TaskView(**values | fields)


def training(share: float, **fields: Any) -> TaskView:
    progress = Progress(
        task="t", slot="a", phase=Phase.TRAIN, step=7, progress=share, loss=2.5, tokens_per_s=80.0, **fields
    )
    return view(progress=progress)


def submitted() -> TaskView:
    result = Result(
        record_id="r",
        task="t",
        task_id="t",
        slot="a",
        status=ResultStatus.SUBMITTED,
        artifact="/x/[bold]/submission",
        metrics=Metrics(base_loss=4.0, final_loss=2.0),
        deadline_margin_s=12.0,
    )
    return view(TaskState.SUBMITTED, result=result)


def printed(*things: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    for thing in things:
        console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_only_news_is_a_line() -> None:
    console = Console(file=io.StringIO(), width=160)
    with WatchView(console) as watching:
        for task in (view(), training(0.01), training(0.05), training(0.11), submitted(), submitted()):
            watching.update([task])
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 4  # running, train, the first tenth, the end
    assert "train 11%  step 7  loss 2.500  80 tokens/s" in lines[2]
    assert "/x/[bold]/submission  12 s to spare" in lines[3]


def test_on_a_terminal_every_task_has_a_bar() -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with WatchView(console) as watching:
        watching.update([training(0.5)])
    assert isinstance(console.file, io.StringIO)
    assert "━" in console.file.getvalue()
    assert "50%" in printed(drawn([training(0.5)]))


def test_a_message_of_the_run_is_shown() -> None:
    console = Console(file=io.StringIO(), width=160)
    with WatchView(console) as watching:
        watching.update([training(0.0, message="12 rows dropped: empty [output]")])
    assert isinstance(console.file, io.StringIO)
    assert "12 rows dropped: empty [output]" in console.file.getvalue()


def test_status_shows_losses_and_slots_that_are_not_heard() -> None:
    silent = SlotView(
        slot="b",
        state="free",
        live=False,
        hardware=None,
        node="n",
        epoch=None,
        task=None,
        phase=None,
        step=None,
        last_heartbeat_age_s=None,
    )
    text = printed(slots_table([silent]), tasks_table([submitted()]))
    assert "not seen" in text
    assert "4.000 -> 2.000" in text
    assert "/x/[bold]/submission" in text


def test_a_task_whose_states_are_damaged_shows_it() -> None:
    stuck = view(damaged="invalid JSON")
    assert "running, damaged" in line(stuck)
    text = printed(drawn([stuck]), tasks_table([stuck]))
    assert text.count("running, damaged") == 2
    assert "invalid JSON" in text


class Gateway:
    """A gateway with so many newer tasks that a page does not have the one that is asked for."""

    def __init__(self, *states: TaskView) -> None:
        self.states = list(states)

    def tasks(self) -> list[TaskView]:
        return []

    def task(self, key: str) -> TaskView:
        if key != "t":
            raise NotFoundError(key)
        return self.states.pop(0)


def watched(monkeypatch: pytest.MonkeyPatch, gateway: Gateway) -> int:
    monkeypatch.setattr(watch, "find_gateway", lambda url: gateway)
    monkeypatch.setattr(watch, "POLL_S", 0.0)
    return watch.run(argparse.Namespace(url=None, tasks=["t"], json=True))


def test_a_named_task_is_found_however_old_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, Gateway(view(), submitted())) == 0


def test_a_watch_ends_at_a_task_whose_states_are_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PodiumError, match=r"t \(running\) is stuck: .* can't be read \(invalid JSON\)"):
        watched(monkeypatch, Gateway(view(), view(damaged="invalid JSON")))
