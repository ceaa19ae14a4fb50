"""Disks that fill up: the broker's (F9) and a node's (F10), on file systems of a few megabytes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from podium.local.nats_server import Broker, broker_command, port_open, write_config
from podium.local.process import ManagedProcess, Spec
from podium.local.watchdog import trouble_of, until_broken
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.streams import bootstrap
from shared.errors import BusError, BusTimeoutError
from shared.messages.jobs import ResultStatus
from shared.messages.runs import ErrorCode
from shared.net import free_port
from shared.settings_sources import load_settings
from tests.integration.node.conftest import World

WATCH_SCRIPT = Path(__file__).parents[3] / "deploy" / "nats-watch.sh"
CHUNK = 4096


class SmallDisk:
    """A file system of its own that can be filled and emptied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filling = path / "filling"

    def fill(self, but: int = 0) -> None:
        self.free()
        stat = os.statvfs(self.path)
        size = stat.f_bavail * stat.f_frsize - but
        with suppress(OSError), self._filling.open("wb") as file:
            file.write(b"0" * size)

    def free(self) -> None:
        self._filling.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str, int], SmallDisk]]:
    mounted: list[Path] = []

    def make(name: str, megabytes: int) -> SmallDisk:
        path = tmp_path / name
        path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return SmallDisk(path)

    yield make
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


class WatchedBroker:
    """A nats-server on a small disk that something watches and starts again."""

    def __init__(self, disk: SmallDisk, shell: bool) -> None:
        self.disk, self.shell = disk, shell
        self.port, self.monitor_port = free_port(), free_port()
        self.said: list[str] = []
        command = broker_command(write_config(disk.path / "nats", self.port, self.monitor_port))
        environment = {}
        if shell:
            command = [str(WATCH_SCRIPT), "1", *command]
            environment["NATS_HEALTH"] = f"http://127.0.0.1:{self.monitor_port}/healthz"
        spec = Spec(name="broker", command=command, environment=environment)
        # Its log must not lie on the disk that fills up.
        self.service = ManagedProcess(spec, disk.path.parent / "service", self.said.append)
        if not shell:
            self.service.watch = partial(until_broken, self.monitor_port, 1.0)

    async def healthy(self) -> bool:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.monitor_port)
            writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
            answer = await reader.read()
            writer.close()
            return b" 200 " in answer
        return False


@pytest.fixture(params=["podium up", "nats-watch.sh"])
async def watched(
    request: pytest.FixtureRequest, small_disk: Callable[[str, int], SmallDisk]
) -> AsyncIterator[WatchedBroker]:
    shell = request.param != "podium up"
    if shell and not (shutil.which("wget") or shutil.which("curl")):
        pytest.skip("neither wget nor curl is here")
    broker = WatchedBroker(small_disk("volume", 8), shell)
    supervised = asyncio.create_task(broker.service.supervise())
    await port_open(broker.port, 60)
    yield broker
    broker.service.stop()
    async with asyncio.timeout(60):
        await supervised


@pytest.fixture
async def watched_bus(watched: WatchedBroker) -> AsyncIterator[Bus]:
    settings = load_settings({}, nats_url=f"nats://127.0.0.1:{watched.port}", log_max_bytes=64 << 20)
    bus = await connect(settings, name="test")
    await bootstrap(bus, settings)
    async with asyncio.timeout(60):
        while watched.shell and "watching the server" not in watched.service.log.read_text():
            await asyncio.sleep(0.05)
    yield bus
    await bus.close()


async def store_until_frozen(bus: Bus) -> list[str]:
    """Append until the store is frozen; the subjects whose append was acknowledged."""
    stored: list[str] = []
    while len(stored) < 1000:
        subject = subjects.state("a", f"t{len(stored)}")
        try:
            await bus.append(
                subjects.state_stream("a"), subject, b"x" * CHUNK, last_on_subject=0, timeout_s=1
            )
        except BusTimeoutError:
            return stored
        stored.append(subject)
    raise AssertionError("the disk never filled up")


@pytest.mark.fault("F9")
async def test_a_frozen_store_is_started_again_and_keeps_what_it_acknowledged(
    watched: WatchedBroker, watched_bus: Bus
) -> None:
    bus = watched_bus
    watched.disk.fill(but=40 * CHUNK)
    stored = await store_until_frozen(bus)
    assert stored
    async with asyncio.timeout(60):  # a new start while the disk is still full does no harm
        while watched.service.restarts == 0:
            await asyncio.sleep(0.05)
    watched.disk.free()

    async def appended() -> bool:
        subject = subjects.state("a", "afterwards")
        with suppress(BusError):
            await bus.append(subjects.state_stream("a"), subject, b"y", timeout_s=1)
        with suppress(BusError):
            return await bus.last(subjects.state_stream("a"), subject) is not None
        return False

    async with asyncio.timeout(60):
        while not await appended():
            await asyncio.sleep(0.1)
    for subject in stored:
        record = await bus.last(subjects.state_stream("a"), subject)
        assert record is not None
        assert record.data == b"x" * CHUNK
    assert await watched.healthy()
    assert any("broker" in line for line in watched.said)


@pytest.mark.fault("F6")
async def test_a_broker_that_doesn_t_answer_is_started_again(broker: Broker) -> None:
    assert await trouble_of(broker.monitor_port) is None
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(60):
        assert (await until_broken(broker.monitor_port, 1.0)).startswith("doesn't answer for")
    broker.process.send_signal(signal.SIGCONT)
    async with asyncio.timeout(60):
        while await trouble_of(broker.monitor_port):
            await asyncio.sleep(0.05)
    await broker.stop()
    assert await trouble_of(broker.monitor_port) is None  # what ends is not stuck


@pytest.mark.fault("F10")
async def test_a_full_disk_fails_the_job_by_its_name_and_the_slot_goes_on(
    world: World, small_disk: Callable[[str, int], SmallDisk]
) -> None:
    disk = small_disk("nodes", 8)
    node = world.node().start()
    await world.until(world.lease, 60, "no lease")
    await world.give(steps=400, step_s=0.02, weight_bytes=1 << 20)
    result = await world.result(timeout_s=60)
    assert (result.status, result.code) == (ResultStatus.FAILED, ErrorCode.DISK_FULL)
    assert "No space left on device" in result.reason
    disk.free()
    await world.give("job2", steps=5, step_s=0.02)
    assert (await world.result("job2", timeout_s=60)).status is ResultStatus.SUBMITTED
    assert node.running


@pytest.mark.fault("F10")
async def test_a_disk_that_is_full_before_the_start_is_waited_for(
    world: World, small_disk: Callable[[str, int], SmallDisk]
) -> None:
    disk = small_disk("nodes", 8)
    node = world.node()
    node.log_file = disk.path.parent / "node.log"
    node.start()
    await world.until(world.lease, 60, "no lease")
    disk.fill()
    await world.give(steps=5, step_s=0.02)

    async def said() -> bool:
        return "No space left on device" in node.log

    await world.until(said, 60, "the node said nothing of the full disk")
    assert await world.chain() == []  # nothing is claimed that can't be started
    disk.free()
    assert (await world.result(timeout_s=60)).status is ResultStatus.SUBMITTED
    assert node.running
