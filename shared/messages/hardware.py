"""The hardware of a slot, and what its GPUs report."""

from __future__ import annotations

from msgspec import Struct


class Hardware(Struct, frozen=True, kw_only=True):
    """The hardware of one slot. `device` is "cpu" or a GPU's short name such as "H100"."""

    device: str
    count: int  # GPUs, or CPU cores
    memory_bytes: int  # of one GPU, or of the whole machine for a CPU

    @property
    def name(self) -> str:
        """Short form used in settings, reasons and plans: `4xH100-80GB`, `cpu`."""
        if self.device == "cpu":
            return "cpu"
        return f"{self.count}x{self.device}-{round(self.memory_bytes / 2**30)}GB"


class GpuStatus(Struct, frozen=True, kw_only=True):
    """One GPU at one moment."""

    index: int
    name: str
    memory_total: int
    memory_used: int
    utilization: float | None = None  # 0..1
    uuid: str = ""  # the device's own: an index is only this container's
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
