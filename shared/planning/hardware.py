"""Hardware by name (`4xH100-80GB`, `cpu`), what it can compute, and how much of its memory a run may use."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shared.errors import SettingsError
from shared.messages.hardware import Hardware
from shared.planning.control_group import memory_limits

# Dense bf16 peak FLOP/s of one GPU (vendor data sheets, without sparsity).
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A6000": 155e12,
}
UNKNOWN_GPU_FLOPS = 150e12
GPU_SHARE = 0.35  # of the peak: what packed training is expected to reach
# One core's rate; two AVX-512 cores trained SmolLM2-135M at 94 GFLOP/s in fp32, 175 GFLOP/s in bf16.
CORE_FLOPS = {"float32": 45e9, "bfloat16": 80e9}
USABLE = 0.9  # share of memory a plan may fill; the rest is fragmentation and error of the estimate
SLOT_SHARE = 0.5  # of a machine's memory, or of a limit that two slots share
MEMORY_FILE = Path("/proc/meminfo")

_NAME = re.compile(r"(\d{1,3})x([A-Za-z][A-Za-z0-9]{0,30})-(\d{1,5})GB", re.IGNORECASE)


def parse_hardware(name: str) -> Hardware:
    """Hardware from its name: `4xH100-80GB`, `cpu` (this machine) or `cpu-8x32GB` (8 cores, 32 GB).

    Raises SettingsError that lists the valid forms.
    """
    text = name.strip()
    if text.lower() == "cpu":
        total, _ = machine_memory()
        return Hardware(device="cpu", count=len(os.sched_getaffinity(0)), memory_bytes=total)
    if match := re.fullmatch(r"cpu-(\d{1,4})x(\d{1,5})GB", text, re.IGNORECASE):
        cores, gigabytes = int(match[1]), int(match[2])
        if cores and gigabytes:
            return Hardware(device="cpu", count=cores, memory_bytes=gigabytes * 2**30)
    if match := _NAME.fullmatch(text):
        count, gigabytes = int(match[1]), int(match[3])
        if count and gigabytes:
            return Hardware(device=match[2].upper(), count=count, memory_bytes=gigabytes * 2**30)
    raise SettingsError(
        f"unknown hardware {name!r}; give it as 4xH100-80GB, cpu or cpu-8x32GB (cores x memory)"
    )


def machine_memory() -> tuple[int, int]:
    """Return this machine's memory in bytes: all of it, and what can be had without swapping.

    A container's or unit's limit counts as the machine's.
    Raises OSError where the system doesn't report it.
    """
    total, available = _unlimited()
    for limited in memory_limits():
        total = min(total, limited.limit)
        available = min(available, max(0, limited.limit - limited.used))
    return total, available


def memory_share(*, own_limit: bool) -> float:
    """Return what a GPU slot has of `machine_memory`: half, unless the limit here is the slot's own.

    Then it is all of it, but no more than half of the machine. On a CPU the weights are in this memory, too,
    and plan and copies together fill a limit as it is. Raises OSError as `machine_memory`.
    """
    return min(1.0, SLOT_SHARE * _unlimited()[0] / machine_memory()[0]) if own_limit else SLOT_SHARE


def _unlimited() -> tuple[int, int]:
    """Return what the machine itself has, as `machine_memory`."""
    fields = dict(line.split(":", 1) for line in MEMORY_FILE.read_text().splitlines() if ":" in line)
    try:
        total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except KeyError as error:
        raise OSError(f"{MEMORY_FILE} lacks {error}") from error
    return total, available


def is_cpu(hardware: Hardware) -> bool:
    """Return whether the slot trains on CPU cores."""
    return hardware.device == "cpu"


def device_count(hardware: Hardware) -> int:
    """Devices that a run can be spread over: all cores of a CPU are one."""
    return 1 if is_cpu(hardware) else hardware.count


def usable_memory(hardware: Hardware) -> int:
    """Return the bytes that a run may use on one device; two slots share a CPU machine's memory."""
    return int(USABLE * hardware.memory_bytes * (SLOT_SHARE if is_cpu(hardware) else 1.0))


def flops_per_s(hardware: Hardware, dtype: str) -> float:
    """FLOP/s that training is expected to reach on all devices together."""
    if is_cpu(hardware):
        return hardware.count * CORE_FLOPS[dtype]
    peak = next(
        (flops for name, flops in PEAK_FLOPS.items() if name in hardware.device.upper()), UNKNOWN_GPU_FLOPS
    )
    return hardware.count * peak * GPU_SHARE


def computes_bf16(hardware: Hardware) -> bool:
    """Return whether bf16 products are fast here: every supported GPU, and CPUs with instructions for it."""
    if not is_cpu(hardware):
        return True
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
