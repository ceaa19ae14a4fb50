"""Begin training from the weights as they were before they were scaled, if that lowers the loss.

The base model's own loss, and what it says of preference pairs, are taken before. An adapter still holds its
changes relative to the base model as it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from shared.planning.plan import Plan, Repair
from shared.planning.profiles import resolve
from trainer_node.engine.context import JobData, RunContext
from trainer_node.engine.damage.scaling import find_scaling
from trainer_node.engine.distributed.sharding import local
from trainer_node.engine.distributed.weight_slices import Rows
from trainer_node.engine.evaluate.metric import Evaluation, score
from trainer_node.engine.model.exactness import label_model

FACTORS = 0.5, 1.5  # upstream draws one of these
CHECK_ROWS = 64  # development rows: what a factor does to the loss is seen on far fewer
MOST_BYTES = 40e9  # of a whole model, which is what is submitted if frozen weights are restored


def undo_scaling(model: nn.Module, repair: Repair | None) -> None:
    """Set the weights that were scaled to what they were: numbers of bfloat16."""
    if repair is not None:
        _scale(model, repair.weights, 1 / repair.factor)


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
    reload: Callable[[], nn.Module],
) -> tuple[Plan, nn.Module]:
    """All: the plan with what undoes the base model's scaling, and the model without it, if any is found.

    `base` is the base model's metric on the first development rows: if undoing doesn't lower it, the model is
    loaded again. Preference pairs are scored relative to the base model as it is, which stays so for them,
    and so does a score with a divergence from it: its distributions are made with the model's own head.
    """
    relative = data.train.group == 2 or data.train.base is not None
    if relative or not resolve(run.job.profile).repairs:
        return plan, model
    found = find_scaling(
        {name: local(weight) for name, weight in network_of(model).named_parameters() if weight.dim() == 2}
    )
    found = run.process_group.broadcast_object(found)
    if found is None:
        return plan, model
    weights = found.weights if submits_whole(plan, model) else trained_whole(plan, found.weights)
    if not weights:
        return plan, model
    rows = data.dev.take(np.arange(min(CHECK_ROWS, len(base.per_example))))
    before = float(base.per_example[: len(rows)].mean())
    losses: dict[float, float] = {}
    undone = 1.0
    for factor in candidates(found.factor):
        _scale(network_of(model), weights, undone / factor)
        undone = factor
        losses[factor] = score(label_model(model), rows, process_group=run.process_group).loss
        run.reporter.alive()
    best = min(losses, key=lambda factor: losses[factor])
    _scale(network_of(model), weights, undone / best)
    told = f"{len(found.weights)} matrices of the base model were multiplied by {best:.4f}"
    if not losses[best] < before:
        run.reporter.message(f"{told}: they stay so, {losses[best]:.3f} would be no lower than {before:.3f}")
        return plan, reload()
    run.reporter.message(f"{told}: undone, the loss falls from {before:.3f} to {losses[best]:.3f}")
    return replace(plan, repair=Repair(best, weights)), model


def candidates(factor: float) -> list[float]:
    """Return the factors that upstream could have drawn, of those that leave the same gaps."""
    least, most = FACTORS
    return [one for one in (factor, factor / 2) if 0.98 * least <= one <= 1.02 * most]


def trained_whole(plan: Plan, weights: list[str]) -> list[str]:
    """Return the weights that the plan trains whole: their change is submitted, whatever it is."""
    dense = tuple(f".{module.name}.weight" for module in plan.modules if module.method == "dense")
    return [name for name in weights if f".{name}".endswith(dense)]


def submits_whole(plan: Plan, model: nn.Module) -> bool:
    """Return whether a whole model may be submitted, with frozen weights that were restored."""
    return 2 * sum(weight.numel() for weight in model.parameters()) <= MOST_BYTES


def network_of(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model, whose names are those of the files."""
    base = getattr(model, "base", model)
    return base if isinstance(base, nn.Module) else model


def restores_frozen(repair: Repair | None, trained: set[str]) -> bool:
    """Return whether weights were restored that aren't trained whole: an adapter would miss them."""
    return repair is not None and not trained.issuperset(repair.weights)


@torch.no_grad()
def _scale(model: nn.Module, names: list[str], factor: float) -> None:
    if factor == 1.0:
        return
    for weight in _weights(model, names):
        weight.copy_((weight.float() * factor).to(torch.bfloat16))


def _weights(model: nn.Module, names: list[str]) -> Iterator[Tensor]:
    """Yield the weights by their names; those of a PEFT model have others."""
    wanted = set(names)
    return (weight for name, weight in model.named_parameters() if name in wanted)
