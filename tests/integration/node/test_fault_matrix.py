"""Rows of docs/guarantees.md's fault matrix that a node meets: hangs, partitions, clocks, poison, memory."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from podium.local.nats_server import Broker
from shared import subjects
from shared.messages.encoding import encode
from shared.messages.jobs import ResultStatus
from shared.messages.runs import ErrorCode
from tests.integration.node.conftest import World, claims

# Run by every Python that has its folder in PYTHONPATH: the wall clock jumps as a file says.
JUMPING_CLOCK = """
import os, time
_real = time.time
def _jumped():
    try:
        with open(os.environ["CLOCK_JUMP"]) as file:
            return _real() + float(file.read() or 0)
    except OSError:
        return _real()
time.time = _jumped
"""


class Link:
    """A node's way to its broker, which can be cut: `deaf` swallows what the broker says, `cut` resets."""

    def __init__(self, target: int) -> None:
        self.mode = "open"
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self.server: asyncio.Server | None = None

    async def serve(self) -> int:
        self.server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    def set(self, mode: str) -> None:
        self.mode = mode
        if mode == "cut":
            for writer in self._writers:
                writer.transport.abort()

    async def close(self) -> None:
        self.set("cut")
        if self.server is not None:
            self.server.close()
            await self.server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "cut":
            writer.transport.abort()
            return
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, there}
        with suppress(OSError):
            await asyncio.gather(self._pass(reader, there, False), self._pass(there_reader, writer, True))

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, answers: bool) -> None:
        try:
            while data := await source.read(1 << 16):
                if answers and self.mode == "deaf":
                    continue
                target.write(data)
                await target.drain()
        finally:
            target.close()


@pytest.fixture
async def link(broker: Broker) -> AsyncIterator[Link]:
    link = Link(broker.port)
    yield link
    await link.close()


@pytest.mark.fault("F6")
async def test_a_broker_that_hangs_stops_no_training(world: World) -> None:
    node = world.node().start()
    assert world.broker.process is not None
    await world.give(steps=60)
    await world.trained(node, 5)
    world.broker.process.send_signal(signal.SIGSTOP)
    stalled = world.steps(node)[-1]
    await world.trained(node, stalled + 30)
    world.broker.process.send_signal(signal.SIGCONT)
    result = await world.result(timeout_s=60)
    assert result.status is ResultStatus.SUBMITTED
    assert world.steps(node) == list(range(1, 61))
    assert {claim.attempt for claim in claims(await world.chain())} == {1}


@pytest.mark.fault("F7", "F8")
@pytest.mark.parametrize("mode", ["deaf", "cut"])
async def test_a_node_cut_off_from_the_broker_is_succeeded_and_fenced(
    world: World, link: Link, mode: str
) -> None:
    lease = {"lease_ttl_s": 4, "lease_trust_s": 3}
    lonely = world.node("lonely", nats_url=f"nats://127.0.0.1:{await link.serve()}", **lease).start()
    await world.give(steps=120)  # longer than the lease is trusted
    await world.trained(lonely, 5)
    heir = world.node("heir", **lease).start()
    link.set(mode)
    await world.trained(heir, 3)  # the lease lapsed
    link.set("open")
    result = await world.result(timeout_s=60)
    assert (result.status, result.node) == (ResultStatus.SUBMITTED, heir.node_id)
    assert result.digest == world.submitted()
    nodes = [record.node for record in await world.chain()]
    assert nodes == sorted(nodes, key=[lonely.node_id, heir.node_id].index)  # nothing of the lonely one after
    assert lonely.running


@pytest.mark.fault("F8")
async def test_a_node_that_hears_no_answers_writes_nothing_twice(world: World, link: Link) -> None:
    """What it sends is stored, the answers are lost: around claim, submitting and result in turn."""
    node = world.node(nats_url=f"nats://127.0.0.1:{await link.serve()}").start()
    await world.until(world.lease, 60, "no lease")
    for number in range(3):
        task = f"t{number}"
        job = asyncio.create_task(world.give(task, steps=4, step_s=0.05))
        await asyncio.sleep(0.12 * number)
        link.set("deaf")
        await asyncio.sleep(0.4)
        link.set("cut")
        link.set("open")
        await job
        result = await world.result(task, timeout_s=60)
        assert result.status is ResultStatus.SUBMITTED
        assert result.digest == world.submitted(task)
        ids = [record.record_id for record in await world.chain(task)]
        assert len(ids) == len(set(ids))
    assert node.running


