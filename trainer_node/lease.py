"""The slot's lease: who may write for a slot, for how long, and under which epoch.

The lease only keeps two nodes from working at once; what fences a stale node is the compare-and-set on
every write of a task's chain.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from shared import subjects
from shared.aio import pause
from shared.broker.bus import REQUEST_TIMEOUT_S, Bus, Record
from shared.errors import BusError, ConflictError, PodiumError
from shared.logs import TroubleLog, get_logger
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.slots import Lease, decode_lease
from shared.settings import Settings

RETRY_S = 0.25  # between two tries while the lease is not held or the broker doesn't answer
DELETED = {"KV-Operation": "DEL"}  # what the `nats kv` command and every client take for "no such key"

log = get_logger()


class LeaseLostError(PodiumError):
    """The lease is not confirmed: nothing may be written until it is held again."""


class SlotLease:
    """This node's view of its slot's lease; `keep` holds it up for as long as it runs.

    `epoch` is 0 while no lease is held. `holder` is the other node that holds the slot, if one was seen.
    """

    def __init__(
        self,
        bus: Bus,
        settings: Settings,
        node: str,
        hardware: Hardware,
        *,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bus = bus
        self.settings = settings
        self.node = node
        self.hardware = hardware
        self.epoch = 0
        self.holder: str | None = None
        self.wake = asyncio.Event()
        self._on_change = on_change
        self._clock = clock
        self._key = subjects.lease(settings.slot)
        self._revision = 0
        self._confirmed_at = float("-inf")

    def may_write(self) -> bool:
        """Return whether a claim, submitting or result may be written now.

        The trust is shorter than the lease's time to live and counts from before the renewal was sent, so
        it ends before any other node can hold the slot.
        """
        return self.epoch > 0 and self._clock() - self._confirmed_at < self.settings.lease_trust_s

    def must_hold(self) -> None:
        """Raise LeaseLostError unless `may_write`."""
        if not self.may_write():
            raise LeaseLostError(f"no confirmed lease on slot {self.settings.slot}: nothing is written")

    async def keep(self) -> None:
        """Acquire the lease and renew it, for ever; without it wait as standby."""
        trouble = TroubleLog()
        while True:
            self.wake.clear()
            seconds = RETRY_S
            try:
                await self.turn()
                trouble.over()
                if self.epoch:
                    seconds = self.settings.lease_renew_s
            except BusError as error:
                if trouble.is_new(error):
                    log.warning("lease not confirmed", epoch=self.epoch, error=str(error))
            await pause(seconds, self.wake)

    async def turn(self) -> None:
        """Renew the lease once, or try once to acquire it. Raises BusError if the broker doesn't answer."""
        if self.epoch:
            await self._renew()
        else:
            await self._acquire()

    async def release(self) -> None:
        """Release the lease, if it is still ours."""
        if not self.epoch:
            return
        epoch, self.epoch = self.epoch, 0
        while True:
            try:
                await self._write(b"", headers=DELETED, timeout_s=REQUEST_TIMEOUT_S)
                log.info("lease released", epoch=epoch)
                return
            except ConflictError:
                record, current = await self._read()
            if record is None or not self._is_ours(record, current, epoch):
                log.info("lease was no longer ours", epoch=epoch)
                return
            self._revision = record.sequence  # of a renewal that was stored while it was cut off

    async def _acquire(self) -> None:
        record, current = await self._read()
        if current is not None and current.node != self.node:
            if self.holder != current.node:
                log.info("another node holds the slot; waiting as standby", holder=current.node)
                self._set(0, holder=current.node)
            return
        # A lease that an earlier process of this node left is taken over at once: if that process still
        # runs, its writes are refused from now on. A creation whose answer was lost ends here, too.
        self._revision = record.sequence if record else 0
        sent = self._clock()
        try:
            revision = await self._write(self._value(epoch=0))
        except ConflictError:
            self.wake.set()  # another writer was faster: read again
            return
        self._revision, self._confirmed_at = revision, sent
        self._set(revision, holder=None)
        log.info("lease acquired", epoch=revision)

    async def _renew(self) -> None:
        sent = self._clock()
        try:
            self._revision = await self._write(self._value(self.epoch))
        except ConflictError:
            await self._settle()
            return
        self._confirmed_at = sent

    async def _settle(self) -> None:
        """After a refused renewal: ours if an earlier one was stored and only its answer lost, else lost."""
        record, current = await self._read()
        if record is not None and self._is_ours(record, current, self.epoch):
            self._revision = record.sequence
            self.wake.set()  # not a confirmation, as the time of storing is unknown: renew now
            return
        if current is not None and current.node == self.node:
            log.error("another process uses this node's id; is the node folder a copy?", epoch=current.epoch)
        log.warning("lease lost", epoch=self.epoch, holder=current.node if current else None)
        self._set(0, holder=current.node if current and current.node != self.node else None)
        self.wake.set()

    def _is_ours(self, record: Record, current: Lease | None, epoch: int) -> bool:
        return (
            current is not None and current.node == self.node and (current.epoch or record.sequence) == epoch
        )

    async def _read(self) -> tuple[Record | None, Lease | None]:
        record = await self.bus.last(subjects.LEASES_STREAM, self._key)
        try:
            return record, decode_lease(record.data) if record and record.data else None
        except ValueError as error:
            raise BusError(f"the lease {self._key} can't be read: {error}") from error

    async def _write(
        self, value: bytes, headers: dict[str, str] | None = None, timeout_s: float | None = None
    ) -> int:
        return await self.bus.append(
            subjects.LEASES_STREAM,
            self._key,
            value,
            last_on_subject=self._revision,
            ttl_s=self.settings.lease_ttl_s,
            headers=headers,
            timeout_s=timeout_s or min(REQUEST_TIMEOUT_S, self.settings.lease_renew_s),
        )

    def _value(self, epoch: int) -> bytes:
        return encode(
            Lease(
                slot=self.settings.slot, node=self.node, epoch=epoch, hardware=self.hardware, at=time.time()
            )
        )

    def _set(self, epoch: int, *, holder: str | None) -> None:
        self.epoch, self.holder = epoch, holder
        self._on_change()
