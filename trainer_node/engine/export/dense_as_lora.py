"""Dense deltas as LoRA factors: any matrix D is D @ I, exactly, at rank min(in, out).

That stores in*out + min(in, out)^2 numbers where the whole matrix has in*out: alone, it would be no gain.
But a whole model also has all that wasn't trained, and all that LoRA trained: where few matrices are dense,
an adapter with their factors is smaller. A lower rank would lose something: what AdamW trains has full rank
(docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from shared.planning.model_shape import ModulePlan
from shared.planning.plan import Plan

LORA_BYTES, DENSE_BYTES, MODEL_BYTES = 4, 2, 2  # of one number: LoRA's factors stay fp32
# How large an adapter may be, as a share of the whole model. Trained in bf16, a tenth smaller: the scorer
# computes with its factors next to the base. A whole model is bf16, and weights that were trained in fp32
# were
# never rounded to that: they score .025 worse then (docs/experiments.md), but not as deltas next to the base.
WORTH = {"bfloat16": 0.9, "float32": math.inf}


def fit_better(plan: Plan, base: nn.Module) -> bool:
    """Return whether an adapter with all deltas is smaller than the whole model, or more exact."""
    adapter = sum(module.count * _bytes(module) for module in plan.modules)
    whole = MODEL_BYTES * sum(weight.numel() for weight in _untouched(base))
    return adapter <= WORTH[plan.dtype] * whole


def rank_of(module: ModulePlan) -> int:
    """Return the rank at which factors hold any delta of a matrix."""
    return min(module.in_features, module.out_features)


def factors(trained: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """LoRA's A and B, in bf16, whose product is what training changed; one of them is the identity."""
    delta = (trained.detach().float().cpu() - before.float()).to(torch.bfloat16)
    outputs, inputs = delta.shape
    if outputs <= inputs:
        return delta, torch.eye(outputs, dtype=torch.bfloat16)
    return torch.eye(inputs, dtype=torch.bfloat16), delta


def _bytes(module: ModulePlan) -> int:
    inputs, outputs = module.in_features, module.out_features
    if module.method == "lora":
        return LORA_BYTES * module.rank * (inputs + outputs)
    return DENSE_BYTES * (inputs * outputs + rank_of(module) ** 2)


def _untouched(base: nn.Module) -> Iterator[Tensor]:
    """Return all weights of the model itself, tied ones once."""
    return (weight for name, weight in base.named_parameters() if ".lora_" not in name)
