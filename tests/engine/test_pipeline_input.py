"""Runs whose data, model or profile can not be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from transformers import AutoTokenizer

from shared.files import folder_digest
from shared.messages.offers import TaskType
from shared.messages.runs import ErrorCode, OutcomeStatus
from shared.planning.profiles import PROFILES, resolve
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


def test_tokens_that_were_added_to_the_tokenizer_alone_cost_their_rows(
    make_job: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "added"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    data = tmp_path / "rows.json"
    rows = json.loads(data.read_text())
    first = next(iter(rows[0]))
    changed = rows[::4]
    for row in changed:
        row[first] = f"<new> {row[first]}"
    data.write_text(json.dumps(rows))
    outcome = finish(make_job(model_path=str(model)))
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    reason = "has a token that the model has no embedding for"
    assert outcome.metrics.dropped_rows == {reason: len(changed)}


def test_an_unknown_profile_is_unsupported(make_job: Callable[..., Path]) -> None:
    outcome = finish(make_job(profile="best"))
    assert outcome.code is ErrorCode.UNSUPPORTED
    assert "maximum_accuracy" in (outcome.error or "")


def test_a_kind_of_task_without_objective_is_unsupported(make_job: Callable[..., Path]) -> None:
    outcome = finish(make_job(task_type=TaskType.GRPO))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.UNSUPPORTED)
    assert "GrpoTask" in (outcome.error or "")


def mixed_rows(folder: Path) -> Path:
    """Rows of which each fifth is three times as long as the others."""
    texts = [f"It comes after {i % 37 - 1}." for i in range(200)]
    rows = [
        {"q": f"Define {i % 37}, {i}.", "a": " ".join([text] * (3 if i % 5 == 0 else 1))}
        for i, text in enumerate(texts)
    ]
    data = folder / "mixed.json"
    data.write_text(json.dumps(rows))
    return data


def with_longest_row(monkeypatch: pytest.MonkeyPatch, tokens: int) -> str:
    """A profile that trains on no longer rows."""
    recipe = replace(resolve("lora_r16"), profile="short_rows", max_length=tokens)
    monkeypatch.setitem(PROFILES, "short_rows", recipe)
    return "short_rows"


def test_rows_longer_than_the_profile_trains_on_are_dropped_and_counted(
    make_job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = with_longest_row(monkeypatch, 40)
    outcome = finish(make_job(profile=profile, dataset=str(mixed_rows(tmp_path)), ready_by=5.0))
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    dropped = outcome.metrics.dropped_rows["longer than the profile's 40 tokens"]
    assert 0 < dropped <= 40
    assert outcome.metrics.train_examples + dropped + outcome.metrics.dev_examples == 200


def test_copies_of_rows_are_counted(make_job: Callable[..., Path], tmp_path: Path) -> None:
    texts = [" ".join(str(place * row % 997) for place in range(20, 40)) for row in range(1, 61)]
    texts += [text.replace(" ", " 5 ", 1) for text in texts[:10]]
    data = tmp_path / "copies.json"
    data.write_text(json.dumps([{"q": f"Count, {row}.", "a": text} for row, text in enumerate(texts)]))
    job = make_job(dataset=str(data))
    outcome = finish(job)
    assert outcome.metrics is not None, outcome.error
    assert outcome.metrics.copied_rows == 10
    assert any((line.message or "").startswith("10 of 70 rows are") for line in progress_of(job))
    assert "or nearly: 10\n" in (job.parent / "export" / "README.md").read_text()


def test_a_profile_that_no_row_is_short_enough_for_is_refused(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = finish(make_job(profile=with_longest_row(monkeypatch, 3)))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.BAD_DATA)
    assert "take another profile" in (outcome.error or "")


def test_the_reference_miner_ends_after_ten_steps(make_job: Callable[..., Path]) -> None:
    outcome = finish(make_job(profile="reference_miner"))
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.steps == 10
