"""Development rows: how many are held out, and that what is alike stays on one side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.engine.data.conftest import document
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.held_out import alike, hold_out


def with_copies(examples: Examples, copies: int) -> Examples:
    """Return the examples, then copies of the first ones with another token in the middle of their labels."""
    found = examples.take([*range(len(examples)), *range(copies)])
    for row in range(len(examples), len(found)):
        place = (found.offsets[row] + 3 * found.offsets[row + 1]) // 4
        found.ids[place] = found.labels[place] = 1
    return found


def sides(examples: Examples, seed: int) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Return the first tokens of the rows on either side; copies have the same ones."""
    train, dev = (
        {tuple(document(side, row)[0][:10]) for row in range(len(side))} for side in hold_out(examples, seed)
    )
    return train, dev


@pytest.mark.parametrize(("n", "dev"), [(2, 1), (10, 2), (100, 20), (2000, 400), (5000, 400), (20_000, 606)])
def test_hold_out_size(make_examples: Callable[..., Examples], n: int, dev: int) -> None:
    examples = make_examples([8] * n)
    train, held = hold_out(examples, seed=0)
    assert (len(train), len(held)) == (n - dev, dev)
    assert hold_out(examples, seed=0)[1].fingerprint() == held.fingerprint()
    if n > 2:
        assert hold_out(examples, seed=1)[1].fingerprint() != held.fingerprint()


def test_equal_rows_stay_on_one_side(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([8] * 60).take(np.repeat(np.arange(60), 3))
    train, held = hold_out(examples, seed=0)
    sides = [{document(side, index)[0].__repr__() for index in range(len(side))} for side in (train, held)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held) == 180
    alone = make_examples([8]).take([0, 0, 0])
    assert [len(side) for side in hold_out(alone, seed=0)] == [3, 3]


@pytest.mark.parametrize("group", [1, 2])
def test_near_copies_stay_on_one_side(make_examples: Callable[..., Examples], group: int) -> None:
    rows = make_examples([80] * 200 * group, group=group)
    # Of pairs the answers of both documents are compared.
    examples = with_copies(rows, 40) if group == 1 else with_changed_pairs(rows)
    assert len(examples) - sum(map(bool, alike(examples))) == 40
    for seed in range(5):
        train, dev = hold_out(examples, seed)
        firsts = [
            {tuple(document(side, row * group)[0][:10]) for row in range(len(side))} for side in (train, dev)
        ]
        assert not firsts[0] & firsts[1]
        assert 48 <= len(dev) <= 49


def with_changed_pairs(pairs: Examples) -> Examples:
    """Return the pairs, then copies of the first 40 with another token in each chosen answer."""
    found = pairs.take([*range(len(pairs)), *range(40)])
    for row in range(len(pairs), len(found)):
        place = found.offsets[2 * row + 1] - 5
        found.ids[place] = found.labels[place] = 1
    return found


def test_without_near_copies_rows_are_held_out_as_before(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([80] * 200).take([*range(200), 0, 0, 7])  # equal rows are no news
    for seed in range(3):
        before = hold_out(examples, seed, alike(examples, near=False))
        assert [side.fingerprint() for side in hold_out(examples, seed)] == [
            one.fingerprint() for one in before
        ]


def test_near_copies_are_held_out_as_often_as_others(make_examples: Callable[..., Examples]) -> None:
    examples = with_copies(make_examples([80] * 200), 40)
    held = [len(sides(examples, seed)[1] & copied_firsts(examples)) for seed in range(40)]
    assert np.mean(held) == pytest.approx(40 * 48 / 240, abs=0.8)  # texts


def copied_firsts(examples: Examples) -> set[tuple[int, ...]]:
    """Return the first tokens of the 40 rows that have copies."""
    return {tuple(document(examples, row)[0][:10]) for row in range(40)}


def test_a_huge_group_stays_in_training(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([8] * 100).take([*range(100), *[0] * 100])
    for seed in range(100):  # among them one in which the group comes first
        assert len(hold_out(examples, seed)[1]) == 40
    two = make_examples([8] * 2).take([0] * 60 + [1] * 40)
    assert [len(side) for side in hold_out(two, seed=0)] == [60, 40]  # else there would be none


def test_copies_of_one_text_that_are_half_of_all_rows_are_split_as_before(
    make_examples: Callable[..., Examples],
) -> None:
    examples = make_examples([80] * 100).take([*range(100), *[0] * 100])
    for row in range(100, 200):
        place = examples.offsets[row] + 42 + row % 35
        examples.ids[place] = examples.labels[place] = row
    assert alike(examples) == alike(examples, near=False)
    _, dev = hold_out(examples, seed=0)
    of_the_text = sum(document(dev, row)[0][:10] == document(examples, 0)[0][:10] for row in range(len(dev)))
    assert 10 < of_the_text < 30  # of 40, as of all rows
