"""What steps and scores cost on one piece of hardware, so that the arena counts all that a profile does.

The unit is one token of a step that trains every matrix. Figures are measured once (`python -m bench
step_costs`) and fixed here, so that results repeat exactly on a noisy machine.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from shared.planning.plan import Plan

Method = Literal["everything", "dense", "lora"]
USUAL_BATCH = 16  # rows of the steps that a budget is counted in


class StepPrice(Struct, frozen=True):
    """What a step of one method costs."""

    step: float  # besides its tokens
    token: float


class Prices(Struct, frozen=True):
    """What the steps of each method cost, and a scored token."""

    everything: StepPrice
    dense: StepPrice
    lora: StepPrice
    scored: float

    def of_step(self, plan: Plan) -> float:
        """Return what a plan's step costs: packs are filled up to their capacity."""
        price: StepPrice = getattr(self, method_of(plan))
        return price.step + price.token * plan.packs_per_step * plan.capacity

    def of_epoch(self, tokens: int, examples: int) -> float:
        """Return what an epoch of dense steps costs: a budget is so many of these."""
        return self.dense.token * tokens + self.dense.step * examples / USUAL_BATCH


PRICES = {
    # SmolLM2-135M on one thread of a shared AMD EPYC: python -m bench step_costs, 2026-11-30.
    "cpu": Prices(
        everything=StepPrice(step=115.0, token=1.29),
        dense=StepPrice(step=56.0, token=1.0),
        lora=StepPrice(step=16.0, token=0.97),
        scored=0.375,
    ),
}


def method_of(plan: Plan) -> Method:
    """Return what a plan trains, as far as the cost of its steps depends on it."""
    if plan.extras.embeddings:
        return "everything"
    return "dense" if any(module.method == "dense" for module in plan.modules) else "lora"
