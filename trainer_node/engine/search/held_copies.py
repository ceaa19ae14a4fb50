"""Copies of trained weights that a search holds in main memory; of sharded ones each process has its rows."""

from __future__ import annotations

from torch import Tensor

from trainer_node.engine.assemble import Adapted
from trainer_node.engine.context import RunContext
from trainer_node.engine.distributed.sharding import local
from trainer_node.engine.memory.main_memory import most_for_copy
from trainer_node.engine.memory.oom import is_out_of_memory
from trainer_node.engine.model.adapters import Deltas
from trainer_node.engine.train.state import TrainState


def fits_in_memory(run: RunContext, one: Adapted | TrainState) -> bool:
    """Collective: whether each process may hold a copy of what it has of the trained weights.

    The copy counts once if the processes have a part each.
    """
    size = sum(value.numel() * value.element_size() for value in one.deltas.state().values())
    group = run.process_group
    copies = 1 + group.others if one.plan.parallel == "fsdp2" else group.sharers
    fits = copies * size <= most_for_copy(run.job)
    return all(group.gather_objects(fits))


def copy_that_fits(run: RunContext, one: Adapted | TrainState) -> dict[str, Tensor] | None:
    """Collective: a copy of what this process has of the trained weights.

    None in all processes if one of them has no memory for it: all must score the same factors.
    """
    if not fits_in_memory(run, one):
        return None
    copy: dict[str, Tensor] | None = None
    try:
        copy = copy_of(one.deltas)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    have = run.process_group.gather_objects(copy is not None)
    return copy if all(have) else None


def copy_of(deltas: Deltas) -> dict[str, Tensor]:
    """Return what this process holds of the trained weights, copied to main memory."""
    return {name: local(value).to("cpu", copy=True) for name, value in deltas.state().items()}
