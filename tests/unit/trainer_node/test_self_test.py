"""The node's side of the self-test: a process that is started, waited for and read."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.messages import Hardware
from shared.processes import kill
from shared.settings import Settings
from trainer_node import self_test
from trainer_node.self_test import faults_at_start, run_self_test, wanted

GPUS = Hardware(device="H100", count=2, memory_bytes=80 * 2**30)
CPU = Hardware(device="cpu", count=2, memory_bytes=2**30)

ENGINE = """
import json, os, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
processes = json.loads((folder / "request.json").read_text())["processes"]
names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PODIUM_NATS_URL", "HF_TOKEN", "LIBRARY")
what = " ".join(os.environ.get(name, "none") for name in names)
for rank in range(processes):
    result = {"name": "driver", "ok": OK, "what": what, "seconds": 0.1}
    (folder / f"rank-{rank}.json").write_text(json.dumps({"results": [result], "running": RUNNING}))
END
"""


def engine(folder: Path, ok: str = "True", running: str = "None", end: str = "") -> tuple[str, ...]:
    path = folder / "engine.py"
    path.write_text(ENGINE.replace("OK", ok).replace("RUNNING", running).replace("END", end))
    return (sys.executable, str(path))


async def test_a_healthy_slot_has_no_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PODIUM_NATS_URL", "HF_TOKEN", "LIBRARY"):
        monkeypatch.setenv(name, "secret")
    command = engine(tmp_path)
    assert await run_self_test(Settings(gpus="4,5"), GPUS, tmp_path, command=command) == []
    answer = (tmp_path / "self_test" / "rank-1.json").read_text()
    assert "4,5 PCI_BUS_ID none none none" in answer  # its own GPUs as they were detected; else a worker's


async def test_faults_are_named(tmp_path: Path) -> None:
    command = engine(tmp_path, ok="rank == 0", end="sys.exit(1)")
    (fault,) = await run_self_test(Settings(gpus="0,1"), GPUS, tmp_path, command=command)
    assert fault == "driver: 0,1 PCI_BUS_ID none none none (process 1)"


async def test_a_test_that_hangs_is_ended_and_named(tmp_path: Path) -> None:
    command = engine(tmp_path, running="'all_reduce'", end="time.sleep(600)")
    faults = await run_self_test(Settings(), GPUS, tmp_path, command=command, limit_s=3.0)
    assert faults == ["all_reduce: no answer within 3 s (process 0, 1)"]


async def test_a_test_that_can_t_be_killed_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def remember(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        started.append(await start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", remember)
    monkeypatch.setattr(os, "killpg", lambda pid, number: None)  # as inside a driver that hangs
    command = engine(tmp_path, running="'driver'", end="time.sleep(600)")
    faults = await run_self_test(Settings(), CPU, tmp_path, command=command, limit_s=3.0)
    assert faults == ["driver: no answer within 3 s, and it can't be killed: the driver hangs"]
    assert await kill(started[0])


async def test_a_disk_that_can_t_be_written_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(self_test, "write_request", full)
    (fault,) = await faults_at_start(Settings(), CPU, tmp_path)
    assert fault == "the self-test can't be run: [Errno 28] No space left on device"


async def test_a_test_that_does_not_start_is_a_fault(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit(3)")
    (fault,) = await run_self_test(Settings(), CPU, tmp_path, command=command)
    assert fault.startswith("the test did not start: the test ended with exit code 3, see ")


async def test_what_passed_is_not_tested_again_until_the_next_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot, faults, tests = tmp_path / "boot_id", ["kernels: wrong"], list[Hardware]()

    async def run(settings: Settings, hardware: Hardware, folder: Path) -> list[str]:
        tests.append(hardware)
        return faults

    boot.write_text("first")
    monkeypatch.setattr(self_test, "BOOT_ID", boot)
    monkeypatch.setattr(self_test, "run_self_test", run)
    assert await faults_at_start(Settings(), GPUS, tmp_path) == ["kernels: wrong"]
    faults = []
    assert await faults_at_start(Settings(), GPUS, tmp_path) == []  # a fault is not remembered
    assert await faults_at_start(Settings(), GPUS, tmp_path) == []
    assert len(tests) == 2
    assert await faults_at_start(Settings(), CPU, tmp_path) == []
    boot.write_text("second")
    assert await faults_at_start(Settings(), CPU, tmp_path) == []
    assert tests == [GPUS, GPUS, CPU, CPU]


@pytest.mark.parametrize(
    ("setting", "hardware", "tested"),
    [
        ("auto", GPUS, True),
        ("auto", CPU, False),
        ("on", CPU, True),
        ("off", GPUS, False),
    ],
)
def test_which_slots_are_tested(setting: str, hardware: Hardware, tested: bool) -> None:
    assert wanted(Settings(self_test=setting), hardware) is tested
    assert os.environ.get("PODIUM_SELF_TEST") is None
