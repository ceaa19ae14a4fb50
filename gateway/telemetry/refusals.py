"""Who was refused at upstream's endpoints, and why: counted, logged at a bounded rate, kept for an hour.

The address is the one that the request claims: only a valid signature proves it, and most of these have none.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from enum import StrEnum
from typing import Final

import msgspec

from gateway.views.schemas import RefusedCaller
from shared.logs import get_logger

KEPT_S: Final = 3600.0  # how long a refusal is shown; the same one is logged once in this time
MOST_CALLERS: Final = 256  # anyone can claim addresses: the oldest are dropped
LOGGED_PER_MINUTE: Final = 10
LONGEST_ADDRESS: Final = 64  # an ss58 address has 48 characters

log = get_logger()


class RefusalReason(StrEnum):
    """Why a request was refused with 401, 403 or 429."""

    UNKNOWN = "unknown_validator"
    STAKE = "little_stake"
    NO_HOTKEY = "no_hotkey"
    FOREIGN = "not_local"
    CLOCK = "nonce_time"
    REPLAY = "nonce_used"
    OTHER_MINER = "other_miner"
    SIGNATURE = "signature"
    TOO_MANY = "too_many_nonces"


class Refusals:
    """The refusals of this gateway since it started, and those of the last hour by caller."""

    def __init__(self) -> None:
        self.counts: Counter[RefusalReason] = Counter()
        self._callers: OrderedDict[tuple[str, RefusalReason], RefusedCaller] = OrderedDict()
        self._minute_began = 0.0
        self._logged = 0  # in this minute
        self._unlogged = 0  # since the newest line

    def refused(self, claimed: str, reason: RefusalReason, detail: str, now: float) -> None:
        """Count one refused request, and log it if this caller was not refused for this within an hour."""
        self.counts[reason] += 1
        address = claimed[:LONGEST_ADDRESS]
        known = self._callers.pop((address, reason), None)
        if known is None or now - known.first_at > KEPT_S:
            known = RefusedCaller(validator=address, reason=reason, detail=detail, first_at=now, last_at=now)
            self._log(known, now)
        self._callers[address, reason] = msgspec.structs.replace(
            known, requests=known.requests + 1, last_at=now
        )
        if len(self._callers) > MOST_CALLERS:
            self._callers.popitem(last=False)

    def recent(self, now: float) -> list[RefusedCaller]:
        """Return the callers that were refused in the last hour, the newest last."""
        return [caller for caller in self._callers.values() if now - caller.last_at <= KEPT_S]

    def _log(self, caller: RefusedCaller, now: float) -> None:
        if now - self._minute_began > 60:
            self._minute_began, self._logged = now, 0
        if self._logged >= LOGGED_PER_MINUTE:
            self._unlogged += 1
            return
        self._logged += 1
        log.warning(
            "request of a validator refused",
            validator=caller.validator,
            reason=caller.reason,
            detail=caller.detail,
            not_logged_before=self._unlogged,
        )
        self._unlogged = 0
