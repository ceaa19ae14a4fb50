"""When a node looks for work."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared import subjects
from shared.broker.bus import Bus, Record
from shared.errors import EngineError
from shared.messages.hardware import Hardware
from shared.messages.jobs import Job
from shared.messages.offers import Decision, Offer, TaskType
from shared.messages.runs import ErrorCode
from shared.settings_sources import load_settings
from trainer_node.job import reconciler
from trainer_node.node import Node, job_of


@pytest.fixture
async def node(tmp_path: Path) -> Node:
    """One that holds its lease, on a bus that nobody connected."""
    settings = load_settings({}, data_dir=str(tmp_path), slot="a", node_dir=str(tmp_path / "node"))
    node = Node(settings, Bus(Client()), "n", Hardware(device="cpu", count=1, memory_bytes=2**30))
    node.lease.epoch, node.lease._confirmed_at = 1, time.monotonic()
    return node


async def _looks(node: Node, monkeypatch: pytest.MonkeyPatch, *, event: str = "") -> int:
    """How often the node looks for work in .4 s in which there is none."""
    looks = 0

    async def nothing_yet() -> Job | None:
        nonlocal looks
        looks += 1
        return None

    monkeypatch.setattr(node, "_newest_job", nothing_yet)
    if event == "job":
        await node._on_message(Msg(node.bus.client))
    elif event == "reconnect":
        node._alert()
    work = asyncio.create_task(node._work())
    await asyncio.sleep(0.4)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return looks


async def test_without_a_word_it_waits_for_its_next_poll(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await _looks(node, monkeypatch) == 1


@pytest.mark.parametrize("event", ["job", "reconnect"])
async def test_a_job_that_can_not_be_read_yet_is_looked_for_again(
    event: str, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await _looks(node, monkeypatch, event=event) > 1


async def test_a_disk_that_hangs_does_not_keep_the_loop_from_renewing_the_lease(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's model may be on a network disk, and looking for it takes as long as that disk takes."""
    looked_in: list[threading.Thread] = []

    def look(*_: object) -> NoReturn:
        looked_in.append(threading.current_thread())
        raise EngineError(ErrorCode.MODEL_UNAVAILABLE, "gone")

    async def newest() -> Job:
        return job

    offer = Offer(task_id="t", task_type=TaskType.CHAT, model="org/m", hours_to_complete=1.0, dataset="d")
    job = Job(
        record_id="r",
        task_id="t",
        gateway="g",
        task="t",
        slot="a",
        received_at=0.0,
        deadline_at=time.time() + 60,
        offer=offer,
        decision=Decision(task_id="t", task="t", accepted=True, reason=""),
    )
    monkeypatch.setattr(reconciler, "worker_job", look)
    monkeypatch.setattr(reconciler.JobReconciler, "reconcile", lambda _: asyncio.sleep(0))
    monkeypatch.setattr(node, "_newest_job", newest)
    await node._take_work()
    assert looked_in
    assert looked_in[0] is not threading.main_thread()


async def test_a_disk_that_can_not_be_read_is_tried_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To end the node would help nobody: it would be started again and find the same."""
    looks = 0

    async def newest() -> Job | None:
        nonlocal looks
        looks += 1
        raise PermissionError(13, "Permission denied", "runs/t/job.json")

    monkeypatch.setattr(node, "_newest_job", newest)
    work = asyncio.create_task(node._work())
    await asyncio.sleep(0.7)
    assert not work.done()
    assert looks > 1
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


@pytest.mark.parametrize("data", [b'{"task": "\xff"}', b'{"more": ' + b"[" * 100_000, b""])
def test_a_record_that_can_not_be_read_is_no_job(data: bytes) -> None:
    assert job_of(Record(1, subjects.job("a", "t"), data)) is None
