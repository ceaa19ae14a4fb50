"""Whole runs in processes of their own: to the end, killed, stopped, late, and with bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from shared.digest import folder_digest
from shared.messages import (
    DatasetType,
    ErrorCode,
    FileFormat,
    Hardware,
    Outcome,
    OutcomeStatus,
    Phase,
    Progress,
    TaskType,
    WorkerJob,
    decode_outcome,
    decode_progress,
    decode_worker_job,
    encode,
)
from trainer_node.engine import checkpoint, export, loop
from trainer_node.engine import run as engine
from trainer_node.engine.loop import Training
from trainer_node.engine.prepare import Run
from trainer_node.engine.stop import Stop

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
WAIT_S = 90.0


def _rows(folder: Path, count: int = 300) -> Path:
    kinds = max(37, count // 10)
    rows = [
        {"q": f"Define number {i % kinds}.", "a": f"It comes after {i % kinds - 1}."} for i in range(count)
    ]
    data = folder / "rows.json"
    data.write_text(json.dumps(rows))
    return data


def _kind(task_type: TaskType, folder: Path) -> dict[str, Any]:
    """What a job of this kind says of its data, and the data in `folder`."""
    asked = [f"Define number {i % 37}." for i in range(300)]
    right = [f"It comes after {i % 37 - 1}." for i in range(300)]
    wrong = [f"They never said {i % 37 + 5}!" for i in range(300)]
    if task_type is TaskType.CHAT:
        columns = DatasetType(
            chat_template="chatml",
            chat_column="conversations",
            chat_role_field="from",
            chat_content_field="value",
            chat_user_reference="human",
            chat_assistant_reference="gpt",
        )
        talks = [
            [("human", q), ("gpt", a), ("human", "Again."), ("gpt", a)]
            for q, a in zip(asked, right, strict=True)
        ]
        rows = [{"conversations": [{"from": who, "value": what} for who, what in talk]} for talk in talks]
    else:
        columns = DatasetType(field_prompt="q", field_chosen="c", field_rejected="r")
        rows = [{"q": q, "c": c, "r": r} for q, c, r in zip(asked, right, wrong, strict=True)]
    data = folder / f"{task_type.value}.json"
    data.write_text(json.dumps(rows))
    return {"task_type": task_type, "dataset": str(data), "dataset_type": columns}


def _job(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    fields: dict[str, Any] = {
        "task_id": "t",
        "task": "t",
        "slot": "a",
        "task_type": TaskType.INSTRUCT,
        "model": "upstream/tiny",
        "model_path": str(model),
        "dataset": str(data),
        "file_format": FileFormat.JSON,
        "dataset_type": DatasetType(field_instruction="q", field_output="a"),
        "start_at": 0.0,
        "ready_by": 25.0,
        "hardware": Hardware(device="cpu", count=2, memory_bytes=16 * 2**30),
        "threads": 1,
        "clock": "token",
        "token_clock_rate": 1000.0,
        "checkpoint_interval_s": 5.0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_bytes(encode(WorkerJob(**{**fields, **changes})))
    return path


@pytest.fixture
def make_job(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a job on the tiny model into a folder of its own; the path of its job.json."""
    data = _rows(tmp_path)
    return lambda name="run", **changes: _job(tmp_path / name, tiny_model, data, **changes)


@pytest.fixture(scope="module")
def killed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after its first checkpoint, its data inside."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    folder.mkdir()
    job = _job(folder, tiny_model, _rows(folder))
    worker = _start(job)
    _wait_for_checkpoint(job, worker)
    worker.kill()
    worker.wait()
    return folder


@pytest.fixture
def killed_job(killed: Path, tmp_path: Path) -> Path:
    """A copy of the killed run, to go on with."""
    job = Path(shutil.copytree(killed, tmp_path / "run")) / "job.json"
    old = decode_worker_job(job.read_bytes())
    job.write_bytes(encode(replace(old, dataset=str(job.parent / "rows.json"))))
    return job


def _start(job: Path) -> subprocess.Popen[bytes]:
    with (job.parent / "worker.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer_node.engine", str(job)], stdout=log, stderr=log, env=ENVIRONMENT
        )


def _outcome(job: Path) -> Outcome:
    return decode_outcome((job.parent / "outcome.json").read_bytes())


