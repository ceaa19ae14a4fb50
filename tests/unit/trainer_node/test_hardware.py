"""Hardware as nvidia-smi and /proc show it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.errors import SettingsError
from shared.planning import hardware as planning_hardware
from shared.planning.control_group import MemoryLimit
from shared.planning.hardware import machine_memory, usable_memory
from shared.settings import Settings
from trainer_node import hardware as module
from trainer_node.engine.memory.main_memory import most_for_checkpoints, most_for_copy
from trainer_node.hardware import detect, parse_gpus, pci_gpus, short_name, visible_gpus, worker_threads

H100 = "{index}, NVIDIA H100 80GB HBM3, 81559, 1024, 37, GPU-{index}, 41, 312.50, 700.00\n"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("Tesla T4", "T4"),
    ],
)
def test_names_are_shortened(name: str, short: str) -> None:
    assert short_name(name) == short


def test_gpus_are_read_and_what_is_not_known_is_left_open() -> None:
    idle = "5, NVIDIA H100 80GB HBM3, 81559, 0, [N/A], GPU-5, [N/A], [Not Supported], [N/A]\n"
    gpus = parse_gpus(H100.format(index=4) + idle + "error: lost\n")
    assert [(gpu.index, gpu.memory_used, gpu.utilization) for gpu in gpus] == [(4, 2**30, 0.37), (5, 0, None)]
    assert [gpu.uuid for gpu in gpus] == ["GPU-4", "GPU-5"]
    assert [(gpu.temperature_c, gpu.power_w, gpu.power_limit_w) for gpu in gpus] == [
        (41.0, 312.5, 700.0),
        (None, None, None),
    ]


def fake_smi(folder: Path, output: str, then: str = "") -> None:
    (folder / "nvidia-smi").write_text(
        f"#!/bin/sh\necho \"$@\" >> {folder}/arguments\nprintf '%s' '{output}'\n{then}\n"
    )
    (folder / "nvidia-smi").chmod(0o755)


async def test_the_halfs_gpus_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake_smi(tmp_path, "".join(H100.format(index=index) for index in range(4, 8)))
    hardware = await detect(Settings(gpus="4,5,6,7"))
    assert hardware.name == "4xH100-80GB"
    assert "-i 4,5,6,7" in (tmp_path / "arguments").read_text()


async def test_gpus_that_differ_or_are_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake_smi(tmp_path, H100.format(index=0) + "1, NVIDIA L40S, 46068, 0, 0, GPU-1, 30, 60, 350\n")
    with pytest.raises(SettingsError, match="H100, L40S"):
        await detect(Settings())
    fake_smi(tmp_path, "")
    with pytest.raises(SettingsError, match="PODIUM_GPUS=0"):
        await detect(Settings(gpus="0"))


async def test_inherited_gpus_are_the_ones_that_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    fake_smi(tmp_path, "".join(H100.format(index=index) for index in range(4, 8)))
    assert (await detect(Settings())).name == "4xH100-80GB"
    assert "-i 4,5,6,7" in (tmp_path / "arguments").read_text()


@pytest.mark.parametrize(
    ("gpus", "inherited", "wanted"),
    [
        (None, None, None),
        ("0,1", "4,5", "0,1"),
        (None, " 4, 5", "4,5"),
        (None, "GPU-8a1f,GPU-77b0", "GPU-8a1f,GPU-77b0"),
        (None, "", ""),
        (None, "-1", ""),
        (None, "2,-1,3", "2"),
    ],
)
def test_the_visible_gpus(gpus: str | None, inherited: str | None, wanted: str | None) -> None:
    environment = {} if inherited is None else {"CUDA_VISIBLE_DEVICES": inherited}
    assert visible_gpus(gpus, environment) == wanted


async def test_hidden_gpus_make_it_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fake_smi(tmp_path, H100.format(index=0))
    assert (await detect(Settings())).device == "cpu"
    assert not (tmp_path / "arguments").exists()


def test_slices_of_a_gpu_must_be_named() -> None:
    with pytest.raises(SettingsError, match="PODIUM_HARDWARE="):
        visible_gpus(None, {"CUDA_VISIBLE_DEVICES": "MIG-5c89"})


@pytest.mark.parametrize("then", ["exit 9", "exec sleep 30"])
async def test_gpus_that_can_t_be_listed_don_t_become_a_cpu(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(module, "QUERY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(module, "DRIVER", tmp_path / "version")
    fake_smi(tmp_path, "Unable to determine the device handle", then)
    (tmp_path / "version").touch()
    with pytest.raises(SettingsError, match=r"NVIDIA driver, but nvidia-smi .*PODIUM_HARDWARE=cpu"):
        await detect(Settings())
    assert len((tmp_path / "arguments").read_text().splitlines()) == module.QUERY_TRIES
    (tmp_path / "version").unlink()  # the tool without a driver
    assert (await detect(Settings())).device == "cpu"


async def test_a_query_that_can_t_be_killed_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that hangs keeps nvidia-smi in the kernel, where no signal ends it."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(module, "QUERY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(module, "DRIVER", tmp_path / "version")
    asked: list[asyncio.subprocess.Process] = []
    monkeypatch.setattr(asyncio.subprocess.Process, "kill", lambda process: asked.append(process))
    (tmp_path / "version").touch()
    fake_smi(tmp_path, "", "exec sleep 60")
    with pytest.raises(SettingsError, match="hangs inside the driver and can't be killed"):
        await detect(Settings())
    (process,) = asked  # it was not tried again
    process.send_signal(signal.SIGKILL)
    await process.communicate()


def pci_device(folder: Path, number: int, vendor: str, kind: str) -> None:
    device = folder / f"0000:0{number}:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


@pytest.fixture
def without_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two NVIDIA GPUs, a sound device of one and another vendor's GPU; no nvidia-smi."""
    for number, (vendor, kind) in enumerate(
        [("0x10de", "0x030200"), ("0x10de", "0x030000"), ("0x10de", "0x040300"), ("0x1234", "0x030000")]
    ):
        pci_device(tmp_path / "pci", number, vendor, kind)
    monkeypatch.setattr(module, "PCI", tmp_path / "pci")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "pci"


