"""The learning rate from the size of the weights: larger weights take larger steps."""

from __future__ import annotations

from statistics import median

import torch
from msgspec.structs import replace
from transformers.pytorch_utils import Conv1D

from shared.messages.offers import TaskType
from shared.planning.plan import Deviation, Plan
from shared.planning.recipe import Recipe

LEAST, MOST = 1e-6, 1e-3  # rates for text
PAIR_LEAST, PAIR_MOST = 5e-7, 3e-5
BILLION = 1e9  # parameters at which the rule's factor is 1


def rate_of(scale: float, rms: float, parameters: int, *, pairs: bool) -> float:
    """Return the rate for weights of this median RMS, in a model of so many parameters."""
    least, most = (PAIR_LEAST, PAIR_MOST) if pairs else (LEAST, MOST)
    return float(min(most, max(least, scale * rms * (BILLION / parameters) ** 0.5)))


def median_rms(model: torch.nn.Module, names: set[str]) -> float:
    """Return the median RMS of the model's matrices of these kinds, named by the ends of their paths."""
    ends = tuple(f".{name}" for name in names)
    found = [
        float(module.weight.detach().float().square().mean().sqrt())
        for name, module in model.named_modules()
        if f".{name}".endswith(ends) and isinstance(module, torch.nn.Linear | Conv1D)
    ]
    return median(found)


def with_weight_rate(plan: Plan, recipe: Recipe, model: torch.nn.Module, task_type: TaskType) -> Plan:
    """Return the plan with the rate of its weights, if all are trained whole and the recipe has such a rule.

    The batch's factor on the rate stays. For preference pairs the rate is never above the table's. `recipe`
    is that of the model's size.
    """
    pairs = task_type is TaskType.DPO
    scale = recipe.pair_weight_rate if pairs else recipe.weight_rate
    names = {module.name for module in plan.modules if module.method == "dense"}
    if not scale or not recipe.rate or len(names) < len(plan.modules):
        return plan
    parameters = sum(weight.numel() for weight in model.parameters())
    rms = median_rms(model, names)
    rate = rate_of(scale, rms, parameters, pairs=pairs)
    if pairs:
        rate = min(rate, recipe.rate)
    found = plan.lr_dense * rate / recipe.rate
    reason = f"the rule for weights of RMS {rms:.3g} in {parameters / 1e6:.4g} M parameters gives it"
    deviation = Deviation("learning rate", f"{plan.lr_dense:.2e}", f"{found:.2e}", reason)
    share = found / plan.lr_dense
    extras = {"lr_norms": share * plan.lr_norms, "lr_embeddings": share * plan.lr_embeddings}
    return replace(plan, lr_dense=found, **extras, deviations=[*plan.deviations, deviation])
