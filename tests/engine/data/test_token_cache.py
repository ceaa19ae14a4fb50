"""A run's tokens are made once: read again for the same data, columns and tokenizer, and for no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import WorkerJob
from trainer_node.engine.data import token_cache
from trainer_node.engine.data.examples import tokenize
from trainer_node.engine.data.token_cache import kept, tokens_of
from trainer_node.engine.reporter import Reporter

ROWS = [{"q": f"What is {i}?", "a": "A number.", "c": "A figure."} for i in range(20)] + [{"q": "", "a": ""}]


@pytest.fixture
def job(tmp_path: Path) -> WorkerJob:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return WorkerJob(
        task_id="t",
        task="t",
        slot="a",
        task_type=TaskType.INSTRUCT,
        model="org/model",
        model_path="",
        dataset=str(tmp_path / "rows.json"),
        file_format=FileFormat.JSON,
        dataset_type=DatasetType(field_instruction="q", field_output="a"),
        start_at=0.0,
        ready_by=1.0,
        hardware=Hardware(device="cpu", count=1, memory_bytes=2**30),
    )


@pytest.fixture
def ask(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, bool]]:
    """Asks for a job's tokens: they, and whether they were made or read."""
    made: list[int] = []

    def counted(*args: Any, **rest: Any) -> Any:
        made.append(1)
        return tokenize(*args, **rest)

    monkeypatch.setattr(token_cache, "tokenize", counted)

    def ask(job: WorkerJob, length: int = 256) -> tuple[Any, bool]:
        made.clear()
        reporter = Reporter(tmp_path / "progress.jsonl", "t", "a")
        return tokens_of(job, tmp_path, tokenizer, length, reporter), bool(made)

    return ask


def test_the_same_rows_are_tokenised_once(job: WorkerJob, ask: Callable[..., tuple[Any, bool]]) -> None:
    first, made = ask(job)
    assert made
    assert (first.rows, first.dropped) == (21, {"column 'a' is empty": 1})
    again, made = ask(job)
    assert not made
    assert (again.rows, again.dropped) == (first.rows, first.dropped)
    assert again.examples.fingerprint() == first.examples.fingerprint()
    pairs = replace(
        job,
        task_type=TaskType.DPO,
        dataset_type=DatasetType(field_prompt="q", field_chosen="a", field_rejected="c"),
    )
    assert [ask(pairs)[0].examples.group for _ in range(2)] == [2, 2]


def test_anything_else_is_tokenised_anew(job: WorkerJob, ask: Callable[..., tuple[Any, bool]]) -> None:
    ask(job)
    assert ask(job, 128)[1]
    assert ask(replace(job, dataset_type=DatasetType(field_instruction="q", field_output="c")), 128)[1]
    assert ask(replace(job, task_type=TaskType.INSTRUCT), 128)[1]
    Path(job.dataset).write_text(json.dumps(ROWS[1:]))
    changed, made = ask(job, 128)
    assert made
    assert changed.rows == 20


def test_a_resume_needs_no_data_but_a_whole_file(
    job: WorkerJob, ask: Callable[..., tuple[Any, bool]], tmp_path: Path
) -> None:
    assert kept(tmp_path) is None
    first, _ = ask(job)
    Path(job.dataset).unlink()
    known = kept(tmp_path)
    assert known is not None
    assert known.examples.fingerprint() == first.examples.fingerprint()
    file = tmp_path / token_cache.FILE
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole.replace(b'"dropped":"{', b'"dropped":"['), b"\0" * len(whole)):
        assert damaged != whole
        file.write_bytes(damaged)
        assert kept(tmp_path) is None
