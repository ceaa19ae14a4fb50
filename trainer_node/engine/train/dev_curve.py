"""The development curve of a run: when to measure, when the loss has turned, and where it was lowest.

Held-out loss falls, and rises again when rows are repeated too often: 500 rows, SmolLM2-135M, 4 epochs end at
5.00 where 2 epochs end at 4.17. Nothing here touches weights or clocks, so every rule can be tested anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from shared.planning.recipe import CurveRule

HOUSE = CurveRule()

LATEST_TURN = 0.85  # of progress: after it the decay ends the run as fast as a cool-down would
COOLDOWN = 0.5  # of the tokens up to the lowest point: how long the rate takes to fall to zero


class Point(Struct, frozen=True):
    """One measurement during training."""

    step: int
    tokens: int
    loss: float | None  # None: it was no number (JSON has none for it)


class DevCurve(Struct, frozen=True, kw_only=True):
    """What a run has measured so far; part of every checkpoint."""

    points: list[Point] = []
    best_losses: list[float] = []  # row by row, at the lowest point
    last_losses: list[float] = []  # at the newest point
    spent_s: float = 0.0

    @property
    def best(self) -> Point | None:
        """Return the lowest point; the earliest of equals."""
        measured = [point for point in self.points if point.loss is not None]
        return min(measured, key=lambda point: point.loss or 0.0, default=None)

    def extended(self, step: int, tokens: int, losses: Sequence[float], seconds: float) -> DevCurve:
        """Return the curve with one more point."""
        mean, best = float(np.mean(losses)), self.best
        finite = math.isfinite(mean)
        point = Point(step, tokens, mean if finite else None)
        lowest = finite and (best is None or mean < (best.loss or 0.0))
        return DevCurve(
            points=[*self.points, point],
            best_losses=list(losses) if lowest else self.best_losses,
            last_losses=list(losses) if finite else [],
            spent_s=self.spent_s + seconds,
        )

    @property
    def is_at_best(self) -> bool:
        """Return whether the newest point is the lowest."""
        return bool(self.points) and self.best is self.points[-1]

    def lowest(self, count: int) -> list[Point]:
        """Return the points of lowest loss, at most so many; the earliest of equals first."""
        measured = [point for point in self.points if point.loss is not None]
        return sorted(measured, key=lambda point: point.loss or 0.0)[:count]

    def turned(self, rule: CurveRule = HOUSE) -> bool:
        """Return whether the newest points lie above the lowest one by more than the rule allows."""
        best = self.best
        if best is None:
            return False
        after = [point for point in self.points if point.tokens > best.tokens]
        least = (best.loss or 0.0) * (1.0 + rule.rise)
        newest = after[-rule.rises :]
        if len(newest) < rule.rises or any(point.loss is not None and point.loss < least for point in newest):
            return False
        if after[-1].loss is None:
            return True
        difference = np.array(self.last_losses) - np.array(self.best_losses)
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
        return float(difference.mean()) > rule.errors * error

    def due(self, tokens: int, epoch_tokens: float, all_tokens: float, rule: CurveRule = HOUSE) -> bool:
        """Return whether the next point is due after `tokens` trained ones; the run has `all_tokens`."""
        first, every = rule.first_epochs * epoch_tokens, rule.every_epochs * epoch_tokens
        every = max(every, all_tokens / rule.most_points)
        last = self.points[-1].tokens if self.points else None
        return tokens >= first if last is None else tokens >= last + every

    def affordable(self, cost_s: float, trained_s: float, rule: CurveRule = HOUSE) -> bool:
        """Return whether one more measurement keeps within its share of the time that training took."""
        return self.spent_s + cost_s <= rule.share * trained_s


def cooldown_tokens(best: Point) -> int:
    """Return how many tokens to train on from the lowest point while the rate falls to zero."""
    return max(1, int(COOLDOWN * best.tokens))
