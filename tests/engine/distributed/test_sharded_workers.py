"""Workers of two gloo processes: decisions of one, files whatever is killed, and nobody left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shared.messages.hardware import Hardware
from shared.messages.runs import Outcome, OutcomeStatus
from shared.net import LOOPBACK, free_port
from tests.engine.worker_run import ENVIRONMENT, outcome_of, progress_of, weights_of
from trainer_node.engine.distributed import launch
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.oom_fallback import OUT_OF_MEMORY
from trainer_node.worker.slot_lock import SlotLock

WAIT_S = 120.0
# A worker is three Python processes here: on two busy cores it takes many seconds to start.


def slow(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts whole workers."""
    return pytest.mark.slow(pytest.mark.timeout(400)(test))


def test_a_process_per_gpu_and_one_on_a_cpu(make_job: Callable[..., Path]) -> None:
    assert launch.world_of(make_job()) == 1
    assert launch.world_of(make_job(processes=2)) == 2
    assert launch.world_of(make_job(hardware=Hardware(device="H100", count=4, memory_bytes=2**36))) == 4
    damaged = make_job()
    damaged.write_bytes(b'{"task": "\xff"}')
    assert launch.world_of(damaged) == 1  # and that one says what is wrong


@pytest.fixture
def start(tmp_path: Path, make_job: Callable[..., Path]) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts a worker of two processes in a folder; a second start goes on there."""

    def begin(name: str, *, fds: tuple[int, ...] = (), **changes: Any) -> subprocess.Popen[bytes]:
        path = make_job(name, **{"processes": 2, **changes})
        (path.parent / "outcome.json").unlink(missing_ok=True)
        with (path.parent / "worker.log").open("ab") as log:
            return subprocess.Popen(
                launch.command(path),
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
                pass_fds=fds,
                start_new_session=True,
            )

    return begin


@slow
def test_killed_ranks_end_the_worker_and_the_next_start_is_bit_equal(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    worker = start("rough")
    _wait_for_checkpoint(rough, worker)
    os.kill(_ranks(worker)[1], signal.SIGKILL)
    killed = time.monotonic()
    assert worker.wait(WAIT_S) != 0
    assert time.monotonic() - killed < 30.0
    assert _alive(rough) == []
    assert not (rough / "outcome.json").exists()

    worker = start("rough")
    _wait_for_checkpoint(rough, worker)
    worker.kill()  # the parent: its ranks die with it
    worker.wait()
    until = time.monotonic() + 5.0
    while _alive(rough) and time.monotonic() < until:
        time.sleep(0.05)
    assert _alive(rough) == []

    worker = start("rough")
    _wait_for_checkpoint(rough, worker)
    worker.terminate()
    assert worker.wait(WAIT_S) == 0
    assert _alive(rough) == []
    stopped = _outcome(rough)
    assert stopped.status is OutcomeStatus.STOPPED
    assert (rough / "checkpoints" / f"step-{stopped.step:08d}" / "manifest.json").exists()

    assert start("rough").wait(WAIT_S) == start("calm").wait(WAIT_S) == 0
    found, wanted = _outcome(rough), _outcome(calm)
    assert found.status is wanted.status is OutcomeStatus.READY, (found.error, wanted.error)
    assert found.metrics is not None
    assert wanted.metrics is not None
    assert found.metrics.resumes == 3
    assert found.metrics.final_loss == wanted.metrics.final_loss
    assert weights_of(rough / "job.json") == weights_of(calm / "job.json")
    assert any(
        "2 processes train together, by ddp" in (line.message or "")
        for line in progress_of(calm / "job.json")
    )


@slow
@pytest.mark.parametrize("kl_coefficient", [0.0, 1.0])
def test_another_number_of_processes_goes_on_with_the_same_data(
    kl_coefficient: float, start: Callable[..., subprocess.Popen[bytes]], killed: Path, tmp_path: Path
) -> None:
    """Two processes by DDP, killed; two by FSDP2, stopped; one to the end: as if one had done it all."""
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    start = partial(start, kl_coefficient=kl_coefficient)
    # After 100 steps sums in another order make a difference of .001 to .002 in bf16, of 2e-7 in fp32.
    for folder in (calm, rough):
        _copy_with_plan(killed, folder, dtype="float32")
    worker = start("rough")
    _wait_for_checkpoint(rough, worker)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    plan = json.loads((rough / "plan.json").read_text())
    assert (plan["parallel"], plan["devices"], plan["dtype"]) == ("ddp", 2, "float32")
    (rough / "plan.json").write_text(json.dumps(plan | {"parallel": "fsdp2"}))
    (rough / "base_states.json").unlink(missing_ok=True)  # then both ask the base model again
    worker = start("rough")
    _wait_for_checkpoint(rough, worker)
    worker.terminate()
    assert worker.wait(WAIT_S) == 0
    stopped = _outcome(rough)
    assert (rough / "checkpoints" / f"step-{stopped.step:08d}" / "manifest.json").exists()
    assert start("rough", processes=1).wait(WAIT_S) == start("calm", processes=1).wait(WAIT_S) == 0
    found, wanted = _outcome(rough).metrics, _outcome(calm).metrics
    assert found is not None
    assert wanted is not None
    assert (found.steps, found.tokens) == (wanted.steps, wanted.tokens)
    assert stopped.step is not None
    assert stopped.step < found.steps
    assert found.final_loss == pytest.approx(wanted.final_loss, abs=1e-5)


@slow
def test_sharded_to_the_end_with_the_lock_held_by_every_process(
    start: Callable[..., subprocess.Popen[bytes]], killed: Path, tmp_path: Path
) -> None:
    """Choose, export and verify from shards; by a plan that had to shrink before there was a checkpoint."""
    run = tmp_path / "run"
    plan = _copy_with_plan(killed, run, parallel="fsdp2", devices=2, activation_checkpointing=True)
    with (tmp_path / "slot.lock").open("w") as file:
        worker = start("run", fds=(file.fileno(),))
    _wait_for_checkpoint(run, worker)
    holding = SlotLock(tmp_path).holders()
    holders = [pid for pid in [worker.pid, *_ranks(worker)] if pid in holding]
    assert len(holders) == 3
    assert worker.wait(WAIT_S) == 0
    outcome = _outcome(run)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.final_loss < 0.9 * outcome.metrics.base_loss
    assert not any("refused" in (line.message or "") for line in progress_of(run / "job.json"))
    assert json.loads((run / "plan.json").read_text()) == plan


@slow
def test_sharded_and_killed_in_the_middle_of_a_save_it_goes_on_from_the_one_before(
    start: Callable[..., subprocess.Popen[bytes]], killed: Path, tmp_path: Path
) -> None:
    """Each process writes its own rows; whatever of that a kill leaves, the next start ends bit-equal."""
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    for folder in (calm, rough):
        _copy_with_plan(killed, folder, parallel="fsdp2", devices=2)  # as that of a large model would be
    halves = 0
    for _ in range(3):
        worker = start("rough", checkpoint_interval_s=0.5)
        _wait_for_checkpoint(rough, worker)
        _wait_for_a_save(rough, worker)
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
        halves += bool(list((rough / "checkpoints").glob(".tmp-*")))
        found = checkpoint.newest(rough / "checkpoints", pytest.fail)
        assert found is not None
        assert set(found.manifest.files) >= {f"weights.0000{rank}-of-00002.safetensors" for rank in (0, 1)}
    assert halves
    assert start("rough").wait(WAIT_S) == start("calm").wait(WAIT_S) == 0
    assert _outcome(rough).status is _outcome(calm).status is OutcomeStatus.READY
    assert weights_of(rough / "job.json") == weights_of(calm / "job.json")


@slow
def test_torchrun_starts_it_too(make_job: Callable[..., Path]) -> None:
    path = make_job(ready_by=6.0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port"]
    command = [*torchrun, str(free_port()), "-m", "trainer_node.engine", str(path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert _outcome(path.parent).status is OutcomeStatus.READY
    assert json.loads((path.parent / "plan.json").read_text())["parallel"] == "ddp"


@slow
def test_what_all_ranks_fail_at_is_said_once(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    worker = start("run", model_path=str(tmp_path / "no-model"))
    assert worker.wait(WAIT_S) == 1
    outcome = _outcome(tmp_path / "run")
    assert outcome.status is OutcomeStatus.FAILED
    assert "no-model" in (outcome.error or "")


@slow
def test_all_ranks_start_again_when_their_meeting_place_is_taken(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some other program may take the port before rank 0 listens there."""
    job = make_job("run", processes=2, model_path=str(tmp_path / "no-model"))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with socket.create_server((LOOPBACK, 0)) as other:
        ports = [other.getsockname()[1], free_port()]
        monkeypatch.setattr(launch, "free_port", partial(ports.pop, 0))
        for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
            monkeypatch.setenv(name, ENVIRONMENT[name])
        assert launch.Ranks(launch.command(job), 2).run() == 1
    for number, handler in before.items():
        signal.signal(number, handler)
    assert "no-model" in (_outcome(job.parent).error or "")
    assert ports == []


