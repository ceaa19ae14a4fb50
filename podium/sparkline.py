"""A curve in one line of text, for terminals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

LEVELS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # blocks of one to eight eighths


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Return the values as blocks, the lowest as the lowest block; more than `width` are averaged."""
    if not values:
        return ""
    columns = means(values, width)
    low, high = min(columns), max(columns)
    if high == low:
        return LEVELS[0] * len(columns)
    return "".join(LEVELS[round((value - low) / (high - low) * (len(LEVELS) - 1))] for value in columns)


def means(values: Sequence[float], most: int) -> list[float]:
    """Return the means of at most `most` equal parts, in order."""
    if len(values) <= most:
        return list(values)
    borders = [round(number * len(values) / most) for number in range(most + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(borders)]
