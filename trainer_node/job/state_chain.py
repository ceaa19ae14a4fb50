"""One task's chain in STATE: claimed, submitting, result, each a compare-and-set on the task's subject."""

from __future__ import annotations

import msgspec

from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError, BusTimeoutError, ConflictError, PodiumError
from shared.messages import StateRecord, decode_state_record, encode
from trainer_node.lease import SlotLease


class FencedError(PodiumError):
    """Somebody else wrote to the chain: read it and decide again."""


class Chain:
    """The chain as its writer last saw it; every append expects exactly that."""

    def __init__(self, bus: Bus, lease: SlotLease, task: str) -> None:
        self.bus = bus
        self.lease = lease
        self.subject = subjects.state(lease.settings.slot, task)
        self.last: StateRecord | None = None
        self._sequence = 0

    async def read(self) -> StateRecord | None:
        """The newest record, or None for a task nobody claimed yet. Raises BusError."""
        record = await self.bus.last(subjects.STATE_STREAM, self.subject)
        self._sequence = record.sequence if record else 0
        try:
            self.last = decode_state_record(record.data) if record else None
        except msgspec.DecodeError as error:
            raise BusError(f"{self.subject} ends with a record that can't be read: {error}") from error
        return self.last

    async def append(self, record: StateRecord) -> None:
        """Store the chain's next record, knowing its own again if only the answer was lost.

        Raises LeaseLostError and BusUnavailableError (nothing was sent), FencedError (another record is
        there), and BusTimeoutError (not there when read; should it still land, the next read decides).
        """
        self.lease.must_hold()
        try:
            self._sequence = await self.bus.append(
                subjects.STATE_STREAM, self.subject, encode(record), last_on_subject=self._sequence
            )
            self.last = record
        except (ConflictError, BusTimeoutError) as error:
            found = await self.read()
            if found is not None and found.record_id == record.record_id:
                return
            if isinstance(error, ConflictError):
                raise FencedError(str(error)) from error
            raise
