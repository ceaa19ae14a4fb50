import os
from pathlib import Path

import pytest

from shared.errors import SettingsError
from shared.messages.hardware import Hardware
from shared.planning import hardware as module
from shared.planning.hardware import device_count, flops_per_s, machine_memory, parse_hardware, usable_memory


def test_gpus_by_name_and_back() -> None:
    hardware = parse_hardware("4xH100-80GB")
    assert hardware == Hardware(device="H100", count=4, memory_bytes=80 * 2**30)
    assert hardware.name == "4xH100-80GB"
    assert device_count(hardware) == 4
    assert usable_memory(hardware) == int(0.9 * 80 * 2**30)


def test_this_machine() -> None:
    hardware = parse_hardware("cpu")
    assert hardware.count == len(os.sched_getaffinity(0))
    assert hardware.memory_bytes > 2**28


def test_memory_is_this_machines() -> None:
    total, available = machine_memory()
    assert 0 < available < total
    assert total == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.1)
    assert parse_hardware("cpu").memory_bytes == total


def test_memory_that_is_not_reported_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_FILE", tmp_path / "meminfo")
    with pytest.raises(OSError, match="No such file"):
        machine_memory()
    (tmp_path / "meminfo").write_text("MemTotal:       24684092 kB\nMemFree:        100 kB\n")
    with pytest.raises(OSError, match="lacks 'MemAvailable'"):
        machine_memory()


def test_cores_are_one_device_and_halves_share_the_memory() -> None:
    hardware = parse_hardware("cpu-8x32GB")
    assert (hardware.device, hardware.count, device_count(hardware)) == ("cpu", 8, 1)
    assert usable_memory(hardware) == int(0.9 * 16 * 2**30)


@pytest.mark.parametrize(
    "name", ["", "H100", "4xH100", "0xH100-80GB", "4xH100-0GB", "cpu-0x8GB", "4x-80GB", "gpu"]
)
def test_unknown_hardware_says_which_forms_there_are(name: str) -> None:
    with pytest.raises(SettingsError, match="4xH100-80GB"):
        parse_hardware(name)


def test_expected_rates() -> None:
    four = flops_per_s(parse_hardware("4xH100-80GB"), "bfloat16")
    assert four == pytest.approx(4 * 0.35 * 989e12)
    assert flops_per_s(parse_hardware("4xH200-141GB"), "bfloat16") == four
    assert flops_per_s(parse_hardware("4xA100-80GB"), "bfloat16") < four
    assert 0 < flops_per_s(parse_hardware("1xNOVELTY-16GB"), "bfloat16") < four
    cpu = parse_hardware("cpu-2x8GB")
    assert flops_per_s(cpu, "float32") < flops_per_s(cpu, "bfloat16")
