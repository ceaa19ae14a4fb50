"""The three learned rates of the house policy, at house values until there is evidence."""

from __future__ import annotations

from msgspec import Struct, field

# What each table is the rate of, as worded in causes.
MEANINGS = {
    "task_weight": "first places",
    "model_performance": "among the first four",
    "task_success": "delivered",
}


class Rate(Struct, frozen=True):
    """One rate in 0..1, its cause, and its current evidence."""

    value: float
    cause: str
    successes: float = 0.0
    trials: float = 0.0


class Table(Struct, frozen=True):
    """Rates by key; a key without evidence has the house value."""

    house: float
    learned: dict[str, Rate] = {}

    def rate(self, key: str) -> Rate:
        """Return the rate of `key`."""
        return self.learned.get(key) or Rate(self.house, f"house value for {key}")


class Tables(Struct, frozen=True, kw_only=True):
    """Everything the house policy learns."""

    task_weight: Table = field(default_factory=lambda: Table(0.25))  # by task type
    model_performance: Table = field(default_factory=lambda: Table(0.75))  # by model family
    task_success: Table = field(default_factory=lambda: Table(0.90))  # by task type
