"""Which validators have sent offers lately, so that one of them doesn't reserve every slot."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_KEPT = 1024  # validators; only a gateway without signatures can see that many names


class RecentValidators:
    """The newest offer of each validator, seen by this gateway."""

    def __init__(self, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._seen: dict[str, float] = {}  # in order of the newest offer

    def note(self, validator: str) -> None:
        """Note an offer of a validator; an empty name is an operator's, and not counted."""
        if not validator:
            return
        self._seen.pop(validator, None)
        self._seen[validator] = self._clock()
        if len(self._seen) > MOST_KEPT:
            del self._seen[next(iter(self._seen))]

    def has_other_than(self, validator: str) -> bool:
        """Return whether another validator has sent an offer within the window."""
        since = self._clock() - self._window_s
        return any(at > since and name != validator for name, at in self._seen.items())
