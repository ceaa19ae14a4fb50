"""Runs whose data, model or profile can not be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.files import folder_digest
from shared.messages import (
    ErrorCode,
    OutcomeStatus,
    TaskType,
)
from tests.engine.worker_run import (
    finish,
    progress_of,
)

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize(("rows", "why"), [(-20, "rows.json has changed"), (0, "rows.json holds no rows")])
def test_without_its_data_a_run_submits_what_it_has(killed_job: Path, rows: int, why: str) -> None:
    data = killed_job.parent / "rows.json"
    data.write_text(json.dumps(json.loads(data.read_text())[:rows]))
    (killed_job.parent / "tokens.safetensors").unlink()
    outcome = finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.digest == folder_digest(killed_job.parent / "export")
    said = [line.message or "" for line in progress_of(killed_job)]
    assert any(why in text and "submitted as it is" in text for text in said), said


def test_bad_data_names_the_file(make_job: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('[{"q": "a"')
    outcome = finish(make_job(dataset=str(tmp_path / "bad.json")))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.BAD_DATA)
    assert "bad.json" in (outcome.error or "")


def test_an_unknown_model_is_unavailable(make_job: Callable[..., Path], tmp_path: Path) -> None:
    outcome = finish(make_job(model_path=str(tmp_path / "no-model")))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.MODEL_UNAVAILABLE)
    assert "no-model" in (outcome.error or "")


def test_an_unknown_profile_is_unsupported(make_job: Callable[..., Path]) -> None:
    outcome = finish(make_job(profile="best"))
    assert outcome.code is ErrorCode.UNSUPPORTED
    assert "maximum_accuracy" in (outcome.error or "")


def test_a_kind_of_task_without_objective_is_unsupported(make_job: Callable[..., Path]) -> None:
    outcome = finish(make_job(task_type=TaskType.GRPO))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.UNSUPPORTED)
    assert "GrpoTask" in (outcome.error or "")
