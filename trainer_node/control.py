"""Where a node hears what operators ask of its slot; only the node that holds the slot answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from nats.aio.msg import Msg

from shared import subjects
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages import Control, ControlAnswer, ControlKind, decode_control, encode
from trainer_node.context import Post
from trainer_node.job.reconciler import Assignment

log = get_logger()


class Desk:
    """Takes requests from `open` to `close`; `tended` is asked for the job the node is at."""

    def __init__(self, post: Post, tended: Callable[[], Assignment | None]) -> None:
        self.post = post
        self.tended = tended
        self._running: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen from now on."""
        await self.post.bus.subscribe(subjects.control(self.post.settings.slot), self._heard)

    async def close(self) -> None:
        """Drop unanswered requests: the logs hold the truth."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _heard(self, message: Msg) -> None:
        """The client library awaits its callbacks one by one, and ending a worker takes seconds."""
        task = asyncio.create_task(self._serve(message), name="control")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _serve(self, message: Msg) -> None:
        try:
            control = decode_control(message.data)
        except msgspec.DecodeError as error:
            log.warning("a request can't be read", subject=message.subject, error=str(error))
            return
        self.post.wake.set()
        if not self.post.lease.may_write():  # the node that holds the slot will answer
            return
        refusal = await self._requeue(control) if control.kind is ControlKind.REQUEUE else None
        if not message.reply:
            return
        try:
            await self.post.bus.publish(message.reply, encode(ControlAnswer(refusal is None, refusal or "")))
        except BusError as error:  # it is done all the same, as the chain shows
            log.warning("a request is not answered", task=control.task, error=str(error))

    async def _requeue(self, control: Control) -> str | None:
        """None once it is done, else why not."""
        assignment = self.tended()
        if assignment is None or assignment.job.task != control.task:
            return f"the node of slot {self.post.settings.slot} is not at this task now"
        log.info("asked to requeue", task=control.task, gateway=control.gateway, reason=control.reason)
        return await assignment.requeue()
