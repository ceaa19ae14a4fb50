"""One machine's share of a slot: its devices have one worker, however many nodes serve the slot here."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from shared.logs import get_logger
from shared.settings import Settings
from trainer_node.worker.slot_lock import SlotLock, command_line

POLL_S: Final = 0.05

log = get_logger()


class MachineSlot:
    """A second lock that every worker inherits, in the data folder: the slot's nodes on one machine share it.

    A node's own lock can't do this: a standby has a folder, and so a lock, of its own.
    """

    def __init__(self, settings: Settings) -> None:
        self.lock = SlotLock(settings.data / "slots" / settings.slot)

    async def clear(self, must_hold: Callable[[], None], grace_s: float) -> None:
        """Return when no worker is on the slot's devices; one of a node that lost the lease is made to go.

        `must_hold` raises if this node isn't the lease's holder: then it has no right to end anything.
        """
        await asyncio.to_thread(self.lock.path.parent.mkdir, parents=True, exist_ok=True)
        asked: dict[int, float] = {}
        while await asyncio.to_thread(self.lock.is_held):
            must_hold()
            for pid in await asyncio.to_thread(lambda: list(self._strangers())):
                if pid not in asked:
                    log.warning("another node's worker is on this slot's devices; ending it", pid=pid)
                    asked[pid] = time.monotonic()
                    _send(pid, signal.SIGTERM)
                elif time.monotonic() - asked[pid] > grace_s:
                    _send(pid, signal.SIGKILL)
            await asyncio.sleep(POLL_S)

    def _strangers(self) -> Iterator[int]:
        """Who holds the lock, but for nodes, which open it for a moment to look at it."""
        for pid in self.lock.holders():
            if pid != os.getpid() and command_line(pid)[-1:] != ["trainer_node"]:
                yield pid


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
