"""Requests to a node: who answers, and with what."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from shared.errors import BusError
from shared.logs import get_logger
from shared.messages.encoding import encode
from shared.messages.slots import Control, ControlAnswer, ControlKind
from trainer_node.control import ControlHandler
from trainer_node.job import reconciler as reconciler_module
from trainer_node.job.reconciler import JobReconciler
from trainer_node.worker.run_folder import RunFolder

REQUEUE = Control(kind=ControlKind.REQUEUE, task="t1", reason="wrong data", gateway="g")
LOOK = Control(kind=ControlKind.LOOK, task="t1")


class FakeContext:
    """A node's parts without a broker."""

    def __init__(self, holds_slot: bool = True, broken: bool = False) -> None:
        self.settings = SimpleNamespace(slot="a")
        self.bus = self
        self.lease = SimpleNamespace(may_write=lambda: holds_slot)
        self.wake = asyncio.Event()
        self.broken = broken
        self.subscribed: list[str] = []
        self.answers: list[ControlAnswer] = []

    async def subscribe(self, subject: str, _: Any) -> None:
        self.subscribed.append(subject)

    async def publish(self, reply: str, data: bytes) -> None:
        assert reply == "inbox"
        if self.broken:
            raise BusError("down")
        self.answers.append(msgspec.json.decode(data, type=ControlAnswer))


class FakeReconciler:
    """The job at hand; `refusal` is what a requeue of it ends in."""

    def __init__(self, refusal: str | None = None, wait: asyncio.Event | None = None) -> None:
        self.job = SimpleNamespace(task="t1")
        self.refusal = refusal
        self.wait = wait
        self.requeued = 0

    async def requeue(self) -> str | None:
        self.requeued += 1
        if self.wait is not None:
            await self.wait.wait()
        return self.refusal


def handler_of(context: Any, reconciler: Any = None) -> ControlHandler:
    return ControlHandler(context, lambda: reconciler)


async def ask(
    context: FakeContext, reconciler: FakeReconciler | None, data: bytes, reply: str = "inbox"
) -> ControlHandler:
    """Send one request through a handler; the handler once it is served."""
    handler = handler_of(context, reconciler)
    await handler._on_message(Msg(Client(), subject="control", reply=reply, data=data))
    await asyncio.gather(*handler._running)
    return handler


async def test_it_listens_for_its_own_slot() -> None:
    context = FakeContext()
    await handler_of(context).open()
    assert len(context.subscribed) == 1
    assert context.subscribed[0].endswith(".a")


@pytest.mark.parametrize("refusal", [None, "it is too late"])
async def test_a_requeue_of_the_job_at_hand_is_done_or_refused_with_why(refusal: str | None) -> None:
    context, reconciler = FakeContext(), FakeReconciler(refusal)
    await ask(context, reconciler, encode(REQUEUE))
    assert reconciler.requeued == 1
    assert context.answers == [ControlAnswer(refusal is None, refusal or "")]
    assert context.wake.is_set()


@pytest.mark.parametrize("task", [None, "other"])
async def test_a_requeue_of_any_other_task_is_refused(task: str | None) -> None:
    context, reconciler = FakeContext(), FakeReconciler()
    asked = msgspec.structs.replace(REQUEUE, task=task or "t1")
    await ask(context, reconciler if task else None, encode(asked))
    assert reconciler.requeued == 0
    assert context.answers == [ControlAnswer(False, "the node of slot a is not at this task now")]


async def test_a_request_to_look_only_wakes_the_node() -> None:
    context, reconciler = FakeContext(), FakeReconciler()
    await ask(context, reconciler, encode(LOOK))
    assert context.wake.is_set()
    assert reconciler.requeued == 0
    assert context.answers == [ControlAnswer(True)]


async def test_who_wants_no_answer_gets_none() -> None:
    context = FakeContext()
    await ask(context, None, encode(LOOK), reply="")
    assert context.wake.is_set()
    assert context.answers == []


async def test_a_node_without_the_slot_leaves_the_answer_to_the_one_that_holds_it() -> None:
    context, reconciler = FakeContext(holds_slot=False), FakeReconciler()
    await ask(context, reconciler, encode(REQUEUE))
    assert context.wake.is_set()
    assert (reconciler.requeued, context.answers) == (0, [])


@pytest.mark.parametrize("data", [b"{", b"[" * 100_000, b'{"more": ' + b"[" * 100_000])
async def test_a_request_that_cannot_be_read_is_dropped(data: bytes) -> None:
    context = FakeContext()
    await ask(context, FakeReconciler(), data)
    assert not context.wake.is_set()
    assert context.answers == []


async def test_what_is_done_stays_done_without_a_broker_to_answer_through() -> None:
    context, reconciler = FakeContext(broken=True), FakeReconciler()
    handler = await ask(context, reconciler, encode(REQUEUE))
    assert reconciler.requeued == 1
    assert not handler._running


async def test_a_close_drops_what_is_not_answered_yet() -> None:
    context, reconciler = FakeContext(), FakeReconciler(wait=asyncio.Event())
    handler = handler_of(context, reconciler)
    await handler._on_message(Msg(Client(), subject="control", reply="inbox", data=encode(REQUEUE)))
    await asyncio.sleep(0)
    assert reconciler.requeued == 1
    await asyncio.wait_for(handler.close(), 5)
    assert context.answers == []


async def test_a_close_ends_a_request_that_missed_its_cancellation() -> None:
    handler = handler_of(FakeContext())
    task = asyncio.create_task(deaf_once())
    handler._running.add(task)
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await handler.close()
    assert task.cancelled()


async def deaf_once() -> None:
    """Miss one cancellation, as `asyncio.wait_for` of Python 3.11 may."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(60)
    await asyncio.sleep(60)


async def test_a_job_ends_whose_monitor_missed_its_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing() -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(reconciler_module, "AGAIN_S", 0.05)
    job: Any = JobReconciler.__new__(JobReconciler)
    job._remove_older_run = job._rounds = nothing
    job._unread = job._requeue = None
    job.monitor = SimpleNamespace(follow=deaf_once, publish=nothing)
    async with asyncio.timeout(10):
        await job.reconcile()
    assert job._over


async def test_a_moved_job_is_left_though_its_folder_can_not_be_removed(tmp_path: Path) -> None:
    """Else its node would try again for ever, and no later job of the slot would run."""
    job: Any = JobReconciler.__new__(JobReconciler)
    job.job, job.context = SimpleNamespace(task="t"), SimpleNamespace(worker_of=lambda task: None)
    job.run, job.log = RunFolder(tmp_path, "t"), get_logger()
    (tmp_path / "elsewhere").mkdir()
    job.run.path.parent.mkdir()
    job.run.path.symlink_to(tmp_path / "elsewhere")  # what is removed must be no link
    with capture_logs() as lines:
        await job._leave()
    said = [line["event"] for line in lines]
    assert said == ["the job was moved to another slot", "run folder not removed"]
