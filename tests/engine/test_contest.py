"""The contest runner as upstream runs it, as a process: what lies in the submission folder in each case."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.engine.worker_run import ROOT, WAIT_S, write_rows
from trainer_node.contest.safetensors_file import read_shapes
from trainer_node.contest.validity import objections
from trainer_node.worker.supervisor import WorkerFile

MODEL, REPO = "0123456789abcdef", "tournament-tourn_1-t1-5F3sa2TJ"
COLUMNS = {"field_instruction": "q", "field_output": "a", "system_prompt": "", "field_input": None}
HOURS = 0.05
RANK_1 = (1, 64)  # of the adapter that changes nothing


class Container:
    """A private root folder with upstream's mounts, and the runner in it."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.base = root / "cache" / "models" / MODEL
        shutil.copytree(model, self.base)
        (root / "cache" / "datasets").mkdir(parents=True)
        self.data = root / "cache" / "datasets" / "t1_train_data.json"
        shutil.copy(write_rows(root), self.data)
        self.folder = root / "app" / "checkpoints" / "t1"
        self.submission = self.folder / REPO
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, hours: float = HOURS, task_type: str = "InstructTextTask", **environment: str) -> None:
        arguments = {
            "--task-id": "t1",
            "--model": MODEL,
            "--dataset": "https://data.example/rows.json",
            "--dataset-type": json.dumps(COLUMNS),
            "--task-type": task_type,
            "--file-format": "s3",
            "--expected-repo-name": REPO,
            "--hours-to-complete": str(hours),
        }
        given = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PODIUM_CONTEST_ROOT": str(self.root),
            "PODIUM_CONTEST_PROFILES": "lora_r16",
            "PODIUM_THREADS": "1",
            "PODIUM_HARDWARE": "cpu",
            **environment,
        }
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer_node.contest", *chain.from_iterable(arguments.items())],
                stdout=log,
                stderr=log,
                env=given,
            )

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(3600 * HOURS + WAIT_S)

    def until(self, seen: Callable[[], Any]) -> None:
        assert self.process is not None
        until = time.monotonic() + WAIT_S
        while not seen():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.02)

    def worker(self) -> WorkerFile | None:
        found = list(self.folder.glob(".podium-*/worker.json"))
        return msgspec.json.decode(found[0].read_bytes(), type=WorkerFile) if found else None

    def has_checkpoint(self) -> bool:
        return any(self.folder.glob(".podium-*/runs/*/checkpoints/step-*"))

    def kill(self) -> None:
        """SIGKILL for all that is inside, as the end of a container is."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if (worker := self.worker()) is not None:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()

    @property
    def is_trained(self) -> bool:
        shapes = read_shapes(self.submission / "adapter_model.safetensors")
        return RANK_1 not in shapes.values()


@pytest.fixture
def container(tmp_path: Path, tiny_model: Path) -> Iterator[Container]:
    made = Container(tmp_path, tiny_model)
    yield made
    made.kill()


def test_a_task_ends_with_the_workers_export_and_nothing_else(container: Container) -> None:
    container.start()
    assert container.wait() == 0
    assert objections(container.submission, container.base) == []
    assert container.is_trained
    assert [path.name for path in container.folder.iterdir()] == [REPO]  # the volume is shared with others
    assert "source=final" in container.log


@pytest.mark.slow
def test_a_killed_worker_goes_on_from_its_checkpoint(container: Container) -> None:
    container.start()
    container.until(container.has_checkpoint)
    worker = container.worker()
    assert worker is not None
    os.killpg(worker.pid, signal.SIGKILL)
    assert container.wait() == 0
    assert container.is_trained
    assert "resumed from step" in container.log


@pytest.mark.slow
def test_a_kill_in_training_leaves_a_trained_submission(container: Container) -> None:
    container.start()
    container.until(lambda: container.submission.exists())
    assert objections(container.submission, container.base) == []
    container.until(lambda: "source=early" in container.log or "source=final" in container.log)
    container.kill()
    assert objections(container.submission, container.base) == []
    assert container.is_trained


def spoil_rows(container: Container) -> None:
    rows = json.loads(container.data.read_text())
    container.data.write_text(json.dumps([{"q": None, "a": 3}, "no row", *rows]))


def cut_data(container: Container) -> None:
    container.data.write_bytes(container.data.read_bytes()[:200])


def without_tokenizer(container: Container) -> None:
    for path in container.base.glob("token*"):
        path.unlink()


def without_scratch(container: Container) -> None:
    """The container's own disk can't be written, the volume can."""
    (container.root / "tmp").write_text("")


@pytest.mark.parametrize(
    ("spoil", "trained", "words"),
    [
        (spoil_rows, True, "dropped"),
        (cut_data, False, "training ends without a result of its own"),
        (without_tokenizer, False, "training ends without a result of its own"),
        (without_scratch, False, "the run ends early"),
    ],
)
def test_spoilt_input_still_leaves_a_submission(
    spoil: Callable[[Container], None], trained: bool, words: str, container: Container
) -> None:
    spoil(container)
    container.start()
    assert container.wait() == 0
    assert objections(container.submission, container.base) == []
    assert container.is_trained is trained
    assert words in container.log


def test_a_task_that_the_engine_lacks_gets_the_base_model(container: Container) -> None:
    container.start(task_type="EnvTask")
    assert container.wait() == 0
    assert objections(container.submission, container.base) == []
    assert "doesn't train this type of task" in container.log


def test_without_a_model_nothing_can_be_submitted(container: Container) -> None:
    shutil.rmtree(container.base)
    container.start()
    assert container.wait() == 1
    assert "there is no valid submission" in container.log


def test_wrong_arguments_are_another_status(container: Container) -> None:
    container.start(hours=-1)
    assert container.wait() == 2
    assert "--hours-to-complete" in container.log