async def test_a_machine_whose_driver_is_gone_does_not_become_a_cpu(without_driver: Path) -> None:
    assert pci_gpus(without_driver) == 2
    with pytest.raises(
        SettingsError, match=r"has 2 NVIDIA GPU\(s\) and no driver that works.*PODIUM_HARDWARE=cpu"
    ):
        await detect(Settings())
    assert (await detect(Settings(hardware="cpu"))).device == "cpu"
    assert (await detect(Settings(gpus=""))).device == "cpu", "it was said that there are none"


async def test_hardware_gpu_is_never_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PCI", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (await detect(Settings())).device == "cpu"
    with pytest.raises(SettingsError, match=r"PODIUM_HARDWARE=gpu, and no GPU can be used here"):
        await detect(Settings(hardware="gpu"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake_smi(tmp_path, "".join(H100.format(index=index) for index in range(2)))
    assert (await detect(Settings(hardware="gpu"))).name == "2xH100-80GB"


async def test_without_gpus_it_is_a_share_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    hardware = await detect(Settings(hardware="cpu"))
    assert (hardware.name, hardware.count, hardware.memory_bytes) == ("cpu", 4, machine_memory()[0])
    assert worker_threads(Settings(threads=3)) == 3


async def test_plan_and_copies_of_a_cpu_slot_fit_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = machine_memory()[0] // 4
    monkeypatch.setattr(planning_hardware, "memory_limits", lambda: [MemoryLimit(limit, 0)])
    cpu = await detect(Settings(hardware="cpu", own_memory_limit=True))
    job: Any = SimpleNamespace(hardware=cpu)
    copies = most_for_checkpoints(job) + 4 * most_for_copy(job)  # of the table in main_memory.py
    assert usable_memory(cpu) + copies <= limit


async def test_hardware_can_be_said() -> None:
    assert (await detect(Settings(hardware="4xH100-80GB"))).name == "4xH100-80GB"
    with pytest.raises(SettingsError, match="unknown hardware"):
        await detect(Settings(hardware="many"))
