"""Hardware as nvidia-smi and /proc show it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.errors import SettingsError
from shared.planning.hardware import machine_memory
from shared.settings import Settings
from trainer_node.hardware import detect, parse_gpus, short_name, threads_of_half

H100 = "{index}, NVIDIA H100 80GB HBM3, 81559, 1024, 37, GPU-{index}\n"


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
    idle = "5, NVIDIA H100 80GB HBM3, 81559, 0, [N/A], GPU-5\n"
    gpus = parse_gpus(H100.format(index=4) + idle + "error: lost\n")
    assert [(gpu.index, gpu.memory_used, gpu.utilization) for gpu in gpus] == [(4, 2**30, 0.37), (5, 0, None)]
    assert [gpu.uuid for gpu in gpus] == ["GPU-4", "GPU-5"]


def fake_smi(folder: Path, output: str) -> None:
    (folder / "nvidia-smi").write_text(
        f"#!/bin/sh\necho \"$@\" > {folder}/arguments\nprintf '%s' '{output}'\n"
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
    fake_smi(tmp_path, H100.format(index=0) + "1, NVIDIA L40S, 46068, 0, 0, GPU-1\n")
    with pytest.raises(SettingsError, match="H100, L40S"):
        await detect(Settings())
    fake_smi(tmp_path, "")
    with pytest.raises(SettingsError, match="PODIUM_GPUS=0"):
        await detect(Settings(gpus="0"))


async def test_without_gpus_it_is_a_share_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    hardware = await detect(Settings(hardware="cpu"))
    assert (hardware.name, hardware.count, hardware.memory_bytes) == ("cpu", 4, machine_memory()[0])
    assert threads_of_half(Settings(threads=3)) == 3


async def test_hardware_can_be_said() -> None:
    assert (await detect(Settings(hardware="4xH100-80GB"))).name == "4xH100-80GB"
    with pytest.raises(SettingsError, match="unknown hardware"):
        await detect(Settings(hardware="many"))
