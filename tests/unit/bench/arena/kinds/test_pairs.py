"""Preference pairs of the arena: what is rejected is real, worse, and always the same."""

from __future__ import annotations

import random

from bench.arena.kinds.pairs import nearest_in_length, pairs, worsened
from bench.arena.rows import Row

DRAW = random.Random(0)
WORDS = [
    first + last
    for first in ("ba", "ke", "li", "mo", "su", "ti", "vo", "za")
    for last in ("dor", "fin", "gat", "rel", "zon")
]
ROWS = [Row(f"what is {number}", " ".join(DRAW.sample(WORDS, DRAW.randint(5, 40)))) for number in range(200)]


def test_half_are_rejected_for_the_prompt_and_half_for_the_text() -> None:
    found = pairs(ROWS)
    assert [(one.prompt, one.chosen) for one in found] == [(row.prompt, row.completion) for row in ROWS]
    completions = {row.completion for row in ROWS}
    real = [one.rejected in completions for one in found]
    assert real == [True, False] * 100
    assert all(one.rejected != one.chosen for one in found)
    assert pairs(ROWS) == found


def test_another_rows_completion_is_of_similar_length() -> None:
    for row, other in zip(ROWS, nearest_in_length(ROWS), strict=True):
        assert other is not None
        assert abs(len(other) - len(row.completion)) <= 20


def test_a_worse_copy_has_the_words_and_blanks_of_the_text() -> None:
    text = "one  two\n    three four\nfive six seven eight nine ten eleven"
    kinds = set()
    for number in range(20):
        copy = worsened(f"{text} {number}\n")
        assert copy is not None
        assert set(copy.split()) <= set(f"{text} {number}".split())
        kinds.add(len(copy.split()) - len(text.split()) - 1)
        assert "\n    " in copy
        assert copy.endswith("\n")
    assert kinds == {0, -1}


def test_few_words_have_no_worse_copy() -> None:
    assert worsened("two words") is None
    assert {worsened(" ".join(["so"] * count)) for count in (3, 4, 5)} <= {
        None,
        "so so",
        "so so so",
        "so so so so",
    }
    found = pairs([Row("a", "yes"), Row("b", "no"), Row("c", "no")])
    assert [one.rejected for one in found] == ["no", "yes", "yes"]


def test_rows_of_one_completion_make_no_pairs() -> None:
    assert pairs([Row("a", "yes"), Row("b", "yes")]) == []
