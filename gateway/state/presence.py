"""Who is there: heartbeats and leases -> live slots and their hardware; the newest progress of each task."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from msgspec import Struct
from nats.aio.msg import Msg

from shared import subjects
from shared.broker.bus import Bus
from shared.logs import get_logger
from shared.messages import Hardware, Heartbeat, Progress, decode_heartbeat, decode_lease, decode_progress

PROGRESS_KEPT = 256  # tasks; older ones are no longer looked at

log = get_logger()


class Sign(Struct, frozen=True):
    """The newest sign of life of one slot. `heard_at` is on this process's monotonic clock."""

    node: str
    epoch: int  # 0 = the node holds no lease
    hardware: Hardware
    heard_at: float
    heartbeat: Heartbeat | None = None  # none if it comes from a lease


class Presence:
    """What was heard of slots and runs. Nothing of it decides what is stored: that is the ledger's."""

    def __init__(self, missing_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.malformed = 0
        self.on_heard: Callable[[Heartbeat | Progress, bytes], None] = lambda message, data: None
        self._missing_s = missing_s
        self._clock = clock
        self._signs: dict[str, Sign] = {}
        self._progress: OrderedDict[str, Progress] = OrderedDict()

    async def start(self, bus: Bus) -> None:
        """Listen from now on."""
        await bus.subscribe(subjects.ANY_HEARTBEAT, self._heard_heartbeat)
        await bus.subscribe(subjects.ANY_PROGRESS, self._heard_progress)

    async def look_at_leases(self, bus: Bus, slots: tuple[str, ...]) -> None:
        """Take living leases as signs of life, so that a new gateway need not wait for heartbeats."""
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
            self._take(slot, Sign(lease.node, epoch, lease.hardware, self._clock()))

    def sign(self, slot: str) -> Sign | None:
        """The newest sign of life, however old."""
        return self._signs.get(slot)

    def age(self, slot: str) -> float | None:
        """Seconds since the newest sign of life."""
        sign = self._signs.get(slot)
        return None if sign is None else self._clock() - sign.heard_at

    def live(self, slot: str) -> bool:
        """Whether a node that holds the slot's lease was heard lately."""
        sign, age = self._signs.get(slot), self.age(slot)
        return sign is not None and age is not None and age < self._missing_s and sign.epoch > 0

    def progress(self, task: str) -> Progress | None:
        """The newest progress of a task's run."""
        return self._progress.get(task)

    def note_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Take in one heartbeat."""
        sign = Sign(heartbeat.node, heartbeat.epoch, heartbeat.hardware, self._clock(), heartbeat)
        self._take(heartbeat.slot, sign)

    def note_progress(self, progress: Progress) -> None:
        """Take in one progress message."""
        self._progress[progress.task] = progress
        self._progress.move_to_end(progress.task)
        if len(self._progress) > PROGRESS_KEPT:
            self._progress.popitem(last=False)

    def _take(self, slot: str, sign: Sign) -> None:
        """A standby or a stale node doesn't hide the living holder of the lease."""
        known = self._signs.get(slot)
        if known is None or known.node == sign.node or sign.epoch >= known.epoch or not self.live(slot):
            self._signs[slot] = sign

    async def _heard_heartbeat(self, message: Msg) -> None:
        try:
            heartbeat = decode_heartbeat(message.data)
            if message.subject != subjects.heartbeat(heartbeat.slot):
                raise ValueError(f"a heartbeat of slot {heartbeat.slot}")
        except ValueError as error:
            self.count_malformed(message.subject, error)
            return
        self.note_heartbeat(heartbeat)
        self.on_heard(heartbeat, message.data)

    async def _heard_progress(self, message: Msg) -> None:
        try:
            progress = decode_progress(message.data)
        except ValueError as error:
            self.count_malformed(message.subject, error)
            return
        self.note_progress(progress)
        self.on_heard(progress, message.data)

    def count_malformed(self, subject: str, error: ValueError) -> None:
        """Note a message that can't be read."""
        self.malformed += 1
        named = subjects.task_in(subject)
        log.warning("a message can't be read and is passed over", subject=subject, error=str(error), **named)
