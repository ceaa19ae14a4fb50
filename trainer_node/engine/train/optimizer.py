"""AdamW in one fused kernel: a step changes all weights or none, whatever memory or a gradient does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.distributed.tensor import DTensor

from shared.planning.plan import Plan
from trainer_node.engine.model.adapters import Deltas

MOMENTS = ("exp_avg", "exp_avg_sq")  # in a checkpoint by these names


def make_optimizer(deltas: Deltas, plan: Plan) -> torch.optim.Optimizer:
    """Return AdamW over all that is trained; a group's rate is its `peak` times the schedule's multiplier."""
    groups = [{**group, "peak": group["lr"]} for group in deltas.param_groups(plan)]
    return torch.optim.AdamW(groups, betas=plan.betas, weight_decay=plan.weight_decay, fused=True)


def clip(parameters: Mapping[str, torch.Tensor], limit: float) -> torch.Tensor:
    """Scale gradients down to the limit; the norm over all shards that they had before."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def apply_gradients(optimizer: torch.optim.Optimizer, *, skip: torch.Tensor) -> None:
    """Step, unless `skip` (a truth value on the device) holds: nobody waits for the device to know."""
    make_moments(optimizer)
    optimizer.found_inf = skip.float()  # what torch's fused kernels look at
    optimizer.step()


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make what AdamW keeps of each weight, before the first step changes any.

    AdamW makes it while it steps: if memory runs out there, one group has stepped and another has not, and a
    weight has a step counter but no moments, at which the next step raises KeyError.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None or optimizer.state.get(parameter):
                continue
            made = {
                name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS
            }
            # Fused AdamW wants its step counter in fp32 next to the weights.
            counter = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": counter, **made}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield everything that the optimizer keeps, by the name that it has in a checkpoint."""
    for name, parameter in parameters.items():
        for field_name, value in optimizer.state.get(parameter, {}).items():
            yield f"{field_name}/{name}", value
