"""Handle operators' requests for a slot. Only the node that holds the slot answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nats.aio.msg import Msg

from shared import subjects
from shared.aio import cancel_all
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages.encoding import encode
from shared.messages.slots import Control, ControlAnswer, ControlKind, decode_control
from trainer_node.context import NodeContext
from trainer_node.job.reconciler import JobReconciler

log = get_logger()


class ControlHandler:
    """Handles requests between `open` and `close`; `tended` returns the job the node works on."""

    def __init__(self, context: NodeContext, tended: Callable[[], JobReconciler | None]) -> None:
        self.context = context
        self.tended = tended
        self._running: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen from now on."""
        await self.context.bus.subscribe(subjects.control(self.context.settings.slot), self._on_message)

    async def close(self) -> None:
        """Drop unanswered requests: the logs hold the truth."""
        await cancel_all(self._running)

    async def _on_message(self, message: Msg) -> None:
        """Start a task: the client library awaits callbacks one by one, and ending a worker takes seconds."""
        task = asyncio.create_task(self._serve(message), name="control")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _serve(self, message: Msg) -> None:
        try:
            control = decode_control(message.data)
        except ValueError as error:
            log.warning("a request can't be read", subject=message.subject, error=str(error))
            return
        self.context.wake.set()
        if not self.context.lease.may_write():  # the node that holds the slot will answer
            return
        refusal = await self._requeue(control) if control.kind is ControlKind.REQUEUE else None
        if not message.reply:
            return
        try:
            await self.context.bus.publish(
                message.reply, encode(ControlAnswer(refusal is None, refusal or ""))
            )
        except BusError as error:  # it is done all the same, as the chain shows
            log.warning("a request is not answered", task=control.task, error=str(error))

    async def _requeue(self, control: Control) -> str | None:
        """None once it is done, else why not."""
        reconciler = self.tended()
        if reconciler is None or reconciler.job.task != control.task:
            return f"the node of slot {self.context.settings.slot} is not at this task now"
        log.info("asked to requeue", task=control.task, gateway=control.gateway, reason=control.reason)
        return await reconciler.requeue()
