"""Keep the ledger current by reading the logs; a message on NATS is only a hint to read now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from nats.aio.msg import Msg

from gateway.state.ledger import Ledger
from shared import subjects
from shared.aio import pause
from shared.broker.bus import Bus, Record
from shared.errors import BusError, BusUnavailableError, NobodyAnswersError
from shared.logs import TroubleLog, get_logger

RETRY_S = 0.25  # after a failed fold; JetStream is usable some 30 ms after a restarted server listens
FRESH_S = 1.0  # with no hint since, logs read this recently are good enough to refuse an offer
LOGS_TIMEOUT_S = 0.9  # an offer must be answered within upstream's 3 s: fold, append, fold

log = get_logger()


class Fold(NamedTuple):
    """How one fold ended."""

    number: int
    completed: bool
    failure: BusError | None


class ReplacedLogError(BusError):
    """The stream was replaced (for example a lost disk); in-memory state no longer matches it."""


def lost_log(stream: str) -> str:
    """Return what to do about the log of a slot that JOBS names and the broker doesn't have."""
    slot = subjects.slot_of_log(stream)
    return (
        f"{stream} holds the chains of slot {slot}, whose jobs are in JOBS, and is gone: restore it from a "
        f"mirror with `podium restore`, or have an empty one made by `podium bootstrap` with slot {slot} in "
        "PODIUM_SLOTS: then the slot's jobs count as not ended"
    )


class LogReader:
    """Fold JOBS and the slots' states into one ledger, one fold at a time; call `after_fold` after each."""

    def __init__(
        self,
        bus: Bus,
        ledger: Ledger,
        poll_s: float,
        folded: asyncio.Event | None = None,
        after_fold: Callable[[], None] = lambda: None,
    ) -> None:
        self.folded = folded or asyncio.Event()  # set by the first fold that reaches the ends of all logs
        self.current = False  # whether the newest fold reached the ends of all logs
        self.missing: str | None = None  # why: a slot's log isn't there
        self.read_at: float | None = None  # monotonic: when the newest fold began that reached them
        self._bus = bus
        self._ledger = ledger
        self._poll_s = poll_s
        self._after_fold = after_fold
        self._hint = asyncio.Event()
        self._folding: asyncio.Future[Fold] | None = None  # done when the current fold is over
        self._begun = 0  # folds begun
        self._hints = 0  # hints so far
        self._read_after = -1  # number of hints when that fold began
        self._ended = True  # whether the newest fold was completed
        self._failure: BusError | None = None  # and why it failed

    async def start(self) -> None:
        """Subscribe to hints."""
        for subject in (subjects.ANY_JOB, subjects.ANY_RESERVATION, subjects.ANY_STATE):
            await self._bus.subscribe(subject, self._on_hint)
        self._bus.on_reconnect(self._on_reconnect)

    async def run(self) -> None:
        """Fold on every hint, after a reconnect, and every `poll_s`. Raises ReplacedLogError."""
        trouble = TroubleLog()
        while True:
            self._hint.clear()
            try:
                await self.catch_up()
                trouble.over()
            except ReplacedLogError:
                raise
            except BusError as error:
                if trouble.is_new(error):
                    log.warning("can't read the logs, retrying", error=str(error))
            await pause(self._poll_s if self.current else RETRY_S, self._hint)

    @property
    def fresh(self) -> bool:
        """Return whether everything stored until a moment ago is folded, as far as hints show.

        Good enough to refuse on: a gateway that misses another's newest job sees a slot as free, not as
        taken, so it would accept, and accepting reads and compares first. Reading this property keeps it
        fresh: at half of FRESH_S it starts the next fold, so that under load no request waits for one.
        """
        if self.read_at is None:
            return False
        age = time.monotonic() - self.read_at
        if age > FRESH_S / 2:
            self._hint.set()
        return age < FRESH_S and self.current and self._read_after == self._hints and self._bus.connected

    async def catch_up(self) -> None:
        """Fold everything that was stored before this call.

        Calls that wait together share the next fold and its failure; but if the folding call runs out of
        time, another takes over. Raises BusError.
        """
        begun_before = self._begun
        while self._folding is not None:
            # Not a lock: it wakes one waiter per loop iteration, so hundreds would wait for each other.
            fold = await asyncio.shield(self._folding)
            if fold.number > begun_before and fold.completed:
                if fold.failure is not None:
                    raise BusUnavailableError(str(fold.failure)) from fold.failure
                return
        over = self._folding = asyncio.get_running_loop().create_future()
        try:
            await self._fold()
        finally:
            self._folding = None
            over.set_result(Fold(self._begun, self._ended, self._failure))

    async def _fold(self) -> None:
        self._begun += 1
        began, after = time.monotonic(), self._hints
        self._ended, self._failure = False, None
        try:
            # JOBS first: it may name a slot that the settings no longer have.
            await self._fold_stream(subjects.JOBS_STREAM)
            for stream in [name for name in self._ledger.folded if name != subjects.JOBS_STREAM]:
                await self._fold_stream(stream)
        except BusError as error:
            self._ended, self._failure = True, error
            self.current = False
            raise
        self._ended = True
        self.current, self.missing = True, None
        self.read_at, self._read_after = began, after
        self.folded.set()
        self._after_fold()

    async def _fold_stream(self, stream: str) -> None:
        if not self._bus.connected:
            raise BusUnavailableError("not connected to NATS")
        if not self.current and (known := self._ledger.newest.get(stream)) is not None:
            await self._must_still_hold(stream, known)
        after = self._ledger.folded.get(stream, 0)
        try:
            async for records in self._bus.read_all(stream, after, timeout_s=LOGS_TIMEOUT_S):
                for record in records:
                    self._ledger.apply(stream, record)
        except NobodyAnswersError as error:
            if stream == subjects.JOBS_STREAM:
                raise
            # JOBS did answer, so JetStream isn't starting.
            self.missing = lost_log(stream)
            raise BusUnavailableError(self.missing) from error

    async def _must_still_hold(self, stream: str, known: Record) -> None:
        """Check that the stream was not replaced: after a lost disk the old ledger must not be used."""
        records = await self._bus.read(
            stream, known.sequence - 1, subject=known.subject, timeout_s=LOGS_TIMEOUT_S
        )
        if not records or (records[0].sequence, records[0].data) != (known.sequence, known.data):
            raise ReplacedLogError(
                f"{stream} no longer holds the record {known.sequence} of {known.subject} that this gateway "
                "has read: it is another log, and the gateway must restart"
            )

    async def _on_hint(self, _: Msg) -> None:
        self._hints += 1
        self._hint.set()

    def _on_reconnect(self) -> None:
        self.current = False
        self._hint.set()
