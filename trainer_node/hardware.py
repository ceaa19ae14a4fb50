"""Detect this slot's hardware without torch, from nvidia-smi and /proc."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Mapping
from pathlib import Path

from shared.errors import PodiumError, SettingsError
from shared.logs import get_logger
from shared.messages.hardware import GpuStatus, Hardware
from shared.planning.hardware import machine_memory, parse_hardware
from shared.processes import kill
from shared.settings import Settings

QUERY_TIMEOUT_S = 10.0  # nvidia-smi takes seconds while a driver initialises
QUERY_TRIES = 3
DRIVER = Path("/proc/driver/nvidia/version")  # there while the driver is loaded
PCI = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # PCI's vendor, and the class of display and 3D controllers
MIB = 1 << 20
FIELDS = (
    *("index", "name", "memory.total", "memory.used", "utilization.gpu", "uuid"),
    *("temperature.gpu", "power.draw", "power.limit"),
)

_NOT_A_MODEL = {"nvidia", "tesla", "geforce", "quadro", "graphics", "device"}

log = get_logger()


class GpuQueryError(PodiumError):
    """nvidia-smi is installed, but failed or did not answer."""


class GpuQueryHangsError(GpuQueryError):
    """nvidia-smi did not answer, and can't be killed: the driver hangs, and would hang others too."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__("nvidia-smi hangs inside the driver and can't be killed: restart the machine")
        self.process = process


async def detect(settings: Settings) -> Hardware:
    """Return the slot's hardware: as set, else its GPUs, else its share of the CPU.

    Raises SettingsError if GPUs are wanted and can't be used: a slot of GPUs must not become a CPU in
    silence. They are wanted with `hardware = gpu`, if `gpus` names some, and if the machine has any. GPUs
    that differ are refused too.
    """
    if settings.hardware not in ("auto", "gpu", "cpu"):
        return parse_hardware(settings.hardware)
    if settings.hardware != "cpu":
        wanted = visible_gpus(settings.gpus, os.environ)
        gpus = await _found_gpus(wanted)
        if gpus:
            return _of_gpus(gpus)
        if settings.gpus:
            raise SettingsError(f"PODIUM_GPUS={settings.gpus}, but nvidia-smi shows no such GPU")
        if why := _why_no_cpu(settings.hardware, wanted):
            raise SettingsError(f"{why}; to train on the CPU set PODIUM_HARDWARE=cpu")
    return Hardware(device="cpu", count=worker_threads(settings), memory_bytes=machine_memory()[0])


def _why_no_cpu(hardware: str, wanted: str | None) -> str | None:
    """Return why a machine without usable GPUs must not become a CPU, or None."""
    if hardware == "gpu":
        return (
            "PODIUM_HARDWARE=gpu, and no GPU can be used here: look at nvidia-smi, or at the container's GPUs"
        )
    if wanted is None and (built_in := pci_gpus(PCI)):
        return f"this machine has {built_in} NVIDIA GPU(s) and no driver that works: install or repair it"
    return None


def pci_gpus(devices: Path) -> int:
    """Return the number of NVIDIA GPUs that the machine has, whether or not a driver uses them."""
    found = 0
    for device in devices.glob("*") if devices.is_dir() else ():
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:  # it was unplugged
            continue
        found += vendor == NVIDIA and kind.startswith(DISPLAY)
    return found


