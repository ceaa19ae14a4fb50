"""Conversations of the arena: every row once, two to four turns, and always the same."""

from __future__ import annotations

from collections import Counter

from bench.arena.kinds.conversations import TURNS, Conversation, conversations
from bench.arena.rows import Row

ROWS = [Row(f"what is {number}", f"it is {number * 7}") for number in range(301)]


def rows_in(found: list[Conversation]) -> list[Row]:
    sides = [(one.messages[::2], one.messages[1::2]) for one in found]
    return [
        Row(asked.content, answered.content) for side in sides for asked, answered in zip(*side, strict=True)
    ]


def test_turns_are_rows_in_their_order_and_none_comes_twice() -> None:
    found = conversations(ROWS)
    assert rows_in(found) in (ROWS, ROWS[:-1])
    lengths = Counter(len(one.messages) // 2 for one in found)
    assert set(lengths) == set(range(TURNS[0], TURNS[1] + 1))
    assert min(lengths.values()) > 20


def test_sides_take_turns_and_the_user_begins() -> None:
    for one in conversations(ROWS):
        assert [message.role for message in one.messages] == ["user", "assistant"] * (len(one.messages) // 2)


def test_the_first_ones_do_not_depend_on_how_many_are_wanted() -> None:
    assert conversations(ROWS, 10) == conversations(ROWS)[:10]


def test_a_single_row_makes_no_conversation() -> None:
    assert conversations(ROWS[:1]) == []
