"""Trained weights at a factor on their delta: a part of the way from the base model, or beyond its end.

The start that they are moved from is what each process has of it: of sharded weights its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer_node.engine.distributed.sharding import as_held, local, own_rows
from trainer_node.engine.evaluate.candidates import Weights
from trainer_node.engine.model.adapters import Deltas


@contextmanager
def moving(deltas: Deltas, start: Mapping[str, Tensor]) -> Iterator[Callable[[float], None]]:
    """Give what moves the trained weights to a factor on their delta; on exit they are as before.

    A copy of them is kept, and moved tensor by tensor: less than the optimizer needed.
    """
    before = {name: value.clone() for name, value in deltas.state().items()}

    def move(factor: float) -> None:
        for name, value in deltas.state().items():
            if is_moved(name):
                local(value).copy_(_rows_at(factor, before[name], start[name]))

    try:
        yield move
    finally:
        deltas.load_state(before)


def scaled(
    weights: Weights, start: Mapping[str, Tensor], factor: float, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return trained weights, each at `factor` times its distance from the start, as `like` are held here."""
    rows = {}
    for name, value in weights.items():
        pieces = [value] if isinstance(value, Tensor) else value
        end = local(value) if isinstance(value, DTensor) else own_rows(pieces, like[name])
        rows[name] = _rows_at(factor, end, start[name]) if is_moved(name) else end
    return as_held(rows, like)


def is_moved(name: str) -> bool:
    """Return whether a weight is moved: of LoRA's two factors only the second, which starts at zero.

    The delta is their product.
    """
    return ".lora_A." not in name


def _rows_at(factor: float, weight: Tensor, start: Tensor) -> Tensor:
    """Return this process's rows of a weight at `factor` times its distance from the start."""
    end = local(weight)
    return torch.lerp(start.to(end), end, factor)
