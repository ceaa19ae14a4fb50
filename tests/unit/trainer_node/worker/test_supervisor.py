"""Worker processes for real: the lock they hold, adoption, the end of a group."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from shared.settings import Settings
from trainer_node.worker import slot_lock
from trainer_node.worker import supervisor as supervisor_module
from trainer_node.worker.run_folder import RunFolder
from trainer_node.worker.slot_lock import SlotLock
from trainer_node.worker.supervisor import Supervisor, WorkerFile, _kill_group

SLEEPER = "import sys, time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
# leaves a child in its group that inherited the lock
PARENT = "import os, time; print('up', flush=True); os.fork() or time.sleep(60); time.sleep(0.2); os._exit(3)"
QUICK_END = "import sys; sys.exit(4)"


def make(folder: Path, code: str) -> tuple[Supervisor, RunFolder]:
    settings = Settings(data_dir=str(folder / "data"), node_dir=str(folder), gpus="2,3", stop_grace_s=0.3)
    run = RunFolder(folder, "t")
    run.path.mkdir(parents=True, exist_ok=True)
    run.job_file.write_text("{}")
    return Supervisor(settings, 3, worker_command=(sys.executable, "-c", code)), run


async def started(folder: Path, code: str) -> tuple[Supervisor, RunFolder]:
    supervisor, run = make(folder, code)
    await supervisor.start(run, 1, 0)
    async with asyncio.timeout(60):
        while b"up" not in run.log_file.read_bytes():
            await asyncio.sleep(0.02)
    return supervisor, run


def events(folder: Path) -> list[str]:
    return [line.split('"')[3] for line in (folder / "slot.log").read_text().splitlines()]


async def test_the_lock_lasts_as_long_as_the_worker(tmp_path: Path) -> None:
    supervisor, _ = await started(tmp_path, SLEEPER)
    assert supervisor.lock.is_held()
    assert supervisor.worker is not None
    assert supervisor.lock.holders() == [supervisor.worker.file.pid]
    await supervisor.stop("test")
    assert not supervisor.lock.is_held()
    assert supervisor.worker.manner() == "the worker was killed by SIGTERM"
    assert events(tmp_path) == ["acquired", "released"]


async def test_each_worker_gets_an_empty_folder_for_temporary_files(tmp_path: Path) -> None:
    shows = "import os, tempfile, time; print('up', tempfile.mkdtemp(), os.listdir(os.environ['TMPDIR'])"
    supervisor, run = await started(tmp_path, f"{shows}, flush=True); time.sleep(60)")
    await supervisor.stop("test")
    run.log_file.unlink()
    await supervisor.start(run, 2, 0)
    async with asyncio.timeout(60):
        while not (run.log_file.exists() and b"]" in run.log_file.read_bytes()):
            await asyncio.sleep(0.02)
    await supervisor.stop("test")
    _, made, *listed = run.log_file.read_text().split()
    assert Path(made).parent == tmp_path / "tmp"
    assert (tmp_path / "tmp").stat().st_mode & 0o777 == 0o700
    assert listed == [f"['{Path(made).name}']"]


async def test_a_stubborn_worker_is_killed(tmp_path: Path) -> None:
    supervisor, _ = await started(tmp_path, STUBBORN)
    began = time.monotonic()
    await supervisor.stop("test")
    assert 0.3 <= time.monotonic() - began < 30
    assert supervisor.worker is not None
    assert supervisor.worker.manner() == "the worker was killed by SIGKILL"
    assert not supervisor.alive


async def test_children_don_t_outlive_their_worker(tmp_path: Path) -> None:
    supervisor, _ = await started(tmp_path, PARENT)
    worker = supervisor.worker
    assert worker is not None
    os.kill(worker.file.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        await worker.ended.wait()
        while supervisor.lock.is_held():
            await asyncio.sleep(0.02)
    assert supervisor.lock.holders() == []


async def test_a_worker_sees_its_gpus_and_threads(tmp_path: Path) -> None:
    names = "'CUDA_VISIBLE_DEVICES', 'CUDA_DEVICE_ORDER', 'OMP_NUM_THREADS'"
    code = f"import os; print('up', *(os.environ[name] for name in ({names})), os.getcwd())"
    supervisor, run = await started(tmp_path, code)
    assert supervisor.worker is not None
    async with asyncio.timeout(60):
        await supervisor.worker.ended.wait()
    assert run.log_file.read_text().split() == ["up", "2,3", "PCI_BUS_ID", "3", str(run.path)]


async def test_the_end_is_seen_at_once_and_the_child_is_reaped(tmp_path: Path) -> None:
    supervisor, run = make(tmp_path, QUICK_END)
    await supervisor.start(run, 1, 0)
    assert supervisor.worker is not None
    async with asyncio.timeout(60):
        await supervisor.worker.ended.wait()
    assert supervisor.worker.manner() == "the worker ended with exit code 4"
    with pytest.raises(ProcessLookupError):
        os.kill(supervisor.worker.file.pid, 0)


@pytest.mark.parametrize("known", [True, False])
async def test_another_life_adopts_and_can_stop_it(tmp_path: Path, known: bool) -> None:
    first, _ = await started(tmp_path, SLEEPER)
    assert first.worker is not None
    pid = first.worker.file.pid
    if not known:
        (tmp_path / "worker.json").unlink()
    second, _ = make(tmp_path, SLEEPER)
    await second.adopt()
    assert second.worker is not None
    assert (second.worker.file.pid, second.worker.file.task, second.alive) == (pid, "t", True)
    await second.stop("test")
    assert not second.lock.is_held()
    assert "adopted" in events(tmp_path)


async def test_without_a_holder_there_is_nothing_to_adopt_and_the_log_says_so(tmp_path: Path) -> None:
    supervisor, _ = make(tmp_path, SLEEPER)
    await supervisor.adopt()
    assert not (tmp_path / "slot.log").exists()
    supervisor.lock.record("acquired", 1, "t", 1)
    await supervisor.adopt()
    assert supervisor.worker is None
    assert events(tmp_path) == ["acquired", "released"]


async def test_a_recycled_process_id_is_not_adopted(tmp_path: Path) -> None:
    first, _ = await started(tmp_path, SLEEPER)
    assert first.worker is not None
    real = first.worker.file.pid
    text = (tmp_path / "worker.json").read_text()
    (tmp_path / "worker.json").write_text(text.replace(f'"pid":{real}', f'"pid":{os.getpid()}'))
    second, _ = make(tmp_path, SLEEPER)
    await second.adopt()
    assert second.worker is not None
    assert second.worker.file.pid == real
    await second.stop("test")


async def test_a_stranger_on_the_lock_is_removed(tmp_path: Path) -> None:
    descriptor = SlotLock(tmp_path).take()
    stranger = await asyncio.create_subprocess_exec("sleep", "60", pass_fds=(descriptor,))
    os.close(descriptor)
    supervisor, _ = make(tmp_path, SLEEPER)
    await supervisor.adopt()
    assert supervisor.worker is None
    assert await stranger.wait() == -signal.SIGKILL


async def test_the_next_worker_waits_for_the_lock(tmp_path: Path) -> None:
    supervisor, run = make(tmp_path, QUICK_END)
    descriptor = supervisor.lock.take()
    start = asyncio.create_task(supervisor.start(run, 1, 0))
    await asyncio.sleep(0.2)
    assert supervisor.worker is None
    os.close(descriptor)
    await start
    assert supervisor.worker is not None
    await supervisor.worker.ended.wait()


async def test_a_holder_that_can_not_be_killed_is_an_error_at_a_start_and_logged_at_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL does not end a process that hangs in a system call. The node logs that and tries again."""
    killed: list[int] = []
    monkeypatch.setattr(supervisor_module, "_kill", lambda pid, number=9: killed.append(pid))
    monkeypatch.setattr(supervisor_module, "ORPHANS_AFTER_S", 0.0)
    monkeypatch.setattr(slot_lock, "STUCK_S", 0.7)
    supervisor, run = make(tmp_path, SLEEPER)
    descriptor = supervisor.lock.take()
    stuck = await asyncio.create_subprocess_exec("sleep", "60", pass_fds=(descriptor,))
    os.close(descriptor)
    with capture_logs() as lines:
        async with asyncio.timeout(30):
            await supervisor.adopt()
    named = [line["pid"] for line in lines if "keeps the slot's lock" in line["event"]]
    assert named == [stuck.pid]
    assert 1 < len(killed) < 9  # every 50 ms it would be 14
    assert [line["event"] for line in lines][-1] == "the slot's lock is not free"
    async with asyncio.timeout(30):
        with pytest.raises(OSError, match=rf"slot\.lock is held .* \(killed, but alive: \[{stuck.pid}\]\)"):
            await supervisor._free_lock(0.0)
    stuck.kill()
    await stuck.wait()
    await supervisor.start(run, 1, 0)
    monkeypatch.undo()
    await supervisor.stop("test")


