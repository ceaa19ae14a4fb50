"""Conversations of two to four turns, each of which is one row of a data set."""

from __future__ import annotations

import random
from collections.abc import Sequence

from msgspec import Struct

from bench.arena.rows import Row

TURNS = 2, 4


class ChatMessage(Struct, frozen=True):
    """What one side says."""

    role: str
    content: str


class Conversation(Struct, frozen=True):
    """One example of a chat task."""

    messages: list[ChatMessage]


def conversations(rows: Sequence[Row], most: int | None = None) -> list[Conversation]:
    """Return conversations of consecutive rows, `most` of them at most; no row is in two of them.

    How many turns one has is drawn from its first prompt alone. Rows that are too few for another one are
    left out.
    """
    found: list[Conversation] = []
    start = 0
    while start + TURNS[0] <= len(rows) and len(found) != most:
        turns = random.Random(rows[start].prompt).randint(*TURNS)
        found.append(Conversation([one for row in rows[start : start + turns] for one in _turn(row)]))
        start += turns
    return found


def _turn(row: Row) -> list[ChatMessage]:
    return [ChatMessage("user", row.prompt), ChatMessage("assistant", row.completion)]
