"""Delivery rates of pairs of task type and model family: own trials on top of their relatives'. Pure.

A pair starts from what its type did with other families and its family did in other types, and its own trials
outweigh both. Among those relatives every pair counts for a few trials at most: a hundred failures of one
family refuse neither its task type with other families nor its other task types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt

from msgspec import Struct

from gateway.learning.rates import ANY_OTHER, Rate, Table, pair_key
from shared.messages.offers import TaskType

MOST_OF_ONE_PAIR = 3.0  # trials that one pair adds to the evidence of its type or of its family

Pair = tuple[str, str]  # task type, model family


class Counts(Struct, frozen=True):
    """Successes and trials, faded."""

    successes: float = 0.0
    trials: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        """Return both together."""
        return Counts(self.successes + other.successes, self.trials + other.trials)

    def at_most(self, trials: float) -> Counts:
        """Return the same share of successes in at most `trials` trials."""
        if self.trials <= trials:
            return self
        return Counts(self.successes * trials / self.trials, trials)

    def posterior(self, prior: float, strength: float) -> float:
        """Return the mean of Beta(strength * prior + successes, strength * (1 - prior) + failures)."""
        return min(1.0, max(0.0, (strength * prior + self.successes) / (strength + self.trials)))

    def __str__(self) -> str:
        """Return `1.0 of 2.0`."""
        return f"{self.successes:.1f} of {self.trials:.1f}"


def delivery_table(counts: Mapping[Pair, Counts], house: float, strength: float) -> Table:
    """Return the rate of every task type with every family that has evidence, and with any other family."""
    if not counts:
        return Table(house)
    families = (*sorted({family for _, family in counts}), ANY_OTHER)
    return Table(
        house,
        {
            pair_key(kind, family): _rate((kind, family), counts, house, strength)
            for kind in map(str, TaskType)
            for family in families
        },
    )


def _rate(pair: Pair, counts: Mapping[Pair, Counts], house: float, strength: float) -> Rate:
    kind, family = pair
    own = counts.get(pair, Counts())
    of_kind = sum(_relatives(pair, counts, 0), Counts())
    of_family = sum(_relatives(pair, counts, 1), Counts())
    prior = of_kind.posterior(house, strength) * of_family.posterior(house, strength) / house
    mean = own.posterior(min(1.0, prior), strength)
    cause = f"{own} of {kind} with {family} delivered (with other families {of_kind}"
    cause += f", in other types {of_family}; prior {min(1.0, prior):.3f} of {strength:g} trials)"
    # of a Beta distribution with so many trials, those of the prior included
    spread = sqrt(mean * (1.0 - mean) / (strength + own.trials + 1.0))
    return Rate(mean, cause, own.successes, own.trials, spread)


def _relatives(pair: Pair, counts: Mapping[Pair, Counts], same: int) -> Iterator[Counts]:
    """Yield the counts of other pairs of the same type (0) or the same family (1)."""
    for other, found in counts.items():
        if other != pair and other[same] == pair[same]:
            yield found.at_most(MOST_OF_ONE_PAIR)
