"""A node's heartbeat: what it is, what it does, how full its memory is; once a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from msgspec import Struct

from shared import subjects
from shared.aio import pause
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages.encoding import encode
from shared.messages.hardware import GpuStatus, Hardware
from shared.messages.runs import Phase
from shared.messages.slots import Heartbeat
from shared.planning.hardware import machine_memory
from shared.self_test import SlotHealth
from shared.settings import Settings
from shared.version import version
from trainer_node.hardware import GpuQueryHangsError, gpu_status
from trainer_node.transfer_rates import Direction, measured

RATE_READ_S = 60.0
GPU_QUERY_S = 5.0  # nvidia-smi costs 20 to 100 ms of CPU per call

log = get_logger()


class Activity(Struct, frozen=True, kw_only=True):
    """The node's current activity."""

    epoch: int
    task: str | None = None
    phase: Phase | None = None
    step: int = 0
    worker_alive: bool = False


class HeartbeatPublisher:
    """Publishes heartbeats; `activity` is asked at every beat."""

    def __init__(
        self,
        bus: Bus,
        settings: Settings,
        node: str,
        hardware: Hardware,
        activity: Callable[[], Activity],
    ) -> None:
        self.bus = bus
        self.settings = settings
        self.node = node
        self.hardware = hardware
        self.activity = activity
        self.wake = asyncio.Event()  # beat now: who listens has missed some, or the lease has changed
        self.health = SlotHealth()  # as the slot's self-test found it
        self._gpus: list[GpuStatus] = []
        self._rates: dict[Direction, float | None] = {}  # bytes a second

    async def run(self) -> None:
        """Beat for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat())
            tasks.create_task(self._read_rates())
            if self.hardware.device != "cpu":
                tasks.create_task(self._look_at_gpus())

    def heartbeat(self) -> Heartbeat:
        """Return the heartbeat of this moment."""
        activity = self.activity()
        total, available = machine_memory()
        return Heartbeat(
            slot=self.settings.slot,
            node=self.node,
            epoch=activity.epoch,
            hardware=self.hardware,
            gpus=self._gpus,
            memory_total=total,
            memory_used=total - available,
            task=activity.task,
            phase=activity.phase,
            step=activity.step,
            worker_alive=activity.worker_alive,
            faults=self.health.faults,
            warnings=self.health.warnings,
            upload_bytes_per_s=self._rates.get(Direction.UPLOAD),
            download_bytes_per_s=self._rates.get(Direction.DOWNLOAD),
            at=time.time(),
            version=version(),
        )

    async def _beat(self) -> None:
        subject = subjects.heartbeat(self.settings.slot)
        while True:
            self.wake.clear()
            try:
                await self.bus.publish(subject, encode(self.heartbeat()))
            except BusError as error:  # the next one follows in a second
                log.debug("heartbeat not sent", error=str(error))
            await pause(self.settings.heartbeat_s, self.wake)

    async def _read_rates(self) -> None:
        while True:
            for direction in Direction:
                self._rates[direction] = await asyncio.to_thread(measured, self.settings.node, direction)
            await asyncio.sleep(RATE_READ_S)

    async def _look_at_gpus(self) -> None:
        while True:
            try:
                self._gpus = await gpu_status(self.settings.gpus)
            except GpuQueryHangsError as error:
                log.error("the GPUs can't be watched", error=str(error))
                self._gpus = []
                await error.process.wait()
            await asyncio.sleep(GPU_QUERY_S)
