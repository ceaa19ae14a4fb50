"""Logs carry what is bound, go to standard error, and are JSON where asked."""

from __future__ import annotations

import json
import subprocess
import sys

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
