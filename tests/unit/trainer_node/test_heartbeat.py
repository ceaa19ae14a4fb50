"""A node's heartbeats: what they carry, and that nothing stops them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared import subjects
from shared.errors import BusError
from shared.messages.hardware import GpuStatus, Hardware
from shared.messages.runs import Phase
from shared.messages.slots import Heartbeat, decode_heartbeat
from shared.processes import kill
from shared.settings_sources import load_settings
from trainer_node import heartbeat
from trainer_node.hardware import GpuQueryHangsError
from trainer_node.heartbeat import Activity, HeartbeatPublisher
from trainer_node.transfer_rates import Direction, note

CPU = Hardware(device="cpu", count=1, memory_bytes=2**30)
GPU = GpuStatus(index=0, name="H100", memory_total=80 << 30, memory_used=1 << 30, utilization=0.5)


class FakeBus:
    """Keeps what is published; `down` so many times it can't."""

    def __init__(self, down: int = 0) -> None:
        self.down = down
        self.tried = 0
        self.beats: asyncio.Queue[Heartbeat] = asyncio.Queue()

    async def publish(self, subject: str, data: bytes) -> None:
        self.tried += 1
        assert subject == subjects.heartbeat("a")
        if self.tried <= self.down:
            raise BusError("down")
        self.beats.put_nowait(decode_heartbeat(data))


def publisher(bus: Any, every_s: float, hardware: Hardware = CPU, activity: Any = None) -> HeartbeatPublisher:
    settings = load_settings({}, slot="a", heartbeat_s=every_s)
    return HeartbeatPublisher(bus, settings, "n", hardware, activity or (lambda: Activity(epoch=3)))


@asynccontextmanager
async def beating(made: HeartbeatPublisher) -> AsyncIterator[None]:
    task = asyncio.create_task(made.run())
    try:
        async with asyncio.timeout(20):
            yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_every_beat_carries_what_the_node_does_at_that_moment() -> None:
    bus, doing = FakeBus(), SimpleNamespace(now=Activity(epoch=3))
    async with beating(publisher(bus, 0.05, activity=lambda: doing.now)):
        idle = await bus.beats.get()
        doing.now = Activity(epoch=4, task="t1", phase=Phase.TRAIN, step=7, worker_alive=True)
        beats = [await bus.beats.get() for _ in range(3)]
    assert (idle.slot, idle.node, idle.hardware, idle.gpus) == ("a", "n", CPU, [])
    assert (idle.epoch, idle.task, idle.worker_alive) == (3, None, False)
    assert 0 < idle.memory_used < idle.memory_total
    busy = beats[-1]
    assert (busy.epoch, busy.task, busy.phase, busy.step) == (4, "t1", Phase.TRAIN, 7)
    assert busy.worker_alive
    assert [beat.at for beat in beats] == sorted(beat.at for beat in beats)


async def test_measured_rates_are_reported(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    for direction, seconds in ((Direction.DOWNLOAD, 2.0), (Direction.UPLOAD, 5.0)):
        note(tmp_path / "node", direction, 10**9, seconds)
    bus = FakeBus()
    made = publisher(bus, 0.02)
    assert made.heartbeat().download_bytes_per_s is None
    made.settings = load_settings({}, slot="a", heartbeat_s=0.02, node_dir=str(tmp_path / "node"))
    async with beating(made):
        while (beat := await bus.beats.get()).upload_bytes_per_s is None:
            pass
    assert (beat.download_bytes_per_s, beat.upload_bytes_per_s) == (5e8, 2e8)


async def test_a_broker_that_is_down_stops_no_heartbeat() -> None:
    bus = FakeBus(down=3)
    async with beating(publisher(bus, 0.02)):
        assert (await bus.beats.get()).node == "n"
    assert bus.tried >= 4


async def test_a_wake_is_a_beat_at_once() -> None:
    bus = FakeBus()
    made = publisher(bus, 3600)
    async with beating(made):
        await bus.beats.get()
        await asyncio.sleep(0.05)
        assert bus.tried == 1
        made.wake.set()
        await bus.beats.get()
    assert bus.tried == 2


@pytest.mark.parametrize(("device", "gpus"), [("cuda", [GPU]), ("cpu", [])])
async def test_gpus_are_asked_for_only_where_there_are_any(
    device: str, gpus: list[GpuStatus], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def gpu_status(_: str | None) -> list[GpuStatus]:
        asked.set()
        return [GPU]

    monkeypatch.setattr(heartbeat, "gpu_status", gpu_status)
    bus = FakeBus()
    made = publisher(bus, 0.02, Hardware(device=device, count=1, memory_bytes=2**30))
    async with beating(made):
        await bus.beats.get()
        beat = await bus.beats.get()
    assert beat.gpus == gpus
    assert asked.is_set() is bool(gpus)


async def test_gpus_that_hang_are_asked_for_once_and_the_heart_beats_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    asked = 0

    async def gpu_status(_: str | None) -> list[GpuStatus]:
        nonlocal asked
        asked += 1
        raise GpuQueryHangsError(process)

    monkeypatch.setattr(heartbeat, "gpu_status", gpu_status)
    monkeypatch.setattr(heartbeat, "GPU_QUERY_S", 0.01)
    bus = FakeBus()
    async with beating(publisher(bus, 0.02, Hardware(device="H100", count=1, memory_bytes=2**30))):
        for _ in range(5):
            assert (await bus.beats.get()).gpus == []
        assert asked == 1
        assert await kill(process)
        while asked == 1:
            await bus.beats.get()
