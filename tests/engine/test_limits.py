"""Data, templates and tokenizers that would take all memory or never end: each ends one job, and says why."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import ErrorCode, Outcome, OutcomeStatus
from tests.engine.worker_run import ENVIRONMENT, ROOT, WAIT_S, outcome_of
from trainer_node.engine import limits, pipeline, prepare
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop

MIB = 1 << 20
FOR_DATA = 150 * MIB


@pytest.fixture
def reporter(tmp_path: Path) -> Reporter:
    return Reporter(tmp_path / "progress.jsonl", "t", "a")


def test_memory_ends_inside_and_is_free_after() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limits.memory_limit(200 * MIB):
        assert len(bytearray(100 * MIB)) == 100 * MIB
        with pytest.raises(MemoryError):
            bytearray(400 * MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(400 * MIB)) == 400 * MIB


def test_a_narrower_limit_stays() -> None:
    with limits.memory_limit(200 * MIB), limits.memory_limit(2000 * MIB), pytest.raises(MemoryError):
        bytearray(400 * MIB)


def test_memory_is_asked_for_before_a_library_takes_it() -> None:
    limits.require_memory(1 << 60)  # no limit
    with limits.memory_limit(200 * MIB):
        limits.require_memory(100 * MIB)
        with pytest.raises(MemoryError):
            limits.require_memory(190 * MIB)


def test_no_status_no_count(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\n")
    with pytest.raises(OSError, match="lacks VmData"):
        limits.data_bytes(tmp_path / "status")


def test_silence_is_noticed_once(reporter: Reporter) -> None:
    noticed: list[float] = []
    reporter.alive()
    with limits.silence_limit(reporter, 0.2, lambda: noticed.append(reporter.silent_s)):
        time.sleep(0.7)
    assert len(noticed) == 1
    assert noticed[0] > 0.2


def test_who_speaks_is_not_silent(reporter: Reporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_node.engine.reporter.PERIOD_S", 0.02)
    with limits.silence_limit(reporter, 0.5, lambda: pytest.fail("silent")):
        for _ in range(40):
            reporter.alive()
            time.sleep(0.02)


# --- data that unpacks to more than there is memory for


def finish_on_small_machine(job: Path) -> Outcome:
    """Run a job where 2 * FOR_DATA is all the memory, in a process whose heap is new."""
    command = [sys.executable, "-m", "tests.engine.small_machine_side", str(job), str(2 * FOR_DATA)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=WAIT_S)
    assert (job.parent / "outcome.json").exists(), (done.returncode, done.stderr[-2000:])
    return outcome_of(job)


def write_lines(path: Path) -> FileFormat:
    path.write_bytes(gzip.compress(b'{"q": "a", "a": "b"}\n' * 2_000_000, 1))
    return FileFormat.JSONL


def write_empty_objects(path: Path) -> FileFormat:
    path.write_bytes(bz2.compress(b"[" + b"{}," * 4_000_000 + b"{}]"))
    return FileFormat.JSON


def write_one_text(path: Path) -> FileFormat:
    path.write_bytes(gzip.compress(b'[{"q": "' + b"a" * 200_000_000 + b'", "a": "b"}]', 1))
    return FileFormat.JSON


def write_csv(path: Path) -> FileFormat:
    path.write_bytes(gzip.compress(b"q,a\n" + b"a,b\n" * 2_000_000, 1))
    return FileFormat.CSV


def write_repeated_texts(path: Path) -> FileFormat:
    """A dictionary of one text of 1 MB, and 2,000 rows that name it."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000), pyarrow.array(["a" * MIB]))
    pyarrow.parquet.write_table(pyarrow.table({"q": text, "a": text}), path, compression="zstd")
    return FileFormat.PARQUET


def write_rows_of_nothing(path: Path) -> FileFormat:
    """Of 30 million rows not one has a column that is asked for."""
    zeros = pyarrow.array([0], pyarrow.int8()).take(pyarrow.array([0] * 1_000_000, pyarrow.int8()))
    table = pyarrow.table({"z": pyarrow.chunked_array([zeros] * 30)})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    return FileFormat.PARQUET


BOMBS = (
    write_lines,
    write_empty_objects,
    write_one_text,
    write_csv,
    write_repeated_texts,
    write_rows_of_nothing,
)


@pytest.mark.parametrize("write", BOMBS)
def test_data_bombs(
    write: Callable[[Path], FileFormat],
    make_job: Callable[..., Path],
    tmp_path: Path,
) -> None:
    data = tmp_path / "bomb"
    kind = write(data)
    assert data.stat().st_size < 4 * MIB
    outcome = finish_on_small_machine(make_job(dataset=str(data), file_format=kind))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.DATA_UNAVAILABLE), outcome.error
    text = "bomb: reading and tokenising the data needs more than 0.2 GB of memory"
    assert (outcome.error or "").endswith(text)


# --- templates and tokenizers


def template_job(make_job: Callable[..., Path], tiny_model: Path, folder: Path, template: str) -> Path:
    model = Path(shutil.copytree(tiny_model, folder / "model"))
    for path in model.glob("chat_template*"):
        path.unlink()
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]
    (folder / "talks.json").write_text(json.dumps([{"talk": talk}] * 9))
    columns = DatasetType(
        chat_column="talk",
        chat_user_reference="human",
        chat_assistant_reference="gpt",
        chat_template="tokenizer_default",
    )
    return make_job(
        model_path=str(model),
        task_type=TaskType.CHAT,
        dataset=str(folder / "talks.json"),
        dataset_type=columns,
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set ns = namespace(x=messages[0].content) %}"
        "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_a_template_that_takes_all_memory(
    template: str,
    make_job: Callable[..., Path],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    outcome = finish_on_small_machine(template_job(make_job, tiny_model, tmp_path, template))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.DATA_UNAVAILABLE)
    assert "needs more than 0.2 GB of memory" in (outcome.error or "")


def run_impatient(job: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Outcome]:
    """Run a job in a process of its own, which gives up after two silent seconds."""
    monkeypatch.setattr(prepare, "SILENT_S", 2.0)
    child = os.fork()  # a new Python would import torch again, which takes a minute on a busy machine
    if child == 0:
        try:
            pipeline.main(job, Stop())
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), outcome_of(job)


def test_a_template_without_end(
    make_job: Callable[..., Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    code, outcome = run_impatient(template_job(make_job, tiny_model, tmp_path, loops), monkeypatch)
    assert (code, outcome.status, outcome.code) == (1, OutcomeStatus.FAILED, ErrorCode.UNSUPPORTED)
    assert "no row was tokenised for 2 s: the model's tokenizer" in (outcome.error or "")


def test_a_tokenizer_without_end(
    make_job: Callable[..., Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = model / "tokenizer.json"
    prepends = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 10}] * 100_000}
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": prepends}))
    code, outcome = run_impatient(make_job(model_path=str(model)), monkeypatch)
    assert (code, outcome.status, outcome.code) == (1, OutcomeStatus.FAILED, ErrorCode.UNSUPPORTED)
    assert "doesn't finish on these rows" in (outcome.error or "")