@pytest.mark.parametrize("content", [b'{"task": "\xff"}', b"\0" * 40, None], ids=["text", "zeros", "folder"])
async def test_a_worker_is_adopted_by_its_lock_if_its_file_is_damaged(
    content: bytes | None, tmp_path: Path
) -> None:
    supervisor, run = await started(tmp_path, SLEEPER)
    assert supervisor.worker is not None
    file = tmp_path / "worker.json"
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert supervisor.last_file() is None
    if content is not None:
        found = supervisor._find()
        assert found is not None
        assert (found.pid, found.task) == (supervisor.worker.file.pid, run.task)
    await supervisor.stop("test")


async def test_a_holder_that_ends_while_it_is_looked_at_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, _ = await started(tmp_path, SLEEPER)
    (tmp_path / "worker.json").unlink()

    def gone(pid: int) -> int:
        raise ProcessLookupError(3, "No such process")

    with monkeypatch.context() as patched:
        patched.setattr(os, "getsid", gone)
        assert supervisor._find() is None
    await supervisor.stop("test")


async def test_a_stop_returns_from_a_worker_that_can_not_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, _ = await started(tmp_path, STUBBORN)
    monkeypatch.setattr(supervisor_module, "_kill_group", lambda file: None)
    monkeypatch.setattr(supervisor_module, "STUCK_S", 0.2)
    async with asyncio.timeout(30):
        await supervisor.stop("test")
    assert supervisor.alive
    monkeypatch.undo()
    await supervisor.stop("test")
    assert not supervisor.alive


