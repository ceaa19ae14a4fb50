"""Upstream's rules for who wins a task, on the losses of two submissions row by row.

group: the lower mean. knockout: more rows won, where a gap of at most .01 nat counts for nobody, and not
worse on the mean. boss: at least 55% of the decided rows and a mean gap of at least the larger of .01 nat and
1% of the boss's loss, both at a one-sided 99% bootstrap bound.
"""

from __future__ import annotations

import math

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

DEAD_ZONE = 0.01  # nat
BOSS_ROWS, BOSS_GAP, BOSS_SHARE = 0.55, 0.01, 0.01
RESAMPLES, BOUND = 10_000, 0.01
WILSON_Z = 1.96

Losses = NDArray[np.float64]


class Duel(Struct, frozen=True):
    """What one submission's losses against another's say."""

    margin: float  # nat by which the first is better on the mean
    rows_won: float  # of the decided rows
    group: bool
    knockout: bool
    boss: bool


def duel(mine: Losses, others: Losses, seed: int = 0) -> Duel:
    """Judge two submissions on the same rows, float64[N]; lower is better."""
    gaps = others - mine
    won, lost = gaps > DEAD_ZONE, gaps < -DEAD_ZONE
    decided = int(won.sum() + lost.sum())
    margin = float(gaps.mean())
    return Duel(
        margin=margin,
        rows_won=float(won.sum()) / decided if decided else 0.5,
        group=margin > 0.0,
        knockout=bool(won.sum() > lost.sum()) and margin >= 0.0,
        boss=_beats_boss(gaps, float(others.mean()), seed),
    )


def _beats_boss(gaps: Losses, boss_loss: float, seed: int) -> bool:
    random = np.random.default_rng(seed)
    won, lost = (gaps > DEAD_ZONE).astype(float), (gaps < -DEAD_ZONE).astype(float)
    means = np.empty(RESAMPLES)
    shares = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):
        rows = random.integers(0, len(gaps), (500, len(gaps)))
        means[start : start + 500] = gaps[rows].mean(axis=1)
        wins, losses = won[rows].sum(axis=1), lost[rows].sum(axis=1)
        shares[start : start + 500] = wins / np.maximum(1.0, wins + losses)
    needed = max(BOSS_GAP, BOSS_SHARE * boss_loss)
    return bool(np.quantile(shares, BOUND) >= BOSS_ROWS and np.quantile(means, BOUND) >= needed)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95% interval of a share."""
    if trials == 0:
        return 0.0, 1.0
    share, z = successes / trials, WILSON_Z
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (centre - spread) / scale, (centre + spread) / scale
