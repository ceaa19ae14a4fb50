"""The dependencies that all parts of one node share."""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec import Struct

from shared.broker.bus import Bus
from shared.messages.hardware import Hardware
from shared.settings import Settings
from trainer_node.lease import SlotLease
from trainer_node.worker.supervisor import Supervisor, Worker

DISMISS_GRACE_S: Final = 10.0  # for a worker that hangs, is late, or is no longer wanted


class NodeContext(Struct, frozen=True):
    """A node's parts: `wake` ends its waiting, `draining` its work."""

    settings: Settings
    bus: Bus
    lease: SlotLease
    supervisor: Supervisor
    node: str
    hardware: Hardware
    wake: asyncio.Event
    draining: asyncio.Event

    def worker_of(self, task: str) -> Worker | None:
        """Return the newest worker, running or ended, if it is this task's."""
        worker = self.supervisor.worker
        return worker if worker is not None and worker.file.task == task else None

    async def dismiss(self, why: str) -> None:
        """Stop the worker, with less patience than in a drain."""
        await self.supervisor.stop(why, grace_s=min(DISMISS_GRACE_S, self.settings.stop_grace_s))
