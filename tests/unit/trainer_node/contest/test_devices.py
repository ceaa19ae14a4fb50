"""The hardware of a container: as stated, as nvidia-smi says, else as the driver lists it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shared.errors import SettingsError
from shared.messages.hardware import Hardware
from shared.settings import Settings
from trainer_node.contest import devices
from trainer_node.contest.devices import from_driver, hardware_of
from trainer_node.hardware import detect


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """The driver's list of four GPUs."""
    for number in range(4):
        folder = tmp_path / "gpus" / f"0000:{number:02d}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   190\n")
    return tmp_path / "gpus"


async def without_tools(settings: Settings) -> Hardware:
    """What `detect` does where the image got no nvidia-smi that works."""
    if settings.hardware == "auto":
        raise SettingsError("there is an NVIDIA driver, but nvidia-smi failed")
    return await detect(settings)


async def without_driver(settings: Settings) -> Hardware:
    return Hardware(device="cpu", count=1, memory_bytes=1 << 30)


def test_gpus_from_the_drivers_list(listed: Path, tmp_path: Path) -> None:
    assert from_driver(tmp_path / "none") is None
    found = from_driver(listed)
    assert found is not None
    assert (found.device, found.count) == ("H100", 4)
    assert found.memory_bytes > 79 * 2**30 * 0.9


@pytest.mark.parametrize("detecting", [without_tools, without_driver])
def test_gpus_that_nvidia_smi_does_not_show(
    detecting: object, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "detect", detecting)
    found = asyncio.run(hardware_of(Settings(), listed))
    assert (found.device, found.count) == ("H100", 4)
    found = asyncio.run(hardware_of(Settings(), tmp_path / "none"))
    assert found.device == "cpu"
    assert found.memory_bytes > 0


@pytest.mark.parametrize(("stated", "device"), [("2xA100-40GB", "A100"), ("cpu", "cpu")])
def test_hardware_that_is_stated_is_not_looked_for(stated: str, device: str, listed: Path) -> None:
    assert asyncio.run(hardware_of(Settings(hardware=stated), listed)).device == device


def test_a_statement_that_can_not_be_read_is_no_cpu(listed: Path) -> None:
    with pytest.raises(SettingsError):
        asyncio.run(hardware_of(Settings(hardware="much"), listed))
