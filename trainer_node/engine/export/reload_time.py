"""What some exports take longer: the base model is loaded again for them."""

from __future__ import annotations

from torch import nn

from shared.planning.plan import Plan
from trainer_node.engine.export.dense_as_lora import fit_better
from trainer_node.engine.export.sharded_writer import keeps_names


def reload_s(plan: Plan, base: nn.Module, load_s: float) -> float:
    """Return the seconds in which an export loads the base model again; `load_s`: once.

    Sharded weights that are published otherwise than they are held rank 0 gathers in a new copy. Changes of
    dense matrices are relative to another one, unless each process reads the rows that it writes.
    """
    sharded = plan.parallel == "fsdp2"
    gathers = sharded and not keeps_names(base)
    dense = any(module.method == "dense" for module in plan.modules) and not plan.extras.parameters
    compares = dense and (gathers or not sharded) and fit_better(plan, base)
    return load_s * (gathers + compares)
