"""`podium doctor` on a real broker, with a real gateway: what it sees of a world that is broken."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.server import listening_socket, running
from podium.commands.doctor import table
from podium.diagnostics import machine, probe
from podium.diagnostics.checks import examine
from podium.diagnostics.findings import Finding, Severity
from podium.diagnostics.monitor import probe_monitor
from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.stream_requests import create_stream
from shared.broker.stream_specs import state_log
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.jobs import Claimed, Job
from shared.messages.offers import Decision, Offer, TaskType
from shared.messages.slots import Heartbeat, Lease
from shared.settings import Settings
from shared.version import version

CPU = Hardware(device="cpu", count=1, memory_bytes=1 << 30)


@pytest.fixture(autouse=True)
def kept_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the machine that runs the tests may be kept by nothing."""
    monkeypatch.setattr(machine, "clock_is_synchronised", lambda: True)


@pytest.fixture
async def gateway(settings: Settings, bus: Bus) -> AsyncIterator[str]:
    """The URL of a gateway that is ready."""
    listening = listening_socket(settings, {})
    async with running(settings, listening) as (service, _):
        async with asyncio.timeout(60):
            while service.why_not_ready() is not None:
                await asyncio.sleep(0.02)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
async def nodes(bus: Bus) -> AsyncIterator[Callable[..., None]]:
    """`nodes("a", task="t")`: from now on that slot's node shows a lease and heartbeats."""
    alive: dict[str, Heartbeat] = {}

    def show(slot: str, **fields: Any) -> None:
        alive[slot] = Heartbeat(
            slot=slot, node=f"n-{slot}", epoch=1, hardware=CPU, version=version(), **fields
        )

    async def beat() -> None:
        while True:
            for slot, heartbeat in alive.items():
                lease = encode(Lease(slot=slot, node=heartbeat.node, epoch=1, hardware=CPU))
                await bus.publish(subjects.lease(slot), lease)
                now = encode(heartbeat).replace(b'"at":0.0', f'"at":{time.time()}'.encode())
                await bus.publish(subjects.heartbeat(slot), now)
            await asyncio.sleep(0.2)

    beating = asyncio.create_task(beat())
    yield show
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)


async def diagnose(settings: Settings, url: str, broker: Broker) -> list[Finding]:
    monitor = f"http://127.0.0.1:{broker.monitor_port}"
    findings = examine(await probe.gather(settings, url, monitor, version(), {"max_hours"}))
    assert table(findings).row_count == len(findings)
    # the space on this machine's disks and its delays under load don't matter here
    return [finding for finding in findings if finding.check not in ("disks", "clocks")]


def wrong(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(each.check, each.what) for each in findings if each.severity is not Severity.OK]


async def test_a_healthy_world_is_fine_and_looking_changes_nothing(
    settings: Settings, broker: Broker, gateway: str, nodes: Any, bus: Bus
) -> None:
    nodes("a")
    nodes("b")
    assert wrong(await diagnose(settings, gateway, broker)) == []
    for stream in (subjects.JOBS_STREAM, *map(subjects.state_stream, "ab")):
        assert await bus.read(stream, 0) == []


async def test_a_broken_world_is_told_in_full(
    make_settings: Callable[..., Settings], broker: Broker, gateway: str, nodes: Any, bus: Bus
) -> None:
    settings = make_settings(max_hours=12, hang_s=1000)
    offer = Offer(task_id="t", task_type=TaskType.INSTRUCT, model="m", hours_to_complete=1, dataset="d")
    now = time.time()
    job = Job(
        record_id="j",
        task_id="t",
        task="t",
        slot="a",
        gateway="g",
        offer=offer,
        decision=Decision(task_id="t", task="t", accepted=True, reason=""),
        received_at=now - 3000,
        deadline_at=now + 3000,
    )
    claim = Claimed(record_id="c", task="t", slot="a", node="n-a", epoch=1, attempt=1, at=now - 2000)
    await bus.append(subjects.JOBS_STREAM, subjects.job("a", "t"), encode(job))
    await bus.append(subjects.state_stream("a"), subjects.state("a", "t"), encode(claim))
    await bus.append(subjects.state_stream("a"), subjects.state("a", "odd"), b"no json")
    nodes("a", task="t")
    await bus.request(f"$JS.API.STREAM.DELETE.{subjects.DECISIONS_STREAM}")
    jobs = json.loads((await bus.request(f"$JS.API.STREAM.INFO.{subjects.JOBS_STREAM}")).data)["config"]
    changed = json.dumps(jobs | {"max_bytes": 1024}).encode()
    await bus.request(f"$JS.API.STREAM.UPDATE.{subjects.JOBS_STREAM}", changed)
    findings = wrong(await diagnose(settings, gateway, broker))
    for check, said in (
        ("jobs", "t (running on slot a): no progress for 20"),
        ("nodes", "no live node holds slot b"),
        ("streams", "DECISIONS does not exist"),
        ("streams", "JOBS has max_bytes=1024"),
        ("streams", "JOBS is "),
        ("streams", "1 stored records are malformed"),
        ("gateway", "PODIUM_MAX_HOURS is 96.0 for the gateway and 12.0"),
    ):
        assert [what for name, what in findings if name == check and said in what], (said, findings)