def _outcome(folder: Path) -> Outcome:
    return outcome_of(folder / "job.json")


def _copy_with_plan(killed: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """A job that is planned, and whose next start begins with a changed plan: this one."""
    shutil.copytree(killed, folder, ignore=shutil.ignore_patterns("checkpoints", "base_states.json"))
    plan = json.loads((folder / "plan.json").read_text()) | changes
    plan["deviations"].append({"what": "", "wanted": "", "got": "", "reason": OUT_OF_MEMORY})
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def _wait_for_checkpoint(folder: Path, worker: subprocess.Popen[bytes]) -> None:
    """Until there is a checkpoint that wasn't there when this was called."""
    before, until = set((folder / "checkpoints").glob("step-*")), time.monotonic() + WAIT_S
    while not set((folder / "checkpoints").glob("step-*")) - before:
        assert worker.poll() is None, (folder / "worker.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.01)


def _wait_for_a_save(folder: Path, worker: subprocess.Popen[bytes]) -> None:
    """Until one is being written."""
    until = time.monotonic() + WAIT_S
    while not list((folder / "checkpoints").glob(".tmp-*/*")):
        assert worker.poll() is None, (folder / "worker.log").read_text()
        assert time.monotonic() < until


def _ranks(worker: subprocess.Popen[bytes]) -> list[int]:
    """The worker's children, rank by rank."""
    return [int(pid) for pid in Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()]


def _alive(folder: Path) -> list[str]:
    """Processes that work on a folder's job."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder / "job.json").encode() in (place / "cmdline").read_bytes():
                found.append(place.name)
        except OSError:
            continue
    return found