def _finish(job: Path) -> Outcome:
    """Run to the end in this process; the exit status must say what the outcome says."""
    status = engine.main(job, Stop())
    outcome = _outcome(job)
    assert status == (1 if outcome.status is OutcomeStatus.FAILED else 0)
    told = decode_worker_job(job.read_bytes())
    in_every_line = structlog.contextvars.get_contextvars()
    assert in_every_line == {"task": told.task, "slot": told.slot}
    return outcome


def _progress(job: Path) -> list[Progress]:
    path = job.parent / "progress.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [decode_progress(line) for line in whole.splitlines()]


def _wait_for_checkpoint(job: Path, worker: subprocess.Popen[bytes]) -> None:
    """Until there is a checkpoint that wasn't there when this was called."""
    until = time.monotonic() + WAIT_S
    before = set((job.parent / "checkpoints").glob("step-*"))
    while not set((job.parent / "checkpoints").glob("step-*")) - before:
        assert worker.poll() is None, (job.parent / "worker.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.01)


def _weights(job: Path) -> dict[str, bytes]:
    export = job.parent / "export"
    return {path.name: path.read_bytes() for path in sorted(export.glob("*.safetensors"))}


@pytest.mark.parametrize("profile", ["maximum_accuracy", "lora_r16"])
def test_killed_and_stopped_runs_end_bit_equal_to_an_undisturbed_one(
    profile: str, make_job: Callable[..., Path]
):
    calm, rough = make_job("calm", profile=profile), make_job("rough", profile=profile)
    worker = _start(rough)
    _wait_for_checkpoint(rough, worker)
    worker.kill()
    worker.wait()
    worker = _start(rough)
    _wait_for_checkpoint(rough, worker)
    asked = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(WAIT_S) == 0
    assert time.monotonic() - asked < 30.0
    stopped = _outcome(rough)
    assert stopped.status is OutcomeStatus.STOPPED
    assert (rough.parent / "checkpoints" / f"step-{stopped.step:08d}" / "manifest.json").exists()

    found, wanted = _finish(rough), _finish(calm)
    assert found.status is wanted.status is OutcomeStatus.READY, (found.error, wanted.error)
    assert found.metrics is not None
    assert wanted.metrics is not None
    assert found.step > stopped.step
    assert found.metrics.resumes == 2
    assert found.metrics.kind == "adapter"  # of the tiny model, also where its deltas are dense
    assert found.metrics.final_loss == wanted.metrics.final_loss < 0.9 * wanted.metrics.base_loss
    assert found.metrics.steps == wanted.metrics.steps
    assert _weights(rough) == _weights(calm)
    assert wanted.digest == folder_digest(calm.parent / "export")


def test_a_killed_preference_run_ends_bit_equal_and_never_asks_the_base_model_again(
    make_job: Callable[..., Path], tmp_path: Path
):
    kind = {**_kind(TaskType.DPO, tmp_path), "profile": "lora_r16", "checkpoint_interval_s": 1.0}
    calm, rough = make_job("calm", **kind), make_job("rough", **kind)
    worker = _start(rough)
    _wait_for_checkpoint(rough, worker)
    worker.kill()
    worker.wait()
    reference = rough.parent / "reference.safetensors"
    written = reference.stat().st_mtime_ns
    found, wanted = _finish(rough), _finish(calm)
    assert found.status is wanted.status is OutcomeStatus.READY, (found.error, wanted.error)
    assert found.metrics is not None
    assert wanted.metrics is not None
    assert found.metrics.resumes == 1
    assert reference.stat().st_mtime_ns == written
    assert found.metrics.base_loss == pytest.approx(math.log(2))
    assert found.metrics.final_loss == wanted.metrics.final_loss
    assert wanted.metrics.final_loss is not None
    assert wanted.metrics.final_loss < 0.9 * math.log(2)
    assert _weights(rough) == _weights(calm)


@pytest.mark.parametrize("profile", ["maximum_accuracy", "lora_r16"])
@pytest.mark.parametrize("task_type", [TaskType.CHAT, TaskType.DPO])
def test_chat_and_preference_jobs_end_better_than_they_began(
    task_type: TaskType, profile: str, make_job: Callable[..., Path], tmp_path: Path
):
    job = make_job(profile=profile, **_kind(task_type, tmp_path))
    outcome = _finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss < outcome.metrics.base_loss - 0.02
    assert any(line.phase is Phase.VERIFY for line in _progress(job))
    assert not any("refused" in (line.message or "") for line in _progress(job))


@pytest.mark.parametrize("after_s", [0.0, 0.3])  # while torch and the model are read, while rows are
def test_sigterm_before_training_stops_at_once(after_s: float, make_job: Callable[..., Path]):
    job = make_job()
    worker = _start(job)
    until = time.monotonic() + WAIT_S
    while not (job.parent / "progress.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(after_s)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(WAIT_S) == 0
    assert _outcome(job).status is OutcomeStatus.STOPPED


def test_a_run_outlives_its_node(make_job: Callable[..., Path]):
    job = make_job()
    with subprocess.Popen(
        [sys.executable, "-m", "trainer_node.engine", str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
    ) as worker:
        assert worker.stdout is not None
        worker.stdout.close()
        _wait_for_checkpoint(job, worker)
        worker.send_signal(signal.SIGHUP)
        worker.send_signal(signal.SIGPIPE)
        assert worker.wait(WAIT_S) == 0
    assert _outcome(job).status is OutcomeStatus.READY


def test_real_time_ends_before_the_deadline(make_job: Callable[..., Path], tmp_path: Path):
    data, start = _rows(tmp_path, 20_000), time.time()  # more than there is time for
    job = make_job(clock="wall", start_at=start, ready_by=start + 25.0, dataset=str(data))
    outcome = _finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.at < start + 25.0
    lines = _progress(job)
    assert [phase for phase in Phase if any(line.phase is phase for line in lines)] == list(Phase)
    training = [line.progress for line in lines if line.phase is Phase.TRAIN]
    assert training == sorted(training)
    assert any("plan:" in (line.message or "") for line in lines)
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None  # there is time to score what is submitted


def test_late_resume_submits_the_newest_checkpoint_as_it_is(killed_job: Path):
    old = decode_worker_job(killed_job.read_bytes())
    late = replace(old, clock="wall", start_at=time.time() - 100, ready_by=time.time())
    killed_job.write_bytes(encode(late))
    outcome = _finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.dev_examples == 0
    assert outcome.metrics.final_loss is None
    assert "held-out loss: not measured" in (killed_job.parent / "export" / "README.md").read_text()
    assert any("as it is" in (line.message or "") for line in _progress(killed_job))


@pytest.fixture
def unverified(make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The job of a run that was killed when its export was on disk."""

    def killed(*_: object) -> str | None:
        raise KeyboardInterrupt  # passes through the pipeline, as a kill would

    job = make_job()
    with monkeypatch.context() as patch:
        patch.setattr(export, "verify", killed)
        with pytest.raises(KeyboardInterrupt):
            engine.main(job, Stop())
    return job


def _left(job: Path, seconds: float, **changes: Any) -> None:
    """Let the job have so much time left, on the wall clock."""
    old, now = decode_worker_job(job.read_bytes()), time.time()
    job.write_bytes(encode(replace(old, clock="wall", start_at=now - 100, ready_by=now + seconds, **changes)))


def test_an_export_that_nobody_could_verify_is_submitted_at_once_when_time_is_over(unverified: Path):
    job = unverified
    _left(job, 0.0)
    began = time.monotonic()
    outcome = _finish(job)
    assert time.monotonic() - began < 1.0
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.digest == folder_digest(job.parent / "export")

    for weights in job.parent.glob("export/*.safetensors"):  # not what was exported: the checkpoint is
        weights.write_bytes(b"damaged")
    outcome = _finish(job)
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is None


@pytest.mark.parametrize(
    ("left_s", "processes", "submits"), [(0.0, 0, True), (0.0, 2, True), (600.0, 0, False)]
)
def test_it_is_submitted_before_torch_is_imported(
    left_s: float, processes: int, submits: bool, unverified: Path, tmp_path: Path
):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('torch was imported')")
    _left(unverified, left_s, processes=processes)
    done = subprocess.run(
        [sys.executable, "-m", "trainer_node.engine", str(unverified)],
        env=ENVIRONMENT | {"PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        cwd=tmp_path,
    )
    if not submits:
        assert "torch was imported" in (unverified.parent / "worker.log").read_text()
        return
    assert done.returncode == 0, done.stderr
    outcome = _outcome(unverified)
    assert outcome.status is OutcomeStatus.READY
    assert outcome.digest == folder_digest(unverified.parent / "export")
    assert outcome.step > 0
    assert _progress(unverified)[-1].phase is Phase.DONE


def test_a_run_that_fails_keeps_the_checkpoint_that_is_being_written(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    def fails(run: Run, training: Training) -> None:
        training.step = 1
        save(training, run.reporter)
        raise RuntimeError("the device is gone")

    def slowly(*args: Any) -> None:
        time.sleep(0.5)
        write(*args)

    save, write = loop.save, checkpoint.save
    monkeypatch.setattr(engine, "descend", fails)
    monkeypatch.setattr(checkpoint, "save", slowly)
    job = make_job()
    assert _finish(job).status is OutcomeStatus.FAILED
    assert (job.parent / "checkpoints" / "step-00000001" / "manifest.json").exists()


@pytest.mark.parametrize("spoilt", [-3.0, math.nan])
@pytest.mark.parametrize("earlier", [True, False])
def test_weights_worse_than_the_base_model_are_not_submitted(
    spoilt: float, earlier: bool, make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    descend = engine.descend

    def spoil(run: Run, training: Training) -> None:
        descend(run, training)
        training.saver.wait()
        training.average = None
        for name, weight in training.deltas.parameters.items():
            if ".lora_B." in name:  # the opposite of what was learned, or no number
                weight.data.mul_(spoilt)
        if not earlier:
            for old in (run.folder / "checkpoints").glob("step-*"):
                shutil.rmtree(old)

    monkeypatch.setattr(engine, "descend", spoil)
    job = make_job(profile="lora_r16", ready_by=15.0)
    outcome = _finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    metrics, whole = outcome.metrics, max(line.step for line in _progress(job))
    assert metrics is not None
    assert metrics.final_loss is not None
    assert any("worse than the base" in (line.message or "") for line in _progress(job))
    if earlier:
        assert 0 < metrics.steps < whole
        assert metrics.final_loss < metrics.base_loss
    else:
        assert (metrics.steps, metrics.final_loss) == (0, metrics.base_loss)


def test_no_time_and_no_checkpoint_is_too_late(make_job: Callable[..., Path]):
    outcome = _finish(make_job(clock="wall", start_at=time.time() - 100, ready_by=time.time() - 1))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.TOO_LATE)


def test_a_late_start_without_a_checkpoint_is_too_late(make_job: Callable[..., Path]):
    outcome = _finish(make_job(clock="wall", start_at=time.time() - 1000, ready_by=time.time() + 0.01))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.TOO_LATE)


def test_a_resume_goes_on_from_its_tokens(killed_job: Path):
    (killed_job.parent / "rows.json").unlink()
    outcome = _finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None


@pytest.mark.parametrize(("rows", "why"), [(-20, "rows.json has changed"), (0, "rows.json holds no rows")])
def test_without_its_data_a_run_submits_what_it_has(killed_job: Path, rows: int, why: str):
    data = killed_job.parent / "rows.json"
    data.write_text(json.dumps(json.loads(data.read_text())[:rows]))
    (killed_job.parent / "tokens.safetensors").unlink()
    outcome = _finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.digest == folder_digest(killed_job.parent / "export")
    said = [line.message or "" for line in _progress(killed_job)]
    assert any(why in text and "submitted as it is" in text for text in said), said


def test_a_damaged_checkpoint_is_skipped_aloud(killed_job: Path):
    for weights in killed_job.parent.glob("checkpoints/*/weights.safetensors"):
        weights.write_bytes(b"damaged")
    outcome = _finish(killed_job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.resumes == 0
    assert any("damaged" in (line.message or "") for line in _progress(killed_job))


def test_bad_data_names_the_file(make_job: Callable[..., Path], tmp_path: Path):
    (tmp_path / "bad.json").write_text('[{"q": "a"')
    outcome = _finish(make_job(dataset=str(tmp_path / "bad.json")))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.BAD_DATA)
    assert "bad.json" in (outcome.error or "")


def test_an_unknown_model_is_unavailable(make_job: Callable[..., Path], tmp_path: Path):
    outcome = _finish(make_job(model_path=str(tmp_path / "no-model")))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.MODEL_UNAVAILABLE)
    assert "no-model" in (outcome.error or "")


def test_an_unknown_profile_is_unsupported(make_job: Callable[..., Path]):
    outcome = _finish(make_job(profile="best"))
    assert outcome.code is ErrorCode.UNSUPPORTED
    assert "maximum_accuracy" in (outcome.error or "")


def test_a_kind_of_task_without_objective_is_unsupported(make_job: Callable[..., Path]):
    outcome = _finish(make_job(task_type=TaskType.GRPO))
    assert (outcome.status, outcome.code) == (OutcomeStatus.FAILED, ErrorCode.UNSUPPORTED)
    assert "GrpoTask" in (outcome.error or "")