def visible_gpus(gpus: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the slot's GPUs as `nvidia-smi -i` takes them: as set, else as CUDA_VISIBLE_DEVICES says.

    None means all, an empty string none. Raises SettingsError for slices of a GPU (MIG), which nvidia-smi
    doesn't list.
    """
    named = gpus if gpus is not None else environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return None
    if "MIG-" in named:
        raise SettingsError(
            "nvidia-smi doesn't list MIG slices: state what they are, such as PODIUM_HARDWARE=1xH100-40GB"
        )
    # CUDA ignores what follows an invalid number, such as -1.
    return ",".join(itertools.takewhile(lambda one: one and one != "-1", map(str.strip, named.split(","))))


def driver_is_loaded() -> bool:
    """Return whether the kernel has an NVIDIA driver: nvidia-smi may be installed without one."""
    return DRIVER.exists()


async def _found_gpus(wanted: str | None) -> list[GpuStatus]:
    """Return the GPUs, with several tries: a driver that has just been loaded may be slow."""
    for attempt in range(1, QUERY_TRIES + 1):
        try:
            return await query_gpus(wanted)
        except GpuQueryError as error:
            log.warning("the GPUs can't be listed", error=str(error), attempt=attempt)
            last = error
            if isinstance(error, GpuQueryHangsError):
                break
        if not driver_is_loaded():
            return []
    raise SettingsError(f"there is an NVIDIA driver, but {last}; to train on the CPU set PODIUM_HARDWARE=cpu")


def worker_threads(settings: Settings) -> int:
    """Return the CPU threads of this slot's worker: as set, else an equal share of the cores."""
    return settings.threads or max(1, len(os.sched_getaffinity(0)) // len(settings.slots))


async def gpu_status(gpus: str | None) -> list[GpuStatus]:
    """Return the slot's GPUs now; empty if there are none, or if nvidia-smi doesn't answer.

    Raises GpuQueryHangsError: another query would leave another process that can't be killed.
    """
    try:
        return await query_gpus(visible_gpus(gpus, os.environ))
    except GpuQueryHangsError:
        raise
    except (GpuQueryError, SettingsError) as error:
        log.warning("the GPUs can't be listed", error=str(error))
        return []


async def query_gpus(wanted: str | None) -> list[GpuStatus]:
    """Return what nvidia-smi says of the wanted GPUs (all with None); empty if it isn't installed.

    Raises GpuQueryError if it fails or takes too long.
    """
    if wanted == "":
        return []
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(FIELDS)}",
        "--format=csv,noheader,nounits",
        *(["-i", wanted] if wanted else []),
    ]
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:  # no NVIDIA driver here
        return []
    try:
        async with asyncio.timeout(QUERY_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError as error:
        if not await kill(process):
            raise GpuQueryHangsError(process) from error
        raise GpuQueryError(f"nvidia-smi doesn't answer within {QUERY_TIMEOUT_S:g} s") from error
    except asyncio.CancelledError:
        await kill(process)
        raise
    if process.returncode != 0:
        said = output.decode(errors="replace").strip().partition("\n")[0][:200]
        raise GpuQueryError(f"nvidia-smi failed with status {process.returncode}: {said}")
    return parse_gpus(output.decode(errors="replace"))


def parse_gpus(output: str) -> list[GpuStatus]:
    """GPUs from nvidia-smi's CSV without header and units (memory in MiB, utilisation in percent)."""
    gpus = []
    for line in filter(str.strip, output.splitlines()):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(FIELDS) or not fields[0].isdigit() or not fields[2].isdigit():
            log.warning("nvidia-smi said something else than expected", line=line)
            continue
        index, name, total, used, utilization, uuid, temperature, power, limit = fields
        gpus.append(
            GpuStatus(
                index=int(index),
                name=name,
                memory_total=int(total) * MIB,
                memory_used=int(used) * MIB if used.isdigit() else 0,
                utilization=int(utilization) / 100 if utilization.isdigit() else None,  # "[N/A]" under MIG
                uuid=uuid,
                temperature_c=_number(temperature),
                power_w=_number(power),
                power_limit_w=_number(limit),
            )
        )
    return gpus


def _number(text: str) -> float | None:
    """Return a reading, None for what nvidia-smi can't tell, such as `[N/A]`."""
    try:
        return float(text)
    except ValueError:
        return None


def short_name(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `H100`, `NVIDIA GeForce RTX 4090` -> `RTX4090`."""
    words = [word for word in name.replace("-", " ").split() if word.lower() not in _NOT_A_MODEL]
    if words[:1] == ["RTX"] and len(words) > 1:
        return words[1] if words[1][0].isalpha() else "RTX" + words[1]
    return words[0] if words else "GPU"


def _of_gpus(gpus: list[GpuStatus]) -> Hardware:
    kinds = sorted({short_name(gpu.name) for gpu in gpus})
    if len(kinds) > 1:
        raise SettingsError(
            f"this slot's GPUs differ ({', '.join(kinds)}): choose equal ones with PODIUM_GPUS"
        )
    return Hardware(device=kinds[0], count=len(gpus), memory_bytes=min(gpu.memory_total for gpu in gpus))
