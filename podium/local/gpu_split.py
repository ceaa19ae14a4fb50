"""Split one machine into slots: the GPUs and CPU threads of each, and notes for the operator."""

from __future__ import annotations

import os

from msgspec import Struct

from shared.messages.hardware import GpuStatus, Hardware
from shared.settings import Settings
from trainer_node.hardware import short_name


class SlotShare(Struct, frozen=True):
    """One slot's share of the machine."""

    slot: str
    gpus: str | None  # indices as in nvidia-smi; None = CPU
    threads: int


class Split(Struct, frozen=True):
    """Every slot's share, the expected hardware, and notes for the operator."""

    shares: list[SlotShare]
    expected_hardware: str
    notes: list[str]


def split(settings: Settings, gpus: list[GpuStatus], *, expectation_set: bool, cores: int = 0) -> Split:
    """Give each slot an equal, contiguous share; a slot without a GPU of its own is left out.

    Eight GPUs and slots a, b: a gets 0-3 and b 4-7. `expectation_set`: the operator set
    `expected_hardware`; otherwise a machine without GPUs is expected to be a CPU.
    """
    cores = cores or len(os.sched_getaffinity(0))
    notes: list[str] = []
    slots = list(settings.slots)
    if gpus and len(gpus) < len(slots):
        notes.append(
            f"{len(gpus)} GPU(s) for {len(slots)} slots: only {', '.join(slots[: len(gpus)])} will run"
        )
        slots = slots[: len(gpus)]
    threads = settings.threads or max(1, cores // len(slots))
    each = len(gpus) // len(slots)
    if leftover := len(gpus) - each * len(slots):
        notes.append(f"{leftover} of {len(gpus)} GPUs stay idle: every slot gets {each}")
    shares = [
        SlotShare(slot, _indices(gpus, place * each, each), threads) for place, slot in enumerate(slots)
    ]
    expected = settings.expected_hardware
    if not gpus and not expectation_set:
        notes.append("no GPU found: using PODIUM_EXPECTED_HARDWARE=cpu, so that offers can be accepted")
        expected = "cpu"
    elif gpus and (found := _name(gpus, each)) != expected:
        notes.append(
            f"a slot has {found} but {expected} is expected, so every offer will be rejected; "
            f"set PODIUM_EXPECTED_HARDWARE={found} to use this machine"
        )
    return Split(shares, expected, notes)


def _indices(gpus: list[GpuStatus], first: int, count: int) -> str | None:
    return ",".join(str(gpu.index) for gpu in gpus[first : first + count]) or None


def _name(gpus: list[GpuStatus], count: int) -> str:
    memory = min(gpu.memory_total for gpu in gpus)
    return Hardware(device=short_name(gpus[0].name), count=count, memory_bytes=memory).name
