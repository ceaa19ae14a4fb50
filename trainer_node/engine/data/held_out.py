"""Which rows are held out as development rows; those that are alike stay on one side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.planning.throughput import development_rows
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.near_duplicates import near_duplicates

# Different rows that are alike, and a quarter of the development rows. What more rows have in common is the
# data's form, which unseen rows have as well. Equal rows count once.
MOST_ALIKE = 20


def alike(examples: Examples, *, near: bool = True) -> list[list[int]]:
    """Return the rows of each group that stays on one side: equal rows and, if asked for, near duplicates.

    Groups are in the order of their first rows. One that has joined an earlier group is an empty list.
    """
    equal: dict[bytes, list[int]] = {}
    borders = examples.offsets[:: examples.group]
    for index in range(len(examples)):
        span = slice(borders[index], borders[index + 1])
        equal.setdefault(examples.ids[span].tobytes(), []).append(index)
    groups = list(equal.values())
    if not near:
        return groups
    firsts = examples if len(groups) == len(examples) else examples.take([group[0] for group in groups])
    most = min(MOST_ALIKE, development_rows(len(examples)) // 4)
    for first, *others in near_duplicates(firsts.ids, firsts.labels, firsts.offsets[:: firsts.group], most):
        for other in others:
            groups[first] = sorted(groups[first] + groups[other])
            groups[other] = []
    return groups


def hold_out(
    examples: Examples, seed: int, groups: Sequence[list[int]] | None = None
) -> tuple[Examples, Examples]:
    """Return training and development examples: `development_rows` are held out, by seed.

    Those of a group (by default `alike`'s) stay on one side, so that the development loss can't be learnt by
    heart. A single group serves as both.
    """
    n = len(examples)
    wanted = development_rows(n)
    groups = alike(examples) if groups is None else groups
    order = np.random.default_rng(seed).permutation(len(groups))
    ordered = [groups[position] for position in order if groups[position]]
    if len(ordered) == 1:
        return examples, examples
    dev: list[int] = []
    for group in ordered[:-1]:
        if len(dev) >= wanted:
            break
        # A huge group may not swallow the training set.
        if len(dev) + len(group) <= 2 * wanted:
            dev.extend(group)
    dev = dev or min(ordered, key=len)
    held = set(dev)
    return examples.take([i for i in range(n) if i not in held]), examples.take(sorted(dev))
