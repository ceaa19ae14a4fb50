"""Requests to a node: who answers, and with what."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.errors import BusError
from shared.messages import Control, ControlAnswer, ControlKind, encode
from trainer_node.control import Desk

REQUEUE = Control(kind=ControlKind.REQUEUE, task="t1", reason="wrong data", gateway="g")
LOOK = Control(kind=ControlKind.LOOK, task="t1")


class FakePost:
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


class FakeAssignment:
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


def desk_of(post: Any, assignment: Any = None) -> Desk:
    return Desk(post, lambda: assignment)


async def ask(post: FakePost, assignment: FakeAssignment | None, data: bytes, reply: str = "inbox") -> Desk:
    """Send one request through a desk; the desk once it is served."""
    desk = desk_of(post, assignment)
    await desk._heard(Msg(Client(), subject="control", reply=reply, data=data))
    await asyncio.gather(*desk._running)
    return desk


async def test_it_listens_for_its_own_slot() -> None:
    post = FakePost()
    await desk_of(post).open()
    assert len(post.subscribed) == 1
    assert post.subscribed[0].endswith(".a")


@pytest.mark.parametrize("refusal", [None, "it is too late"])
async def test_a_requeue_of_the_job_at_hand_is_done_or_refused_with_why(refusal: str | None) -> None:
    post, assignment = FakePost(), FakeAssignment(refusal)
    await ask(post, assignment, encode(REQUEUE))
    assert assignment.requeued == 1
    assert post.answers == [ControlAnswer(refusal is None, refusal or "")]
    assert post.wake.is_set()


@pytest.mark.parametrize("task", [None, "other"])
async def test_a_requeue_of_any_other_task_is_refused(task: str | None) -> None:
    post, assignment = FakePost(), FakeAssignment()
    asked = msgspec.structs.replace(REQUEUE, task=task or "t1")
    await ask(post, assignment if task else None, encode(asked))
    assert assignment.requeued == 0
    assert post.answers == [ControlAnswer(False, "the node of slot a is not at this task now")]


async def test_a_request_to_look_only_wakes_the_node() -> None:
    post, assignment = FakePost(), FakeAssignment()
    await ask(post, assignment, encode(LOOK))
    assert post.wake.is_set()
    assert assignment.requeued == 0
    assert post.answers == [ControlAnswer(True)]


async def test_who_wants_no_answer_gets_none() -> None:
    post = FakePost()
    await ask(post, None, encode(LOOK), reply="")
    assert post.wake.is_set()
    assert post.answers == []


async def test_a_node_without_the_slot_leaves_the_answer_to_the_one_that_holds_it() -> None:
    post, assignment = FakePost(holds_slot=False), FakeAssignment()
    await ask(post, assignment, encode(REQUEUE))
    assert post.wake.is_set()
    assert (assignment.requeued, post.answers) == (0, [])


async def test_a_request_that_cannot_be_read_is_dropped() -> None:
    post = FakePost()
    await ask(post, FakeAssignment(), b"{")
    assert not post.wake.is_set()
    assert post.answers == []


async def test_what_is_done_stays_done_without_a_broker_to_answer_through() -> None:
    post, assignment = FakePost(broken=True), FakeAssignment()
    desk = await ask(post, assignment, encode(REQUEUE))
    assert assignment.requeued == 1
    assert not desk._running


async def test_a_close_drops_what_is_not_answered_yet() -> None:
    post, assignment = FakePost(), FakeAssignment(wait=asyncio.Event())
    desk = desk_of(post, assignment)
    await desk._heard(Msg(Client(), subject="control", reply="inbox", data=encode(REQUEUE)))
    await asyncio.sleep(0)
    assert assignment.requeued == 1
    await asyncio.wait_for(desk.close(), 5)
    assert post.answers == []
