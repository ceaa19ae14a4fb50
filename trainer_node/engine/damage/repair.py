"""Begin training from the weights as they were before they were scaled, if that lowers the loss.

The base model's own loss, and what it says of preference pairs, are taken before. An adapter still holds its
changes relative to the base model as it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from shared.planning.plan import Plan, Repair
from shared.planning.profiles import resolve
from shared.planning.throughput import is_submitted_whole
from trainer_node.engine.context import JobData, RunContext
from trainer_node.engine.damage.scaling import find_scaling
from trainer_node.engine.distributed.sharding import local
from trainer_node.engine.distributed.weight_slices import Rows
from trainer_node.engine.evaluate import base_states
from trainer_node.engine.evaluate.metric import Evaluation, score
from trainer_node.engine.model.exactness import label_model

FACTORS = 0.5, 1.5  # upstream draws one of these
CHECK_ROWS = 64  # development rows: what a factor does to the loss is seen on far fewer


def undo_scaling(model: nn.Module, repair: Repair | None) -> None:
    """Set the weights that were scaled to what they were: numbers of bfloat16."""
    if repair is not None:
        weights = list(_weights(model, repair.weights))
        _set(weights, weights, 1 / repair.factor)


def unscaled(
    slices: dict[str, Rows] | None, repair: Repair | None, dtype: torch.dtype
) -> dict[str, Rows] | None:
    """Return where weights are read, with what undoes their scaling: the same numbers as `undo_scaling`."""
    if slices is None or repair is None:
        return slices

    def undone(rows: Rows, first: int, end: int) -> Tensor:
        return (rows(first, end).to(dtype).float() * (1 / repair.factor)).to(torch.bfloat16)

    changed = {name: partial(undone, slices[name]) for name in repair.weights if name in slices}
    return {**slices, **changed}


def repaired(
    run: RunContext,
    model: nn.Module,
    data: JobData,
    base: Evaluation,
    plan: Plan,
) -> Plan:
    """Collective: undo the base model's scaling, if any is found; return the plan with what undoes it.

    `base` is the base model's metric on the first development rows: if undoing doesn't lower it, the model
    stays as it is. Preference pairs are scored relative to the base model as it is, which stays so for them,
    and so does a score with a divergence from it, whether there was room to train with it or not.
    """
    relative = base_states.is_relative(run.job, data.train)
    if relative or not resolve(run.job.profile).repairs:
        return plan
    found = find_scaling(
        {name: local(weight) for name, weight in network_of(model).named_parameters() if weight.dim() == 2}
    )
    found = run.process_group.broadcast_object(found)
    if found is None:
        return plan
    parameters = sum(weight.numel() for weight in model.parameters())
    weights = found.weights if is_submitted_whole(parameters) else trained_whole(plan, found.weights)
    if not weights:
        return plan
    rows = data.dev.take(np.arange(min(CHECK_ROWS, len(base.per_example))))
    before = float(base.per_example[: len(rows)].mean())
    scaled = list(_weights(network_of(model), weights))
    given = [local(weight.detach()).to("cpu", copy=True) for weight in scaled]  # a second model has no room
    losses: dict[float, float] = {}
    for factor in candidates(found.factor):
        _set(scaled, given, 1 / factor)
        losses[factor] = score(label_model(model), rows, process_group=run.process_group).loss
        run.reporter.alive()
    best = min(losses, key=lambda factor: losses[factor])
    told = f"{len(found.weights)} matrices of the base model were multiplied by {best:.4f}"
    if not losses[best] < before:
        run.reporter.message(f"{told}: they stay so, {losses[best]:.3f} would be no lower than {before:.3f}")
        _set(scaled, given, 1.0)
        return plan
    _set(scaled, given, 1 / best)
    run.reporter.message(f"{told}: undone, the loss falls from {before:.3f} to {losses[best]:.3f}")
    return replace(plan, repair=Repair(best, weights))


def candidates(factor: float) -> list[float]:
    """Return the factors that upstream could have drawn, of those that leave the same gaps."""
    least, most = FACTORS
    return [one for one in (factor, factor / 2) if 0.98 * least <= one <= 1.02 * most]


def trained_whole(plan: Plan, weights: list[str]) -> list[str]:
    """Return the weights that the plan trains whole: their change is submitted, whatever it is."""
    dense = tuple(f".{module.name}.weight" for module in plan.modules if module.method == "dense")
    return [name for name in weights if f".{name}".endswith(dense)]


def network_of(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model, whose names are those of the files."""
    base = getattr(model, "base", model)
    return base if isinstance(base, nn.Module) else model


def will_restore_frozen(plan: Plan) -> bool:
    """Return whether by this plan weights are restored that aren't trained whole."""
    return plan.repair is not None and trained_whole(plan, plan.repair.weights) != plan.repair.weights


def restores_frozen(repair: Repair | None, trained: set[str]) -> bool:
    """Return whether weights were restored that aren't trained whole: an adapter would miss them."""
    return repair is not None and not trained.issuperset(repair.weights)


@torch.no_grad()
def _set(weights: Iterable[Tensor], given: Iterable[Tensor], factor: float) -> None:
    """Set weights to others times a factor, rounded to bfloat16; by 1 to these as they are."""
    for weight, value in zip(weights, given, strict=True):
        mine = local(weight)
        value = value.to(mine.device)
        mine.copy_(value if factor == 1.0 else (value.float() * factor).to(torch.bfloat16))


def _weights(model: nn.Module, names: list[str]) -> Iterator[Tensor]:
    """Yield the weights by their names; those of a PEFT model have others."""
    wanted = set(names)
    return (weight for name, weight in model.named_parameters() if name in wanted)
