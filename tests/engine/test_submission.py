"""Exports that are refused: which one is submitted nonetheless, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.files import folder_digest
from shared.messages.runs import Metrics, Outcome, OutcomeStatus
from tests.engine.worker_run import finish, outcome_of, progress_of
from trainer_node.engine import finish as finishing
from trainer_node.engine import submission
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.evaluate.candidates import Candidate
from trainer_node.engine.export import unverified, writer
from trainer_node.engine.export.verify import ExportProblem
from trainer_node.engine.time_budget import Part

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
Change = Callable[[Candidate], list[Candidate]]


@pytest.fixture
def refuse(make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, int]]:
    """Runs a job whose exports score as given, one list of losses each; its path, and how many were written.

    Its candidates are what `change` makes of the best one.
    """

    def run(*losses: Sequence[float], change: Change = lambda best: [best]) -> tuple[Path, int]:
        problems = [ExportProblem(f"the files score {rows[0]}", list(rows)) for rows in losses]
        choose, write = finishing.choose, writer.write
        written: list[Path] = []

        def noted(*arguments: Any) -> Any:
            written.append(arguments[-1])
            return write(*arguments)

        monkeypatch.setattr(writer, "write", noted)
        monkeypatch.setattr(writer, "verify", lambda *_: problems.pop(0))
        monkeypatch.setattr(finishing, "choose", lambda *arguments: change(choose(*arguments)[0]))
        job = make_job(profile="lora_r16")
        finish(job)
        assert not problems
        return job, len(written)

    return run


def twice(best: Candidate) -> list[Candidate]:
    return [replace(best, name="first"), replace(best, name="second")]


@dataclass(frozen=True)
class NotedGroup(ProcessGroup):
    """Two processes, of which only this one is there; notes what it does together with the other."""

    noted: list[str] = field(default_factory=list)

    def gather_objects(self, value: Any) -> list[Any]:
        self.noted.append("met")
        return [value] * self.world

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        self.noted.append("told")
        return value


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("gone", [False, True])
def test_every_process_gives_its_memory_back_before_the_files_are_verified(
    rank: int, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large export is loaded onto all GPUs of the job, also those of the other processes."""
    group = NotedGroup(rank, 2)

    def write(*_: Any) -> Metrics | None:
        group.noted.append("written")
        if gone:
            raise FileNotFoundError("step-00000003/weights.safetensors")
        return Metrics(base_loss=3.0) if rank == 0 else None

    monkeypatch.setattr(submission, "_export", write)
    monkeypatch.setattr(submission, "release", lambda: group.noted.append("released"))
    monkeypatch.setattr(submission, "ready", lambda *_: Outcome(status=OutcomeStatus.READY))
    monkeypatch.setattr(unverified, "note", lambda *_: None)
    monkeypatch.setattr(submission, "_verify", lambda *_: group.noted.append("verified"))
    run: Any = SimpleNamespace(process_group=group, folder=None)
    unused: Any = None
    submission.export(run, unused, unused, unused, unused, frozenset(Part))
    verified = ["verified"] if rank == 0 and not gone else []
    assert group.noted == ["written", "released", "met", *verified, "told"]


def test_files_that_beat_the_base_model_are_submitted_as_they_are(refuse: Callable[..., Any]) -> None:
    job, written = refuse([1.0] * 8)
    outcome = outcome_of(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert written == 1  # they are on disk
    assert any("better than the base model" in (line.message or "") for line in progress_of(job))
    assert outcome.metrics is not None
    assert (outcome.metrics.final_loss, outcome.metrics.dev_examples) == (1.0, 8)  # of the files
    assert outcome.metrics.kind == "adapter"
    assert outcome.metrics.bytes > 0
    assert "held-out loss: 1.0000 (base" in (job.parent / "export" / "README.md").read_text()
    assert outcome.digest == folder_digest(job.parent / "export")


@pytest.mark.parametrize("losses", [[99.0] * 8, [1.0] * 7])
def test_files_that_are_worse_or_scored_few_rows_fail_the_job(
    losses: list[float], refuse: Callable[..., Any]
) -> None:
    outcome = outcome_of(refuse(losses)[0])
    assert outcome.status is OutcomeStatus.FAILED
    assert "no export matches the trained weights: " in (outcome.error or "")


@pytest.mark.parametrize(("first", "second", "written"), [(1.0, 2.0, 3), (2.0, 1.0, 2)])
def test_the_best_files_are_submitted_and_written_again_only_if_they_are_gone(
    first: float, second: float, written: int, refuse: Callable[..., Any]
) -> None:
    job, count = refuse([first] * 8, [second] * 8, change=twice)
    outcome = outcome_of(job)
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss == 1.0
    assert count == written
    assert outcome.digest == folder_digest(job.parent / "export")


@pytest.mark.parametrize("gone_at", [0, 1])
def test_weights_that_made_room_on_disk_are_no_candidate_any_more(
    gone_at: int, refuse: Callable[..., Any]
) -> None:
    """At the first try, or when they are to be written once more."""
    tries: list[int] = []

    @contextmanager
    def gone() -> Iterator[None]:
        tries.append(1)
        if len(tries) > gone_at:
            raise FileNotFoundError("step-00000003/weights.safetensors")
        yield

    def first_gone(best: Candidate) -> list[Candidate]:
        return [replace(best, name="step 3", weights_applied=gone), best]

    job, _ = refuse(*[[1.0] * 8] * gone_at, [2.0] * 8, change=first_gone)
    outcome = outcome_of(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss == 2.0
    said = [line.message or "" for line in progress_of(job)]
    assert any("step 3 weights" in text and "gone from the disk" in text for text in said), said
