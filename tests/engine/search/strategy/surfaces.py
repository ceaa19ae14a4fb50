"""Loss surfaces that are known, and searches on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.strategy.delta_factor import LEAST, MORE, RATE_POWER
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.trial import Trial, TrialResult

START = (Trial(arm="dense"), Trial(arm="lora"))
SPEED = 1000.0


def searched(
    loss: Callable[[Trial], float | None],
    seconds: float,
    *,
    epoch_tokens: int = 10_000,
    examples: int = 500,
    single: frozenset[str] = frozenset(),
    all_rows: float = 1.0,
    trial_s: float = 1.0,
    tiny: bool = False,
    lora: frozenset[str] = frozenset(),
    best_rate: float | None = None,
) -> tuple[list[TrialResult], float]:
    """All trials of one job on a surface, and the time left; with a best rate each tells how far it went."""
    done: list[TrialResult] = []
    left = seconds
    while True:
        budget = plenty(
            left_s=left,
            epoch_tokens=epoch_tokens,
            examples=examples,
            all_s=seconds,
            single=single,
            all_rows=all_rows,
            trial_s=trial_s,
            tiny=tiny,
            lora=lora,
        )
        trial = next_trial(START, done, budget)
        if trial is None:
            return done, left
        left -= budget.cost_s(trial)
        done.append(
            TrialResult(
                trial=trial,
                loss=loss(trial),
                tokens=int(trial.epochs * epoch_tokens),
                train_s=budget.cost_s(trial),
                factor=None if best_rate is None else way(trial.rate / best_rate),
            )
        )


def way(rate: float) -> float:
    """Return the factor on its delta at which the loss of a run at so many times the best rate is lowest."""
    return min(MORE, max(LEAST, rate ** (-1.0 / RATE_POWER)))


def bowl(rate: float, epochs: float, batch: int, lora: float = 0.05) -> Callable[[Trial], float]:
    """Quadratic in the logs of everything, lowest at the given place."""

    def loss(trial: Trial) -> float:
        parts = (math.log(trial.rate / rate), math.log(trial.epochs / epochs), math.log(trial.batch / batch))
        return 2.0 + 0.05 * sum(part**2 for part in parts) + (lora if trial.arm == "lora" else 0.0)

    return loss


def plenty(**changes: Any) -> Budget:
    """Time for everything, for 500 rows of 10,000 tokens, unless changed."""
    return Budget(
        **{
            "left_s": 1e6,
            "tokens_per_s": SPEED,
            "epoch_tokens": 10_000,
            "examples": 500,
            "trial_s": 1.0,
            "all_s": 1e6,
            **changes,
        }
    )
