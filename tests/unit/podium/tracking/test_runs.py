"""What is new of tracked runs, from a folder and from a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from gateway.views.run import RunView, run_view
from gateway.views.schemas import TaskState, TaskView
from podium.client import Client
from podium.tracking.facts import Facts
from podium.tracking.runs import SETTLED_S, FolderRuns, GatewayRuns, RunUpdate, has_ended, id_of
from shared.errors import PodiumError
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.jobs import Result, ResultStatus
from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import Metrics, Outcome, OutcomeStatus, Phase, Progress, WorkerJob
from tests.unit.podium.tracking.test_facts import task

BEGAN = 5000.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    job = WorkerJob(
        task_id="run1",
        task="run1",
        slot="local",
        task_type=TaskType.INSTRUCT,
        model="org/name",
        model_path="/models/name",
        dataset="/data/rows.json",
        file_format=FileFormat.JSON,
        dataset_type=DatasetType(field_instruction="q"),
        start_at=BEGAN,
        ready_by=BEGAN + 900,
        hardware=Hardware(device="cpu", count=2, memory_bytes=1 << 30),
        profile="lora_r16",
    )
    (tmp_path / "job.json").write_bytes(encode(job))
    return tmp_path


def report(folder: Path, step: int, **fields: Any) -> None:
    line = Progress(
        task="run1", slot="local", phase=Phase.TRAIN, step=step, loss=2.0, at=BEGAN + step, **fields
    )
    with (folder / "progress.jsonl").open("ab") as file:
        file.write(encode(line) + b"\n")


def nothing(run_id: str) -> None:
    return None


def one(runs: FolderRuns) -> RunUpdate:
    (update,) = runs.updates(nothing)
    return update


def test_a_run_of_train_grows_stops_goes_on_and_ends(folder: Path) -> None:
    runs = FolderRuns(folder)
    assert one(runs).rows == []  # it has not begun
    report(folder, 1, message="plan: packs is 8 instead of 64: time")
    with (folder / "progress.jsonl").open("ab") as file:
        file.write(b'{"task": "run1", "sl')  # half a line
    first = one(runs)
    assert [row.step for row in first.rows] == [1]
    assert (first.id, first.name, first.ended) == ("run1-5000.000", "run1", False)
    (folder / "progress.jsonl").write_bytes((folder / "progress.jsonl").read_bytes() + b"\n")
    report(folder, 2)
    stopped = Outcome(status=OutcomeStatus.STOPPED, at=BEGAN + 3)
    (folder / "outcome.json").write_bytes(encode(stopped))
    assert [row.step for row in one(runs).rows] == [2]
    assert not runs.have_ended()  # it can be resumed
    report(folder, 4)
    metrics = Metrics(base_loss=3.0, final_loss=2.0)
    ready = Outcome(status=OutcomeStatus.READY, metrics=metrics, digest="d", at=BEGAN + 600)
    (folder / "outcome.json").write_bytes(encode(ready))
    last = one(runs)
    ending = f"result-{round(1000 * (BEGAN + 600))}"
    assert [(row.key, row.step) for row in last.rows] == [("train-5004000", 4), (ending, 600)]
    assert last.rows[-1].values.items() >= {"result/margin_s": 300.0, "result/gain": 1.0}.items()
    facts = {
        "model": "org/name",
        "hardware": "cpu",
        "plan.profile": "lora_r16",
        "plan.deviation.packs": "8 instead of 64: time",
        "result.status": "ready",
        "result.held_out_loss": 2.0,
    }
    assert last.facts.items() >= facts.items()
    assert runs.have_ended()


def test_a_run_that_failed_has_no_margin_and_its_next_result_is_a_row_of_its_own(folder: Path) -> None:
    failed = Outcome(status=OutcomeStatus.FAILED, error="the disk is full", at=BEGAN + 3)
    (folder / "outcome.json").write_bytes(encode(failed))
    first = one(FolderRuns(folder))
    assert first.rows[-1].values == {"result/submitted": 0.0}
    assert first.facts["result.reason"] == "the disk is full"
    assert "result.margin_s" not in first.facts
    ready = Outcome(status=OutcomeStatus.READY, digest="d", at=BEGAN + 600.5)
    (folder / "outcome.json").write_bytes(encode(ready))
    second = one(FolderRuns(folder))
    assert second.rows[-1].values == {"result/submitted": 1.0, "result/margin_s": 299.5}
    assert [update.rows[-1].key for update in (first, second)] == ["result-5003000", "result-5600500"]


def test_what_was_not_stored_is_new_again(folder: Path) -> None:
    runs = FolderRuns(folder)
    report(folder, 1)
    next(runs.updates(nothing))  # the store fails: nobody asks for the next one
    assert [row.step for row in one(runs).rows] == [1]
    assert one(runs).rows == []


def test_a_folder_without_a_job_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(PodiumError, match="no folder of a `podium train`"):
        FolderRuns(tmp_path)


@pytest.mark.parametrize("name", ["outcome.json", "progress.jsonl"])
def test_a_file_that_can_not_be_read_is_told(name: str, folder: Path) -> None:
    (folder / name).mkdir()
    with pytest.raises(PodiumError, match=f"{name} can't be read: Is a directory"):
        one(FolderRuns(folder))


def test_a_damaged_outcome_is_told(folder: Path) -> None:
    (folder / "outcome.json").write_bytes(b"{")
    with pytest.raises(PodiumError, match=r"outcome\.json is no outcome of a run"):
        one(FolderRuns(folder))


class Forgetful:
    """A gateway that has lost a task's course."""

    def __init__(self, task: TaskView) -> None:
        self.newest = [task]

    def tasks(self, limit: int) -> list[TaskView]:
        return self.newest

    def progress(self, task: str, points: int, after: float) -> RunView:
        return run_view(task, [], points, after)


def test_a_plan_that_the_gateway_has_lost_stays_in_the_store() -> None:
    kept: Facts = {"plan.devices": 4, "model": "org/old"}
    runs = GatewayRuns(cast(Client, Forgetful(task())))
    (update,) = runs.updates(lambda run_id: kept)
    assert update.facts["plan.devices"] == 4
    assert update.facts["model"] == "org/name"


def test_a_task_has_ended_when_its_course_is_complete() -> None:
    base: dict[str, Any] = {"record_id": "r", "task": "t", "task_id": "t", "slot": "a"}
    result = Result(status=ResultStatus.SUBMITTED, at=BEGAN, **base)
    ended = task(state=TaskState.SUBMITTED, result=result)
    assert not has_ended(ended, BEGAN + SETTLED_S / 2)
    assert has_ended(ended, BEGAN + SETTLED_S)
    assert not has_ended(task(), BEGAN + 1e6)


def test_a_name_that_comes_again_is_another_run() -> None:
    assert id_of("first", 1.0) != id_of("first", 2.0)


class Named(Forgetful):
    """A gateway with one task that is asked for by its name."""

    def task(self, key: str) -> TaskView:
        return self.newest[0]


def test_a_task_whose_states_are_damaged_is_not_waited_for() -> None:
    gateway = Named(task())
    runs = GatewayRuns(cast(Client, gateway), ["1/2"])
    list(runs.updates(nothing))
    assert not runs.have_ended()
    assert runs.damaged() == []
    gateway.newest = [task(damaged="invalid JSON")]
    (update,) = runs.updates(nothing)
    assert not update.ended  # nobody knows
    assert runs.have_ended()
    assert runs.damaged() == gateway.newest