async def test_a_removed_slots_log_that_is_gone_and_an_upgrade_are_told(
    settings: Settings, broker: Broker, gateway: str, nodes: Any, bus: Bus
) -> None:
    await bus.append(subjects.JOBS_STREAM, subjects.job("c", "t"), encode(job_of("c")))
    findings = wrong(await diagnose(settings, gateway, broker))
    said = [what for check, what in findings if check == "streams"]
    assert [what[:35] for what in said] == ["STATE-c holds the chains of slot c,"]
    assert "store" not in {check for check, _ in findings}

    old = state_log(settings, "c").config | {"name": subjects.OLD_STATE_STREAM, "subjects": ["podium.frozen"]}
    await create_stream(bus, old)
    findings = wrong(await diagnose(settings, gateway, broker))
    said = [what for check, what in findings if check == "streams"]
    assert said == ["the upgrade from one log of states isn't finished"]


async def test_records_that_can_not_be_read_are_told_and_end_nothing(
    settings: Settings, broker: Broker, gateway: str, nodes: Any, bus: Bus
) -> None:
    nodes("a", task="t")
    claim = Claimed(record_id="c", task="t", slot="a", node="n-a", epoch=1, attempt=1, at=time.time())
    await bus.append(subjects.JOBS_STREAM, subjects.job("a", "t"), encode(job_of("a")))
    await bus.append(subjects.state_stream("a"), subjects.state("a", "t"), encode(claim))
    await bus.publish(subjects.progress("a", "t"), b"no json")
    await bus.publish(subjects.lease("b"), b'{"slot":"\xff"}')
    findings = wrong(await diagnose(settings, gateway, broker))
    for check, said in (
        ("jobs", "t (running on slot a): its newest progress can't be read: JSON is malformed"),
        ("store", "the lease of slot b can't be read"),
        ("nodes", "no live node holds slot b"),
    ):
        assert [what for name, what in findings if name == check and said in what], (said, findings)


def job_of(slot: str) -> Job:
    return Job(
        record_id="j",
        task_id="t",
        task="t",
        slot=slot,
        gateway="g",
        offer=Offer(task_id="t", task_type=TaskType.INSTRUCT, model="m", hours_to_complete=1, dataset="d"),
        decision=Decision(task_id="t", task="t", accepted=True, reason=""),
        received_at=0.0,
        deadline_at=4e9,
    )


async def test_a_broker_that_stands_still_is_seen_through_an_open_connection(
    settings: Settings, broker: Broker, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ANSWER_S", 0.5)
    asking = await connect(settings, name="doctor")
    assert broker.process is not None
    await stand_still(broker.process)
    try:
        seen = await probe._probe_connected(asking, settings)
        health = await asyncio.to_thread(probe_monitor, f"http://127.0.0.1:{broker.monitor_port}", 0.5)
    finally:
        broker.process.send_signal(signal.SIGCONT)
        await asking.close()
    assert "no answer" in seen["read_error"]
    assert "no answer" in seen["append_error"]
    assert health.error is not None


async def stand_still(process: asyncio.subprocess.Process) -> None:
    """Stop a process and wait until each of its threads has: while one waits for a core, others may go on."""
    process.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(10):
        while thread_states(process.pid) != {"T"}:
            await asyncio.sleep(0.01)


def thread_states(pid: int) -> set[str]:
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in threads}


async def test_the_command_says_what_is_wrong_and_fails(settings: Settings, broker: Broker, bus: Bus) -> None:
    variables = {
        "PODIUM_NATS_URL": broker.url,
        "PODIUM_DATA_DIR": settings.data_dir,
        "PODIUM_EXPECTED_HARDWARE": "cpu",
        "PODIUM_HEARTBEAT_S": "0.1",
    }
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PODIUM_")}
    command = ("-m", "podium", "doctor", "--json", "--url", "http://127.0.0.1:9")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, env=environ | variables, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 1
    findings = {(each["check"], each["severity"]) for each in json.loads(output)}
    assert {("gateway", "error"), ("nodes", "error"), ("broker", "ok"), ("permissions", "ok")} <= findings