@pytest.mark.fault("F13")
@pytest.mark.parametrize("jump_s", [3600, -3600])
async def test_a_clock_that_jumps_loses_no_lease_and_submits_once(
    world: World, tmp_path: Path, jump_s: int
) -> None:
    folder, jump = tmp_path / "clock", tmp_path / "jump"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(JUMPING_CLOCK)
    node = world.node(lease_ttl_s=30, lease_trust_s=25)
    node.environment |= {
        "PYTHONPATH": f"{folder}:{Path.cwd()}",
        "CLOCK_JUMP": str(jump),
        "PODIUM_WORKER_ENVIRONMENT": "CLOCK_JUMP",
    }
    node.start()
    await world.give(seconds=600, steps=60)
    await world.trained(node, 12)
    jump.write_text(str(jump_s))
    result = await world.result(timeout_s=60)
    assert result.status is ResultStatus.SUBMITTED
    assert result.deadline_margin_s is not None
    assert (result.deadline_margin_s < 0) == (jump_s > 0)  # the clock had really jumped
    assert result.digest == world.submitted()
    chain = await world.chain()
    assert len({record.epoch for record in chain}) == 1
    held = [line["event"] for line in node.slot_log()]
    assert held == ["acquired", "released"] * (len(held) // 2)


def poison(job: bytes, slot: str) -> Iterator[tuple[str, bytes]]:
    """Subjects and bodies that no gateway writes, but that its key allows."""
    on = f"podium.jobs.{slot}"
    yield f"{on}.p1", b""
    yield f"{on}.p2", b"not json"
    yield f"{on}.p3", b"\xff\xfe\x00"
    yield f"{on}.p4", b"null"
    yield f"{on}.p5", b"[]"
    yield f"{on}.p6", b"{}"
    yield f"{on}.p7", b'{"kind": "nothing"}'
    yield f"{on}.p8", b'{"kind": "job"}'
    yield f"{on}.p9", b"[" * 100_000
    yield f"{on}.p10", b'"' + b"x" * (2 << 20) + b'"'
    yield f"{on}.p11", job  # another task's
    yield f"{on}.p12", job.replace(b'"task":"job1"', b'"task":"../../etc"')
    yield f"{on}.p13", job.replace(b'"slot":"a"', b'"slot":"b"')
    yield f"{on}.p14", job.replace(b'"deadline_at":', b'"deadline_at":"soon","x":')
    yield f"{on}.p15", job.replace(b'"kind":"job"', b'"kind":"reservation"')


@pytest.mark.fault("F14")
async def test_what_is_no_job_ends_none_and_holds_up_none(world: World) -> None:
    node = world.node().start()
    job = await world.give(steps=100)
    await world.trained(node, 3)
    pid = node.worker().pid
    for number, (subject, body) in enumerate(poison(encode(job), "a"), 1):
        await world.bus.append(subjects.JOBS_STREAM, subject, body)
        if number % 5 == 0:  # the restarted node finds it in the place of its job
            await node.kill()
            node.start()

            async def logged(line: str = f"subject={subject}") -> bool:
                return line in await asyncio.to_thread(lambda: node.log)

            await world.until(logged, 60, f"nothing said of {subject}")
    assert node.worker().pid == pid
    assert node.worker().task == "job1"
    result = await world.result(timeout_s=60)
    assert result.status is ResultStatus.SUBMITTED
    assert world.steps(node) == list(range(1, 101))
    await world.give("job2", steps=3)
    assert (await world.result("job2", timeout_s=60)).status is ResultStatus.SUBMITTED


@pytest.mark.fault("F18")
async def test_sigterm_of_broker_and_worker_in_the_middle_of_a_job(world: World) -> None:
    """SIGTERM of a node: test_node.py; of a gateway: test_gateway_process.py; of `podium up`: tests/e2e."""
    node = world.node().start()
    await world.give(steps=60)
    await world.trained(node, 5)
    await world.broker.stop()
    await world.broker.start()
    await world.trained(node, 15)
    os.kill(node.worker().pid, signal.SIGTERM)  # not by its node: it writes a checkpoint and is started again
    result = await world.result(timeout_s=60)
    assert result.status is ResultStatus.SUBMITTED
    assert world.steps(node) == list(range(1, 61))
    assert {claim.attempt for claim in claims(await world.chain())} == {1}


@pytest.fixture
def small_memory() -> Iterator[Callable[[int], None]]:
    """A function that puts a process into a control group of 256 MB of memory."""
    version_2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    root = Path("/sys/fs/cgroup") if version_2 else Path("/sys/fs/cgroup/memory")
    group = root / f"podium-test-{os.getpid()}"
    limit = group / ("memory.max" if version_2 else "memory.limit_in_bytes")
    try:
        group.mkdir()
        limit.write_text(str(256 << 20))
        swap = group / ("memory.swap.max" if version_2 else "memory.swappiness")
        swap.write_text("0")
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group with a memory limit can be made here: {error}")

    def join(pid: int) -> None:
        (group / "cgroup.procs").write_text(str(pid))

    yield join
    end = time.monotonic() + 60
    while True:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            return group.rmdir()
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)


async def test_a_worker_that_the_kernel_kills_for_memory_is_known_as_such(
    world: World, small_memory: Callable[[int], None]
) -> None:
    node = world.node(max_attempts=1).start()
    small_memory(node.pid)
    await world.give(eat_at=2, checkpoint_every=1000)
    result = await world.result(timeout_s=100)
    assert (result.status, result.code) == (ResultStatus.FAILED, ErrorCode.OUT_OF_MEMORY)
    assert "out-of-memory killer" in result.reason
    assert node.running
