"""The learned rates of the house policy, at house values until there is evidence."""

from __future__ import annotations

from msgspec import Struct, field

# What each table is the rate of, as worded in causes.
MEANINGS = {
    "task_weight": "first places",
    "model_performance": "among the first four",
    "task_success": "delivered",
}
ANY_OTHER = "any other family"  # in a pair: one without any evidence
DELIVERED = "delivered, by task type and model family"  # what `delivery` is the rate of


class Rate(Struct, frozen=True):
    """One rate in 0..1, its cause, and its current evidence."""

    value: float
    cause: str
    successes: float = 0.0
    trials: float = 0.0
    spread: float = 0.0  # one standard deviation of the posterior; only of `delivery`


class Table(Struct, frozen=True):
    """Rates by key; a key without evidence has the house value."""

    house: float
    learned: dict[str, Rate] = {}

    def rate(self, key: str) -> Rate:
        """Return the rate of `key`."""
        return self.learned.get(key) or Rate(self.house, f"house value for {key}")


def pair_key(task_type: str, family: str) -> str:
    """Return the key of a task type with a model family."""
    return f"{task_type}, {family}"


class LearnedRates(Struct, frozen=True, kw_only=True):
    """Everything the house policy learns."""

    task_weight: Table = field(default_factory=lambda: Table(0.25))  # by task type
    model_performance: Table = field(default_factory=lambda: Table(0.75))  # by model family
    task_success: Table = field(default_factory=lambda: Table(0.90))  # by task type
    delivery: Table = field(default_factory=lambda: Table(0.90))  # by both, for what a bonus is earned by

    def delivery_of(self, task_type: str, family: str) -> Rate:
        """Return how often tasks of a type are delivered with a family."""
        known = self.delivery.learned.get(pair_key(task_type, family))
        return known or self.delivery.rate(pair_key(task_type, ANY_OTHER))
