"""The node's side of the self-test: a process that is started, waited for and read."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.messages.hardware import Hardware
from shared.processes import kill
from shared.self_test import SlotHealth
from shared.settings import Settings
from trainer_node import self_test
from trainer_node.self_test import health_at_start, libraries, run_self_test, wanted

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
    assert await run_self_test(Settings(gpus="4,5"), GPUS, tmp_path, command=command) == SlotHealth()
    answer = (tmp_path / "self_test" / "rank-1.json").read_text()
    assert "4,5 PCI_BUS_ID none none none" in answer  # its own GPUs as they were detected; else a worker's


async def test_faults_are_named(tmp_path: Path) -> None:
    command = engine(tmp_path, ok="rank == 0", end="sys.exit(1)")
    (fault,) = (await run_self_test(Settings(gpus="0,1"), GPUS, tmp_path, command=command)).faults
    assert fault == "driver: 0,1 PCI_BUS_ID none none none (process 1)"


async def test_a_test_that_hangs_is_ended_and_named(tmp_path: Path) -> None:
    command = engine(tmp_path, running="'all_reduce'", end="time.sleep(600)")
    health = await run_self_test(Settings(), GPUS, tmp_path, command=command, limit_s=3.0)
    assert health.faults == ["all_reduce: no answer within 3 s (process 0, 1)"]


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
    health = await run_self_test(Settings(), CPU, tmp_path, command=command, limit_s=3.0)
    assert health.faults == ["driver: no answer within 3 s, and it can't be killed: the driver hangs"]
    assert await kill(started[0])


async def test_a_disk_that_can_t_be_written_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(self_test, "write_request", full)
    (fault,) = (await health_at_start(Settings(), CPU, tmp_path)).faults
    assert fault == "the self-test can't be run: [Errno 28] No space left on device"


async def test_a_test_that_does_not_start_is_a_fault(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit(3)")
    (fault,) = (await run_self_test(Settings(), CPU, tmp_path, command=command)).faults
    assert fault.startswith("the test did not start: the test ended with exit code 3, see ")


async def test_a_warning_is_no_fault(tmp_path: Path) -> None:
    command = engine(tmp_path, ok="True, 'warns': rank == 1")
    health = await run_self_test(Settings(gpus="0,1"), GPUS, tmp_path, command=command)
    assert health == SlotHealth(warnings=["driver: 0,1 PCI_BUS_ID none none none (process 1)"])


class Restarts:
    """A node that starts again and again; what it tests is kept."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.boot, self.driver = folder, folder / "boot_id", folder / "driver"
        self.health, self.tested = SlotHealth(), list[Hardware]()
        self.boot.write_text("first")
        monkeypatch.setattr(self_test, "BOOT_ID", self.boot)
        monkeypatch.setattr(self_test, "DRIVER", self.driver)
        monkeypatch.setattr(self_test, "run_self_test", self._run)

    async def _run(self, settings: Settings, hardware: Hardware, folder: Path) -> SlotHealth:
        self.tested.append(hardware)
        return self.health

    async def again(self, hardware: Hardware = GPUS) -> bool:
        """Start a node; whether it tests."""
        before = len(self.tested)
        assert await health_at_start(Settings(), hardware, self.folder) in (self.health, SlotHealth())
        return len(self.tested) > before


async def test_what_passed_is_not_tested_again_until_the_next_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Restarts(tmp_path, monkeypatch)
    assert await node.again()
    assert not await node.again()
    assert await node.again(CPU)
    node.boot.write_text("second")
    assert await node.again(CPU)
    assert node.tested == [GPUS, CPU, CPU]


@pytest.mark.parametrize(
    "health", [SlotHealth(faults=["kernels: wrong"]), SlotHealth(warnings=["kernels: slow"])]
)
async def test_what_was_found_is_not_remembered(
    health: SlotHealth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Restarts(tmp_path, monkeypatch)
    node.health = health
    assert await health_at_start(Settings(), GPUS, tmp_path) == health
    assert await node.again()


async def test_another_library_or_driver_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Restarts(tmp_path, monkeypatch)
    assert await node.again()
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in ("flash_attn_4-4.0", "nvidia_nccl_cu13-2.29", "torch-99.0"):
        folder = tmp_path / "site" / f"{name}.dist-info"
        folder.mkdir(parents=True)
        library, _, number = name.rpartition("-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {number}\n")
        assert await node.again(), name
        assert not await node.again(), name
    node.driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05")
    assert await node.again()
    assert not await node.again()
    node.driver.unlink()  # it was unloaded
    assert await node.again()


def test_the_libraries_are_those_that_compute() -> None:
    found = libraries()
    assert {"torch", "transformers"} <= set(found)
    assert not {"msgspec", "pytest", "podium"} & set(found)
    assert list(found) == sorted(found)


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
