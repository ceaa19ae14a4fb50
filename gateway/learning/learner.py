"""Feed the evidence from ledger and scores, and keep the tables that decisions use."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.learning.evidence import Evidence
from gateway.learning.rates import LearnedRates
from gateway.state.ledger import Ledger
from shared.messages.jobs import Score

REFRESH_S = 60.0  # in a minute evidence fades by 16 millionths


class Learner:
    """The current rates. Recomputing them takes no I/O, and most calls recompute nothing."""

    def __init__(self, ledger: Ledger, evidence: Evidence, clock: Callable[[], float] = time.time) -> None:
        self.evidence = evidence
        self._ledger = ledger
        self._clock = clock
        self._taken = 0  # how many of the ledger's results were counted
        self._early: list[tuple[str, str]] = []  # results whose job is not folded yet
        self._tables = LearnedRates()
        self._made = (-1, 0.0)  # of which version of the evidence, and when

    def apply_results(self) -> None:
        """Count what the ledger has folded since the last call."""
        ended = self._ledger.ended
        if self._taken == len(ended) and not self._early:
            return
        waiting, self._early = self._early + ended[self._taken :], []
        self._taken = len(ended)
        for slot, task in waiting:
            self._count(slot, task)

    def note_score(self, score: Score) -> None:
        """Count upstream's score of a task."""
        self.evidence.note_score(score)

    def tables(self) -> LearnedRates:
        """Return the current rates."""
        self.apply_results()
        now, (version, made_at) = self._clock(), self._made
        if version != self.evidence.version or not 0 <= now - made_at < REFRESH_S:
            self._tables, self._made = self.evidence.tables(now), (self.evidence.version, now)
        return self._tables

    def _count(self, slot: str, key: str) -> None:
        task = self._ledger.task(key)
        job = task.job if task is not None else None
        if job is None or job.slot != slot:  # states are read after JOBS and may be ahead
            self._early.append((slot, key))
            return
        result = self._ledger.chain_of(job).result
        if result is not None:
            # A clock that is ahead must not age all other evidence.
            at = min(result.at, self._clock())
            offer = job.offer
            self.evidence.note_result(key, offer.task_type, offer.model, result.status, at, result.code)
