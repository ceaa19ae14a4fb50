"""A process is known by its id and start time: ids are used again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from shared.processes import command_line, kill, start_time

NO_PID = 2**22 + 1  # above the largest id that Linux gives
SLEEP = (sys.executable, "-c", "import time; time.sleep(60)", "an argument, \u00e4")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def test_a_later_process_has_a_later_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    started, own = start_time(sleeper.pid), start_time(os.getpid())
    assert started is not None
    assert own is not None
    assert started > own
    assert start_time(sleeper.pid) == started


def test_the_arguments_of_a_process(sleeper: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 10
    while command_line(sleeper.pid) != list(SLEEP) and time.monotonic() < until:
        time.sleep(0.01)  # between fork and exec it has its parent's
    assert command_line(sleeper.pid) == list(SLEEP)


def test_a_process_that_ended_is_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its id is still taken
    assert start_time(sleeper.pid) is None
    assert start_time(NO_PID) is None
    assert command_line(NO_PID) == []


@pytest.mark.parametrize("group", [False, True])
async def test_a_killed_process_is_waited_for(group: bool) -> None:
    process = await asyncio.create_subprocess_exec(*SLEEP, start_new_session=True)
    assert await kill(process, group=group)
    assert process.returncode == -signal.SIGKILL
    assert await kill(process, group=group)


async def test_a_process_that_can_t_be_killed_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    process = await asyncio.create_subprocess_exec(*SLEEP)
    with monkeypatch.context() as patched:
        patched.setattr(asyncio.subprocess.Process, "kill", lambda _: None)  # as inside a driver that hangs
        assert not await kill(process, end_s=0.2)
    assert await kill(process)


def test_a_process_with_a_name_that_is_no_text_has_a_start_time() -> None:
    """The kernel cuts a name after 15 bytes, also inside a letter; an id may be such a stranger's now."""
    named = "open('/proc/self/comm', 'wb').write(b'\\xff) 1'); print(flush=True); input()"
    command = [sys.executable, "-c", named]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = start_time(process.pid)
        process.communicate(b"\n")
    assert found is not None
