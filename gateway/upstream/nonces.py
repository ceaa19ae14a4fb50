"""Which signed requests were seen: one store for all gateways, bounded, kept as long as a replay could pass.

Every gateway knows its own nonces at once, and those of the others within LOOK_S. The stream NONCES decides
between them: a claim is appended, and of two equal ones the one that is stored first counts. Claims that come
together share one append, and only what others wrote in between is read. A request that would change
something waits
for that; a refusal doesn't, as to refuse the same offer twice changes nothing. What can't be stored, as the
gateway starts or the broker is away, is stored as soon as it can be. If only the stream is what is wrong,
each gateway goes by what it has seen itself, and logs that: a validator asks only once.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections import defaultdict
from typing import Final

import msgspec
from msgspec import Struct

from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.logs import get_logger

WINDOW_S: Final = 120.0  # how far a nonce's time may be from ours, either way
BUCKET_S: Final = 60  # seen nonces are kept by the minute they say they are of
MOST_SEEN: Final = 1_000_000  # some 70 MB; 3,300 signed requests a second for five minutes
LARGEST_BATCH: Final = 4096  # claims in one message, some 20 bytes each
LOOK_S: Final = 1.0  # so often it is read what other gateways have seen, while nobody asks here
APPEND_TIMEOUT_S: Final = 1.0  # of the 3 s that upstream waits for an offer

log = get_logger()


Key = tuple[int, int]  # a nonce: its minute, and 63 bits that stand for it
Claim = tuple[Key, "asyncio.Future[bool]"]


class TooManyNoncesError(Exception):
    """The store is full: validators that may ask signed more requests than any would."""


class NonceBatch(Struct, frozen=True):
    """Claims of one gateway in one message: by minute, the keys."""

    gateway: str  # and which life of it
    minutes: dict[int, list[int]]


_decode = msgspec.json.Decoder(NonceBatch).decode


class Seen:
    """A bounded set of nonces that forgets those whose time is past. Pure."""

    def __init__(self, most: int = MOST_SEEN) -> None:
        self._most = most
        self._minutes: dict[int, set[int]] = defaultdict(set)
        self._count = 0

    def __contains__(self, nonce: Key) -> bool:
        minute, key = nonce
        return minute in self._minutes and key in self._minutes[minute]

    def __len__(self) -> int:
        return self._count

    def add(self, nonce: Key) -> bool:
        """Whether it is new. Raises TooManyNoncesError."""
        if nonce in self:
            return False
        if self._count >= self._most:
            raise TooManyNoncesError(f"more than {self._most} signed requests within minutes; ask later")
        self._minutes[nonce[0]].add(nonce[1])
        self._count += 1
        return True

    def forget(self, now: float) -> None:
        """Drop what could not pass any more."""
        oldest = int(now - WINDOW_S) // BUCKET_S
        for minute in [minute for minute in self._minutes if minute < oldest]:
            self._count -= len(self._minutes.pop(minute))


def nonce_key(validator: str, nonce: str, signed_at: float) -> Key:
    """The minute a nonce is of, and 63 bits that stand for it: of a million, two are equal once in 18 million
    times, and then one request is refused."""
    digest = hashlib.blake2b(f"{validator}:{nonce}".encode(), digest_size=8).digest()
    return int(signed_at) // BUCKET_S, int.from_bytes(digest) >> 1


class Nonces:
    """The store as one gateway sees it."""

    def __init__(self, gateway: str) -> None:
        self._life = f"{gateway}/{uuid.uuid4().hex[:8]}"  # an earlier life's claims are another's
        self._seen = Seen()
        self._bus: Bus | None = None
        self._last = 0  # sequence up to which NONCES was read
        self._waiting: list[Claim] = []  # not stored yet, oldest first; also those answered without
        self._lost: set[Key] = set()  # of these, those that another gateway stored first
        self._some = asyncio.Event()
        self._minute = 0  # in which what is past was last forgotten
        self._alone = False  # whether nothing could be shared when it was last tried

    def seen(self, validator: str, nonce: str, signed_at: float) -> bool:
        """Whether this gateway knows the nonce as used."""
        return nonce_key(validator, nonce, signed_at) in self._seen

    def claim(self, validator: str, nonce: str, signed_at: float) -> asyncio.Future[bool] | None:
        """Use a nonce up; None if this gateway knows it as used.

        The future tells whether it was the first claim on any gateway, once that is known: while the gateway
        starts, and while the link is down, it waits. Raises TooManyNoncesError.
        """
        key = nonce_key(validator, nonce, signed_at)
        self._forget()
        if not self._seen.add(key):
            return None
        claimed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, claimed))
        self._some.set()
        return claimed

    async def run(self, bus: Bus) -> None:
        """Share claims until cancelled; knows first what other gateways have seen."""
        self._bus, self._last = bus, 0
        bus.on_reconnect(self._some.set)
        try:
            await self._catch_up()
            while True:
                await self._asked()
                self._forget()
                if self._waiting:
                    await self._share()
                else:
                    await self._catch_up()
        finally:
            self._bus = None
            self._answer(self._waiting)
            self._waiting.clear()
            self._lost.clear()

    def _forget(self) -> None:
        """Once a minute, what is past."""
        now = time.time()
        if (minute := int(now) // BUCKET_S) == self._minute:
            return
        self._minute = minute
        self._seen.forget(now)
        self._waiting = [(key, claimed) for key, claimed in self._waiting if key in self._seen]
        self._lost &= {key for key, _ in self._waiting}

    async def _asked(self) -> None:
        """Return when somebody claims a nonce or the link is back, but after LOOK_S at the latest."""
        try:
            async with asyncio.timeout(LOOK_S):
                await self._some.wait()
        except TimeoutError:
            return
        finally:
            self._some.clear()

    async def _share(self) -> None:
        """Store what waits, and tell each claim whether it was the first. What can't be stored stays."""
        assert self._bus is not None
        while batch := self._waiting[:LARGEST_BATCH]:
            keys = {key for key, _ in batch}
            try:
                await self._store(keys)
            except BusError as error:
                self._go_alone(error)
                if self._bus.connected:  # the stream is what is wrong; offers can be decided on
                    self._answer(self._waiting)
                return
            self._alone = False
            self._waiting = [claim for claim in self._waiting if claim[0] not in keys]
            self._answer(batch)
            self._lost -= keys

    def _answer(self, claims: list[Claim]) -> None:
        for key, claimed in claims:
            if not claimed.done():
                claimed.set_result(key not in self._lost)

    async def _store(self, keys: set[Key]) -> None:
        """Append claims, and read what other gateways have stored before them."""
        assert self._bus is not None
        minutes: dict[int, list[int]] = {}
        for minute, key in keys:
            minutes.setdefault(minute, []).append(key)
        message = msgspec.json.encode(NonceBatch(self._life, minutes))
        sequence = await self._bus.append(
            subjects.NONCES_STREAM, subjects.NONCES, message, timeout_s=APPEND_TIMEOUT_S
        )
        if sequence == self._last + 1:
            self._last = sequence
            return
        if sequence <= self._last:  # the broker came back with an empty store
            self._last = 0
        await self._read(keys, sequence)

    async def _catch_up(self) -> None:
        """Know everything that is stored; without the stream, what this gateway itself sees has to do."""
        try:
            await self._read(set(), None)
            self._alone = False
        except BusError as error:
            self._go_alone(error)

    def _go_alone(self, error: BusError) -> None:
        """Say it once, not at every look."""
        if not self._alone:
            log.warning("nonces are not shared with other gateways now", error=str(error))
        self._alone = True

    async def _read(self, own: set[Key], own_sequence: int | None) -> None:
        """Fold what is stored, at least up to one's own claims.

        A claim that is stored neither yet nor before another's of the same nonce is lost to it. One whose
        answer was lost is stored twice: the first one counts.
        """
        assert self._bus is not None
        before: set[Key] = set()  # own ones that were stored by an earlier try
        while own_sequence is None or self._last < own_sequence:
            records = await self._bus.read(subjects.NONCES_STREAM, self._last, timeout_s=APPEND_TIMEOUT_S)
            waiting = {key for key, _ in self._waiting}
            for record in records:
                self._last = record.sequence
                if record.sequence == own_sequence:
                    before |= own
                    continue
                life, keys = self._fold(record.data)
                if life == self._life:
                    before |= keys
                else:
                    self._lost |= (keys & waiting) - before
            if not records:
                break

    def _fold(self, data: bytes) -> tuple[str, set[Key]]:
        """Whose claims were stored, and which."""
        try:
            batch = _decode(data)
        except ValueError as error:
            log.error("a stored batch of nonces can't be read", error=str(error))
            return "", set()
        keys = {(minute, key) for minute, keys in batch.minutes.items() for key in keys}
        for key in keys:
            try:
                self._seen.add(key)
            except TooManyNoncesError:
                log.error("the store of nonces is full")
                break
        return batch.gateway, keys
