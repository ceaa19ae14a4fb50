"""Detect this slot's hardware without torch, from nvidia-smi and /proc."""

from __future__ import annotations

import asyncio
import os

from shared.errors import SettingsError
from shared.logs import get_logger
from shared.messages import GpuStatus, Hardware
from shared.planning.hardware import machine_memory, parse_hardware
from shared.settings import Settings

QUERY_TIMEOUT_S = 10.0  # nvidia-smi takes seconds while a driver initialises
MIB = 1 << 20

_NOT_A_MODEL = {"nvidia", "tesla", "geforce", "quadro", "graphics", "device"}

log = get_logger()


async def detect(settings: Settings) -> Hardware:
    """Return the slot's hardware: as set, else its GPUs, else its share of the CPU.

    Raises SettingsError if `gpus` names GPUs that nvidia-smi doesn't show, or if they differ.
    """
    if settings.hardware not in ("auto", "cpu"):
        return parse_hardware(settings.hardware)
    if settings.hardware == "auto":
        gpus = await gpu_status(settings.gpus)
        if gpus:
            return _of_gpus(gpus)
        if settings.gpus:
            raise SettingsError(f"PODIUM_GPUS={settings.gpus}, but nvidia-smi shows no such GPU")
    return Hardware(device="cpu", count=threads_of_half(settings), memory_bytes=machine_memory()[0])


def threads_of_half(settings: Settings) -> int:
    """CPU threads of this half's worker: as set, else an equal share of the cores."""
    return settings.threads or max(1, len(os.sched_getaffinity(0)) // len(settings.slots))


async def gpu_status(gpus: str | None) -> list[GpuStatus]:
    """Return the slot's GPUs now; empty if there are none, or if nvidia-smi doesn't answer."""
    command = [
        "nvidia-smi",
        "--query-gpu=index,name,memory.total,memory.used,utilization.gpu,uuid",
        "--format=csv,noheader,nounits",
        *(["-i", gpus] if gpus else []),
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
    except TimeoutError:
        log.warning("nvidia-smi doesn't answer", after_s=QUERY_TIMEOUT_S)
        return []
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return parse_gpus(output.decode()) if process.returncode == 0 else []


def parse_gpus(output: str) -> list[GpuStatus]:
    """GPUs from nvidia-smi's CSV without header and units (memory in MiB, utilisation in percent)."""
    gpus = []
    for line in filter(str.strip, output.splitlines()):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 6 or not fields[0].isdigit() or not fields[2].isdigit():
            log.warning("nvidia-smi said something else than expected", line=line)
            continue
        index, name, total, used, utilization, uuid = fields
        gpus.append(
            GpuStatus(
                index=int(index),
                name=name,
                memory_total=int(total) * MIB,
                memory_used=int(used) * MIB if used.isdigit() else 0,
                utilization=int(utilization) / 100 if utilization.isdigit() else None,  # "[N/A]" under MIG
                uuid=uuid,
            )
        )
    return gpus


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
            f"this half's GPUs differ ({', '.join(kinds)}): choose alike ones with PODIUM_GPUS"
        )
    return Hardware(device=kinds[0], count=len(gpus), memory_bytes=min(gpu.memory_total for gpu in gpus))
