"""SCORES: read by every gateway, written by compare-and-set on the task's own subject.

Unlike the logs it keeps one message per task and may drop the oldest: scores are evidence, not
promises, and upstream can be asked again. So gaps mean nothing here, and a replaced stream is read from its
start instead of ending the process.
"""

from __future__ import annotations

import asyncio

from nats.aio.msg import Msg

from gateway.learning.learner import Learner
from gateway.learning.score_form import same
from shared import subjects
from shared.aio import pause
from shared.broker.bus import Bus, Record
from shared.errors import BusError, BusTimeoutError, BusUnavailableError, ConflictError
from shared.logs import TroubleLog, get_logger
from shared.messages.encoding import encode
from shared.messages.jobs import Score, decode_score

STREAM = subjects.SCORES_STREAM
SCORES_TIMEOUT_S = 0.9
RETRY_S = 1.0
SCORE_TRIES = 8

log = get_logger()


class ScoreLog:
    """Read stored scores into the learner, and store posted ones."""

    def __init__(
        self, bus: Bus, learner: Learner, poll_s: float, read_once: asyncio.Event | None = None
    ) -> None:
        self.read_once = (
            read_once or asyncio.Event()
        )  # set after the first attempt to read, successful or not
        self.malformed = 0
        self._bus = bus
        self._learner = learner
        self._poll_s = poll_s
        self._hint = asyncio.Event()
        self._lock = asyncio.Lock()
        self._newest: Record | None = None
        self._sure = True  # whether the stream is still the one that was read

    async def start(self) -> None:
        """Subscribe to hints."""
        await self._bus.subscribe(subjects.ANY_SCORE, self._on_hint)
        self._bus.on_reconnect(self._on_reconnect)

    async def run(self) -> None:
        """Read on every hint, after a reconnect, and every `poll_s`; forever."""
        trouble = TroubleLog()
        while True:
            self._hint.clear()
            try:
                await self.catch_up()
                trouble.over()
            except BusError as error:
                if trouble.is_new(error):
                    log.warning("can't read SCORES, retrying; rates stay unchanged", error=str(error))
            self.read_once.set()
            await pause(RETRY_S if trouble.lasts else self._poll_s, self._hint)

    async def catch_up(self) -> None:
        """Read everything that was stored before this call. Raises BusError."""
        async with self._lock:
            if not self._bus.connected:
                raise BusUnavailableError("not connected to NATS")
            if not self._sure:
                self._sure = True
                try:
                    await self._check_replaced()
                except BusError:
                    self._sure = False
                    raise
            async for records in self._bus.read_all(STREAM, self._last, timeout_s=SCORES_TIMEOUT_S):
                for record in records:
                    self._apply(record)

    async def store(self, score: Score, *, dated: bool) -> bool:
        """Store a score unless the same is stored; return whether it was new. Raises BusError."""
        subject, cause = subjects.score(score.task), None
        for attempt in range(SCORE_TRIES):
            stored = await self._bus.last(STREAM, subject)
            known = _decoded(stored) if stored is not None else None
            if known is not None and same(known, score, dated=dated):
                return attempt > 0 and known.record_id == score.record_id
            last = stored.sequence if stored is not None else 0
            try:
                await self._bus.append(STREAM, subject, encode(score), last_on_subject=last)
            except (ConflictError, BusTimeoutError) as error:
                cause = error
                continue
            return True
        raise BusUnavailableError(
            f"the score of {score.task} could not be stored in {SCORE_TRIES} tries: {cause}"
        )

    @property
    def _last(self) -> int:
        return self._newest.sequence if self._newest is not None else 0

    async def _check_replaced(self) -> None:
        """Forget all scores unless the newest record read, or a later one of its task, is still stored."""
        if (known := self._newest) is None:
            return
        found = await self._bus.last(STREAM, known.subject)
        if found is not None and (
            found.sequence > known.sequence or (found.sequence, found.data) == (known.sequence, known.data)
        ):
            return
        log.warning("SCORES was replaced; its earlier scores are forgotten until they are imported again")
        self._newest = None
        self._learner.evidence.forget_scores()

    def _apply(self, record: Record) -> None:
        self._newest = record
        score = _decoded(record)
        if score is None:
            self.malformed += 1
            log.error(
                "malformed score skipped",
                sequence=record.sequence,
                subject=record.subject,
            )
            return
        self._learner.note_score(score)

    async def _on_hint(self, _: Msg) -> None:
        self._hint.set()

    def _on_reconnect(self) -> None:
        self._sure = False
        self._hint.set()


def _decoded(record: Record) -> Score | None:
    """Return the score in a record; None for anything else."""
    try:
        score = decode_score(record.data)
    except ValueError:
        return None
    return score if record.subject == subjects.score(score.task) else None
