"""Supervision of real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from podium.local.process import ManagedProcess, Spec
from shared.errors import PodiumError
from shared.processes import start_time

SLEEP = "import time; time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


def service(folder: Path, code: str, said: list[str], **fields: object) -> ManagedProcess:
    spec = msgspec.convert({"name": "x", "command": [sys.executable, "-c", code], **fields}, Spec)
    return ManagedProcess(spec, folder, said.append)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_killed_service_is_started_again_and_stops_when_told(tmp_path: Path) -> None:
    said: list[str] = []
    sleeper = service(tmp_path, SLEEP, said)
    task = asyncio.create_task(sleeper.supervise())
    await until(lambda: sleeper.pid is not None)
    first = sleeper.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: sleeper.pid != first)
    assert sleeper.restarts == 1
    assert "x was killed by SIGKILL; restarting in" in said[0]
    sleeper.stop()
    await asyncio.wait_for(task, 60)
    assert sleeper.pid is not None
    assert start_time(sleeper.pid) is None
    assert not sleeper.pid_file.exists()


async def test_one_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    said: list[str] = []
    deaf = service(tmp_path, DEAF + "#", said, stop_s=0.3)
    task = asyncio.create_task(deaf.supervise())
    await until(lambda: deaf.pid is not None)
    await asyncio.sleep(0.3)  # until it ignores SIGTERM
    deaf.stop()
    await asyncio.wait_for(task, 60)
    assert deaf.pid is not None
    assert start_time(deaf.pid) is None


async def test_stop_between_two_starts_ends_supervision(tmp_path: Path) -> None:
    said: list[str] = []
    failing = service(tmp_path, "raise SystemExit(1)", said)
    task = asyncio.create_task(failing.supervise())
    await until(lambda: len(said) >= 2)  # the pause has grown to a second
    failing.stop()
    await asyncio.wait_for(task, 60)


async def test_one_whose_pid_file_can_not_be_written_is_not_left_running(tmp_path: Path) -> None:
    sleeper = service(tmp_path, SLEEP, [])
    sleeper.pid_file.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        await asyncio.wait_for(sleeper.supervise(), 60)
    assert sleeper.pid is not None
    assert start_time(sleeper.pid) is None


async def test_one_whose_watch_fails_is_not_left_running(tmp_path: Path) -> None:
    async def watch() -> str:
        raise OSError("no socket is left")

    sleeper = service(tmp_path, SLEEP, [])
    sleeper.watch = watch
    with pytest.raises(OSError, match="no socket"):
        await asyncio.wait_for(sleeper.supervise(), 60)
    assert sleeper.pid is not None
    assert start_time(sleeper.pid) is None


async def test_cancelled_supervision_leaves_nothing_running(tmp_path: Path) -> None:
    sleeper = service(tmp_path, SLEEP, [])
    task = asyncio.create_task(sleeper.supervise())
    await until(lambda: sleeper.pid is not None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 60)
    assert sleeper.pid is not None
    assert start_time(sleeper.pid) is None


async def test_bad_settings_end_it_with_the_services_own_words(tmp_path: Path) -> None:
    wrong = service(tmp_path, "import sys; print('slot is odd', file=sys.stderr); sys.exit(2)", [])
    with pytest.raises(PodiumError, match="x can't start: slot is odd"):
        await asyncio.wait_for(wrong.supervise(), 60)


async def test_the_socket_arrives_as_descriptor_three(tmp_path: Path) -> None:
    code = (
        "import os, socket\n"
        "print(socket.socket(fileno=3).getsockname()[1], os.environ['LISTEN_FDS'], flush=True)"
    )
    listening = socket.create_server(("127.0.0.1", 0))
    passed = service(tmp_path, f"{code}\n{SLEEP}", [])
    passed.socket = listening.fileno()
    task = asyncio.create_task(passed.supervise())
    await until(lambda: passed.log.exists() and passed.log.read_bytes().endswith(b"\n"))
    assert passed.log.read_text().split() == [str(listening.getsockname()[1]), "1"]
    passed.stop()
    await task
    listening.close()


async def test_settings_of_the_shell_do_not_reach_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PODIUM_ARTIFACTS_DIR", "elsewhere")
    monkeypatch.setenv("LISTEN_FDS", "1")
    code = (
        "import os; print(sorted(k for k in os.environ if k.startswith(('PODIUM_', 'LISTEN_'))), flush=True)"
    )
    clean = service(tmp_path, f"{code}\n{SLEEP}", [], environment={"PODIUM_SLOT": "a"})
    task = asyncio.create_task(clean.supervise())
    await until(lambda: clean.log.exists() and clean.log.read_bytes().endswith(b"\n"))
    assert clean.log.read_text().strip() == "['PODIUM_SLOT']"
    clean.stop()
    await task


async def test_what_an_earlier_launcher_left_is_taken_down(tmp_path: Path) -> None:
    left = await asyncio.create_subprocess_exec(sys.executable, "-c", SLEEP)
    said: list[str] = []
    new = service(tmp_path, SLEEP, said)
    new.pid_file.parent.mkdir(parents=True)
    new.pid_file.write_text(f'{{"pid": {left.pid}, "start_time": {start_time(left.pid)}}}')
    await new.stop_leftover()
    assert await asyncio.wait_for(left.wait(), 60) == -signal.SIGTERM
    assert "still runs" in said[0]


async def test_a_reused_process_id_is_left_alone(tmp_path: Path) -> None:
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", SLEEP)
    new = service(tmp_path, SLEEP, [])
    new.pid_file.parent.mkdir(parents=True)
    new.pid_file.write_text(f'{{"pid": {other.pid}, "start_time": 1}}')
    await new.stop_leftover()
    assert start_time(other.pid) is not None
    other.kill()
    await other.wait()


async def test_a_damaged_pid_file_counts_as_absent_and_an_unreadable_one_is_named(tmp_path: Path) -> None:
    new = service(tmp_path, SLEEP, [])
    new.pid_file.parent.mkdir(parents=True)
    for content in (b"", b"\0" * 30, b'{"pid": "\xff"}', b'{"x": ' + b"[" * 100_000):
        new.pid_file.write_bytes(content)
        await new.stop_leftover()
    new.pid_file.unlink()
    new.pid_file.mkdir()
    with pytest.raises(PodiumError, match="json can't be read: Is a directory"):
        await new.stop_leftover()
