"""Logs carry what is bound, go to standard error, and are JSON where asked."""

from __future__ import annotations

import asyncio
import errno
import json
import subprocess
import sys
from typing import TextIO, cast

from shared.logs import Outlet, Stamp, TroubleLog

SCRIPT = """
from shared.logs import get_logger, set_up_logs
set_up_logs({format!r}, "info", service="node", slot="a")
log = get_logger()
log.debug("unseen")
log.info("job started", task="t1", steps=3)
"""


def run(log_format: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(format=log_format)], capture_output=True, text=True, check=True
    )


def test_json_lines_with_what_is_bound() -> None:
    process = run("json")
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    entry = json.loads(line)
    assert entry["timestamp"].endswith("Z")
    assert {key: entry[key] for key in ("event", "level", "service", "slot", "task", "steps")} == {
        "event": "job started",
        "level": "info",
        "service": "node",
        "slot": "a",
        "task": "t1",
        "steps": 3,
    }


def test_console_lines_for_people() -> None:
    (line,) = run("console").stderr.splitlines()
    assert "job started" in line
    assert "task=t1" in line


class FullDisk:
    """A stream that refuses everything until there is room."""

    def __init__(self) -> None:
        self.room = False
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text if self.room else ""
        return len(text)

    def flush(self) -> None:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_log_lines_and_nothing_else() -> None:
    disk = FullDisk()
    outlet = Outlet(cast(TextIO, disk))
    outlet.write("one\n")
    outlet.write("two\n")
    disk.room = True
    outlet.write("three\n")
    outlet.write("four\n")
    assert disk.text == "\n[2 log lines could not be written before this one]\nthree\nfour\n"


def test_a_stamp_is_the_time_to_the_microsecond() -> None:
    times = iter([0, 1_999_999_999, 1_700_000_000_000_001_999, 1_700_000_000_123_456_789])
    stamp = Stamp(lambda: next(times))
    assert [stamp(None, "info", {})["timestamp"] for _ in range(4)] == [
        "1970-01-01T00:00:00.000000Z",
        "1970-01-01T00:00:01.999999Z",
        "2023-11-14T22:13:20.000001Z",
        "2023-11-14T22:13:20.123456Z",
    ]


async def test_lines_of_one_turn_of_the_loop_are_written_together() -> None:
    written: list[str] = []

    class Stream:
        def write(self, text: str) -> None:
            written.append(text)

        def flush(self) -> None: ...

    outlet = Outlet(cast(TextIO, Stream()))
    outlet.write("one\n")
    outlet.write("two\n")
    assert written == []
    await asyncio.sleep(0)
    assert written == ["one\ntwo\n"]
    outlet.write("three\n")
    await asyncio.to_thread(outlet.write, "from a thread\n")  # what waits goes first
    assert "".join(written) == "one\ntwo\nthree\nfrom a thread\n"


def test_the_same_trouble_is_new_once_until_it_is_over() -> None:
    trouble, lasted = TroubleLog(), list[bool]()
    lasted.append(trouble.lasts)
    errors = [OSError("full"), OSError("full"), OSError("gone"), OSError("full")]
    assert [trouble.is_new(error) for error in errors] == [True, False, True, True]
    lasted.append(trouble.lasts)
    trouble.over()
    lasted.append(trouble.lasts)
    assert trouble.is_new(OSError("full"))
    assert lasted == [False, True, False]
