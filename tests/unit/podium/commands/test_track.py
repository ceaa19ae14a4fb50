"""`podium track` says what is missing, and what it can't wait for."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import pytest

from gateway.views.run import RunView, run_view
from gateway.views.schemas import TaskView
from podium.__main__ import main
from podium.commands import track
from podium.tracking.runs import RunUpdate
from shared.errors import PodiumError
from shared.net import free_port
from tests.unit.podium.tracking.test_facts import task


def test_a_missing_trackio_is_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert main(["track", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("podium track: tracking needs trackio 0.43: pip install '.[tracking]' (")
    assert len(said.splitlines()) == 1


def test_a_trackio_that_is_built_otherwise_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio.sqlite_storage", ModuleType("trackio.sqlite_storage"))
    assert main(["track", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    said = capsys.readouterr().err
    assert "tracking needs trackio 0.43" in said
    assert "SQLiteStorage" in said


class Store:
    """A tracker that takes everything."""

    def facts(self, run_id: str) -> None:
        return None

    def write(self, update: RunUpdate) -> None: ...


class Gateway:
    """A gateway with one task whose states are damaged after the first look, and whose course is empty."""

    def __init__(self) -> None:
        self.looks = 0

    def task(self, key: str) -> TaskView:
        self.looks += 1
        return task() if self.looks == 1 else task(damaged="invalid JSON")

    def tasks(self, limit: int) -> list[TaskView]:
        if self.looks == 3:
            raise KeyboardInterrupt
        return [self.task("")]

    def progress(self, key: str, points: int, after: float) -> RunView:
        return run_view(key, [], points, after)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    made = Gateway()
    monkeypatch.setattr(track, "find_gateway", lambda url: made)
    monkeypatch.setattr(track, "TrackioStore", lambda project: Store())
    return made


def tracked(*tasks: str, once: bool = False) -> int:
    return track.run(
        argparse.Namespace(
            tasks=list(tasks), folder=None, url=None, project="p", json=False, once=once, every=0.0
        )
    )


@pytest.mark.parametrize("once", [False, True])
def test_a_named_task_whose_states_are_damaged_is_an_error(once: bool, gateway: Gateway) -> None:
    gateway.looks = int(once)  # the first look finds it damaged
    with pytest.raises(PodiumError, match=r"1-2 \(running\) is stuck: .* can't be read \(invalid JSON\)"):
        tracked("1/2", once=once)
    assert gateway.looks == 2


def test_one_of_all_tasks_is_told_once_and_the_others_are_followed(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tracked()
    assert capsys.readouterr().err.count("is stuck") == 1
