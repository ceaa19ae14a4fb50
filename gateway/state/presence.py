"""Heartbeats and leases -> live slots and their hardware; the newest progress of each task."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from msgspec import Struct
from nats.aio.msg import Msg

from shared import subjects
from shared.broker.bus import Bus
from shared.logs import get_logger
from shared.messages.hardware import Hardware
from shared.messages.runs import Progress, decode_progress
from shared.messages.slots import Heartbeat, decode_heartbeat, decode_lease

PROGRESS_KEPT = 256  # tasks; older ones are dropped

log = get_logger()


class Sign(Struct, frozen=True):
    """The newest sign of life of one slot. `received_at` is on this process's monotonic clock."""

    node: str
    epoch: int  # 0 = the node holds no lease
    hardware: Hardware
    received_at: float
    heartbeat: Heartbeat | None = None  # none if it comes from a lease


def progress_in(subject: str, data: bytes, slot_of: Callable[[str], str | None]) -> Progress | None:
    """Return a message's progress; None if its task has no job, so that it is nobody's.

    The broker lets a node publish on its slot's subjects only. So it counts as the progress of a job on that
    slot, and of no other. Raises ValueError.
    """
    progress = decode_progress(data)
    if subject != subjects.progress(progress.slot, progress.task):
        raise ValueError(f"progress of {progress.task} on slot {progress.slot}")
    slot = slot_of(progress.task)
    if slot is not None and slot != progress.slot:
        raise ValueError(f"{progress.task} is a job of slot {slot}")
    return progress if slot is not None else None


class Presence:
    """Heartbeats and progress of slots and runs. They decide nothing that is stored: the ledger does."""

    def __init__(
        self,
        missing_s: float,
        clock: Callable[[], float] = time.monotonic,
        slot_of: Callable[[str], str | None] = lambda task: None,
    ) -> None:
        self.malformed = 0
        self.on_message: Callable[[Heartbeat | Progress, bytes], None] = lambda message, data: None
        self._missing_s = missing_s
        self._clock = clock
        self._slot_of = slot_of  # the slot that a task's job is on, by the ledger
        self._signs: dict[str, Sign] = {}
        self._progress: OrderedDict[str, Progress] = OrderedDict()

    async def start(self, bus: Bus) -> None:
        """Subscribe."""
        await bus.subscribe(subjects.ANY_HEARTBEAT, self._on_heartbeat)
        await bus.subscribe(subjects.ANY_PROGRESS, self._on_progress)

    async def read_leases(self, bus: Bus, slots: tuple[str, ...]) -> None:
        """Count held leases as signs of life, so that a new gateway need not wait for heartbeats."""
        for slot in slots:
            record = await bus.last(subjects.LEASES_STREAM, subjects.lease(slot))
            if record is None or not record.data:
                continue
            try:
                lease = decode_lease(record.data)
            except ValueError as error:
                self.count_malformed(record.subject, error)
                continue
            epoch = lease.epoch or record.sequence
            self._apply(slot, Sign(lease.node, epoch, lease.hardware, self._clock()))

    def sign(self, slot: str) -> Sign | None:
        """Return the newest sign of life, however old."""
        return self._signs.get(slot)

    def age(self, slot: str) -> float | None:
        """Return the seconds since the newest sign of life."""
        sign = self._signs.get(slot)
        return None if sign is None else self._clock() - sign.received_at

    def live(self, slot: str) -> bool:
        """Return whether a node that holds the slot's lease sent a sign of life recently."""
        sign, age = self._signs.get(slot), self.age(slot)
        return sign is not None and age is not None and age < self._missing_s and sign.epoch > 0

    def progress(self, task: str) -> Progress | None:
        """Return the newest progress of a task's run."""
        return self._progress.get(task)

    def note_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Apply one heartbeat."""
        sign = Sign(heartbeat.node, heartbeat.epoch, heartbeat.hardware, self._clock(), heartbeat)
        self._apply(heartbeat.slot, sign)

    def note_progress(self, progress: Progress) -> None:
        """Apply one progress message."""
        self._progress[progress.task] = progress
        self._progress.move_to_end(progress.task)
        if len(self._progress) > PROGRESS_KEPT:
            self._progress.popitem(last=False)

    def _apply(self, slot: str, sign: Sign) -> None:
        """Keep the newest sign; a standby or a stale node must not hide the live holder of the lease."""
        known = self._signs.get(slot)
        if known is None or known.node == sign.node or sign.epoch >= known.epoch or not self.live(slot):
            self._signs[slot] = sign

    async def _on_heartbeat(self, message: Msg) -> None:
        try:
            heartbeat = decode_heartbeat(message.data)
            if message.subject != subjects.heartbeat(heartbeat.slot):
                raise ValueError(f"a heartbeat of slot {heartbeat.slot}")
        except ValueError as error:
            self.count_malformed(message.subject, error)
            return
        self.note_heartbeat(heartbeat)
        self.on_message(heartbeat, message.data)

    async def _on_progress(self, message: Msg) -> None:
        try:
            progress = progress_in(message.subject, message.data, self._slot_of)
        except ValueError as error:
            self.count_malformed(message.subject, error)
            return
        if progress is None:
            return
        self.note_progress(progress)
        self.on_message(progress, message.data)

    def count_malformed(self, subject: str, error: ValueError) -> None:
        """Count and log a malformed message."""
        self.malformed += 1
        named = subjects.task_in(subject)
        log.warning("malformed message skipped", subject=subject, error=str(error), **named)
