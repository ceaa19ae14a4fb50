"""The replay check: a bounded nonce store shared by all gateways, kept as long as a replay could be accepted.

A gateway knows its own nonces at once, and those of the others within POLL_S. The stream NONCES decides
between gateways: each appends its claims, and of two equal ones the one stored first wins. Concurrent claims
share one append, after which only the records of others in between are read. A request that changes state
waits for this; a rejection doesn't, because rejecting the same offer twice changes nothing. Claims that can't
be stored, while the gateway starts or the broker is unreachable, are stored as soon as possible. If only the
stream fails, each gateway uses its own nonces and logs that: a validator sends a request only once.
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
from shared.aio import pause
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages.encoding import decoder

WINDOW_S: Final = 120.0  # largest difference between a nonce's time and ours, in either direction
BUCKET_S: Final = 60  # nonces are grouped by the minute of their time
MOST_SEEN: Final = 1_000_000  # about 70 MB; 3,300 signed requests a second for five minutes
LARGEST_BATCH: Final = 4096  # claims in one message, about 20 bytes each
POLL_S: Final = 1.0  # poll interval for other gateways' nonces, while no request arrives
APPEND_TIMEOUT_S: Final = 1.0  # upstream waits 3 s for an offer

log = get_logger()


Key = tuple[int, int]  # a nonce: its minute, and a 63-bit hash
Claim = tuple[Key, "asyncio.Future[bool]"]


class TooManyNoncesError(Exception):
    """The store is full: allowed validators signed far more requests than normal."""


class NonceBatch(Struct, frozen=True):
    """Claims of one gateway in one message: keys by minute."""

    gateway: str  # name and random id of the process
    minutes: dict[int, list[int]]


_decode = decoder(NonceBatch)


class Seen:
    """A bounded set of nonces that drops expired ones. Pure."""

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
        """Add a nonce; return whether it is new. Raises TooManyNoncesError."""
        if nonce in self:
            return False
        if self._count >= self._most:
            raise TooManyNoncesError(f"more than {self._most} signed requests within minutes; retry later")
        self._minutes[nonce[0]].add(nonce[1])
        self._count += 1
        return True

    def forget(self, now: float) -> None:
        """Drop nonces whose requests would be refused by their time."""
        oldest = int(now - WINDOW_S) // BUCKET_S
        for minute in [minute for minute in self._minutes if minute < oldest]:
            self._count -= len(self._minutes.pop(minute))


def nonce_key(validator: str, nonce: str, signed_at: float) -> Key:
    """Return a nonce's minute and 63-bit hash.

    Among a million nonces, two collide once in 18 million times; then one request is refused.
    """
    digest = hashlib.blake2b(f"{validator}:{nonce}".encode(), digest_size=8).digest()
    return int(signed_at) // BUCKET_S, int.from_bytes(digest) >> 1


class Nonces:
    """One gateway's view of the store."""

    def __init__(self, gateway: str) -> None:
        self._life = (
            f"{gateway}/{uuid.uuid4().hex[:8]}"  # claims of an earlier process count as another gateway's
        )
        self._seen = Seen()
        self._bus: Bus | None = None
        self._last = 0  # sequence up to which NONCES was read
        self._waiting: list[Claim] = []  # not stored yet, oldest first; some may already be answered
        self._lost: set[Key] = set()  # of these, the ones that another gateway stored first
        self._some = asyncio.Event()
        self._minute = 0  # minute of the last `_forget`
        self._alone = False  # whether the last attempt to share failed

    def seen(self, validator: str, nonce: str, signed_at: float) -> bool:
        """Return whether this gateway knows that the nonce was used."""
        return nonce_key(validator, nonce, signed_at) in self._seen

    def claim(self, validator: str, nonce: str, signed_at: float) -> asyncio.Future[bool] | None:
        """Claim a nonce; return None if this gateway knows that it was used.

        The future resolves to whether this was the first claim on any gateway. While the gateway starts or is
        disconnected, it stays pending. Raises TooManyNoncesError.
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
        """Read other gateways' nonces, then share claims until cancelled."""
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
        """Drop expired nonces, once a minute."""
        now = time.time()
        if (minute := int(now) // BUCKET_S) == self._minute:
            return
        self._minute = minute
        self._seen.forget(now)
        self._waiting = [(key, claimed) for key, claimed in self._waiting if key in self._seen]
        self._lost &= {key for key, _ in self._waiting}

    async def _asked(self) -> None:
        """Wait for a claim or a reconnect, for at most POLL_S."""
        await pause(POLL_S, self._some)
        self._some.clear()

    async def _share(self) -> None:
        """Store the waiting claims and resolve each. Claims that can't be stored stay."""
        assert self._bus is not None
        while batch := self._waiting[:LARGEST_BATCH]:
            keys = {key for key, _ in batch}
            try:
                await self._store(keys)
            except BusError as error:
                self._go_alone(error)
                if self._bus.connected:  # only the stream fails; offers can still be decided
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
        """Append claims, and read the claims that other gateways stored before them."""
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
        """Read everything that is stored; if that fails, only this gateway's own nonces count."""
        try:
            await self._read(set(), None)
            self._alone = False
        except BusError as error:
            self._go_alone(error)

    def _go_alone(self, error: BusError) -> None:
        """Log the failure once, not at every attempt."""
        if not self._alone:
            log.warning("replay check is local: can't share nonces with other gateways", error=str(error))
        self._alone = True

    async def _read(self, own: set[Key], own_sequence: int | None) -> None:
        """Apply stored batches, at least up to our own claims.

        If another gateway stored the same nonce first, our claim loses. A claim whose acknowledgement is lost
        is stored twice: the first one counts.
        """
        assert self._bus is not None
        before: set[Key] = set()  # our claims that an earlier attempt has stored
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
        """Apply one stored batch; return its gateway and its keys."""
        try:
            batch = _decode(data)
        except ValueError as error:
            log.error("malformed record in the nonce stream", error=str(error))
            return "", set()
        keys = {(minute, key) for minute, keys in batch.minutes.items() for key in keys}
        for key in keys:
            try:
                self._seen.add(key)
            except TooManyNoncesError:
                log.error("the nonce store is full")
                break
        return batch.gateway, keys
