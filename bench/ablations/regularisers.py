"""What keeps a run from learning rows by heart: dropout and decay, only while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from bench.ablations.variants import Training
from shared.planning.plan import Plan
from trainer_node.engine.train.state import TrainState


def with_dropout(training: Training, plan: Plan) -> tuple[str, Plan]:
    """Return a name for the arm and its plan with dropout: PEFT's layers have it from the start, or not."""
    if not training.dropout:
        return training.arm, plan
    return f"{training.arm}, dropout {training.dropout:g}", replace(plan, dropout=training.dropout)


def pull_towards(start: Mapping[str, Tensor], state: TrainState, strength: float) -> None:
    """Let each step end with W <- W - rate * strength * (W - W0), W0 being the weights in `start`.

    AdamW's own decay pulls a weight to zero, which is the base model for LoRA's second factor alone.
    """
    kept = {one: start[name].to(one.device) for name, one in state.deltas.parameters.items()}

    def pull(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.lerp_(kept[parameter], strength * group["lr"])

    state.optimizer.register_step_post_hook(pull)
