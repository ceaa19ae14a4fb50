"""Preference pairs: a row's own completion, and a real one that is worse.

Every other pair has the completion of another row, the nearest in length; that is fluent, and the chosen one
of its own prompt, so only the prompt tells that it is wrong. The rest have a worse copy of their own, some
words of which are missing or have changed places with the next one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from msgspec import Struct

from bench.arena.rows import Row, digest

WORSE_WORDS = 0.1  # of a copy, at least one
FEWEST_WORDS = 3  # in a text that has a worse copy


class PreferencePair(Struct, frozen=True):
    """One example of a DPO task."""

    prompt: str
    chosen: str
    rejected: str


def pairs(rows: Sequence[Row]) -> list[PreferencePair]:
    """Return a pair for every row; all rejected completions are of these rows.

    Rows of few words have another row's completion in any case.
    """
    others = nearest_in_length(rows)
    found = []
    for number, row in enumerate(rows):
        rejected = worsened(row.completion) if number % 2 else None
        rejected = rejected or others[number]
        if rejected is not None:
            found.append(PreferencePair(row.prompt, row.completion, rejected))
    return found


def nearest_in_length(rows: Sequence[Row]) -> list[str | None]:
    """Return for each row the next longer completion that is not its own, the next shorter for the longest.

    None if all completions are equal.
    """
    order = sorted(range(len(rows)), key=lambda number: _size(rows[number]))
    found: list[str | None] = [None] * len(rows)
    for place, number in enumerate(order):
        after, before = order[place + 1 :], reversed(order[:place])
        others = (rows[other].completion for part in (after, before) for other in part)
        found[number] = next((text for text in others if text != rows[number].completion), None)
    return found


def _size(row: Row) -> tuple[int, bytes]:
    return len(row.completion.encode()), digest(row.prompt, row.completion)


def worsened(text: str) -> str | None:
    """Return a copy without some words, or with words that changed places with the next one.

    None if it has too few words, or the copy would be equal. The blanks between words stay. The text alone
    decides what happens to it.
    """
    before, words, after = text.partition(text.strip())
    parts = re.split(r"(\s+)", words)  # words at even places
    count = len(parts) // 2 + 1
    if count < FEWEST_WORDS:
        return None
    dice = random.Random(text)
    hit = dice.sample(range(0, len(parts) - 1, 2), max(1, round(WORSE_WORDS * count)))
    if dice.random() < 0.5:
        gone = {place for word in hit for place in (word, word + 1)}
        parts = [part for place, part in enumerate(parts) if place not in gone]
    else:
        for word in hit:
            parts[word], parts[word + 2] = parts[word + 2], parts[word]
    copy = "".join((before, *parts, after))
    return None if copy == text else copy