async def test_a_stop_that_waits_for_the_lock_does_not_kill_the_next_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Supervisor._free_lock, "__defaults__", (0.2,))
    supervisor, run = await started(tmp_path, SLEEPER)
    real, looks = supervisor.lock.is_held, list[bool]()

    def is_held() -> bool:
        looks.append(True)
        return len(looks) == 1 or real()  # the stop misses the moment in which it is free

    monkeypatch.setattr(supervisor.lock, "is_held", is_held)
    stop = asyncio.create_task(supervisor.stop("test"))
    while not looks:
        await asyncio.sleep(0.001)
    await asyncio.gather(stop, supervisor.start(run, 2, 0))
    await asyncio.sleep(0.5)
    assert supervisor.alive
    await supervisor.stop("test")


async def test_a_node_that_tests_the_lock_does_not_kill_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(supervisor_module, "_kill", lambda pid, number=9: killed.append(pid))
    supervisor, _ = make(tmp_path, SLEEPER)
    descriptor = supervisor.lock.take()
    asyncio.get_running_loop().call_later(0.3, os.close, descriptor)
    await supervisor._free_lock(0.0)
    assert killed == []


async def test_a_strangers_group_of_the_same_number_is_left_alone(tmp_path: Path) -> None:
    stranger = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
    file = WorkerFile(pid=stranger.pid, start_time=1, task="t", attempt=1, step=0, started_at=0.0)
    _kill_group(file)
    stranger.terminate()
    assert await stranger.wait() == -signal.SIGTERM  # not SIGKILL
