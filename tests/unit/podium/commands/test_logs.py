from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from gateway.views.run import MOST_MESSAGES, RunPoint, RunView, run_view
from podium.commands import logs
from podium.commands.logs import lines_of
from shared.errors import PodiumError
from shared.messages.runs import Phase


def test_the_base_models_loss_is_told_from_those_of_training() -> None:
    points = [
        RunPoint(at=0.0, phase=Phase.BASELINE),
        RunPoint(at=1.0, phase=Phase.TRAIN, base_loss=3.0, dev_loss=3.0),
        RunPoint(at=2.0, phase=Phase.TRAIN, step=8, dev_loss=2.5),
        RunPoint(at=2.0, phase=Phase.TRAIN, step=8, dev_loss=2.5, message="so far"),
    ]
    lines = [(line.phase, line.step, line.text) for line in lines_of(run_view("t", points, 10))]
    assert lines == [
        ("baseline", 0, "begins"),
        ("baseline", 0, "held-out loss of the base model 3.0000"),
        ("train", 0, "begins"),
        ("train", 8, "held-out loss 2.5000"),
        ("train", 8, "so far"),
    ]


class Gateway:
    """A gateway with one task. Each look finds that many new messages; after the last, the task ended."""

    def __init__(self, *counts: int) -> None:
        self.counts = list(counts)
        self.points = list[RunPoint]()
        self.damaged: str | None = None

    def task(self, task: str) -> SimpleNamespace:
        count, done = self.counts.pop(0), len(self.points)
        self.points += [
            RunPoint(float(at), Phase.TRAIN, message=f"<{at}>") for at in range(done, done + count)
        ]
        state = "running" if self.counts else "submitted"
        return SimpleNamespace(task=task, state=state, result=None, damaged=self.damaged)

    def progress(self, task: str) -> RunView:
        return run_view(task, self.points, 10)


def test_following_prints_each_line_once_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = Gateway(5, MOST_MESSAGES, 0, 3)
    monkeypatch.setattr(logs, "find_gateway", lambda url: gateway)
    monkeypatch.setattr(logs, "POLL_S", 0.0)
    logs.run(argparse.Namespace(url=None, task="t", follow=True, json=False))
    printed = [line.split("<")[1] for line in capsys.readouterr().out.splitlines() if "<" in line]
    assert printed == [f"{number}>" for number in range(MOST_MESSAGES + 8)]


def test_following_ends_at_a_task_whose_states_are_damaged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = Gateway(1, 1)
    gateway.damaged = "invalid JSON"
    monkeypatch.setattr(logs, "find_gateway", lambda url: gateway)
    with pytest.raises(PodiumError, match=r"t \(running\) is stuck: .* can't be read \(invalid JSON\)"):
        logs.run(argparse.Namespace(url=None, task="t", follow=True, json=False))
    assert "<0>" in capsys.readouterr().out
