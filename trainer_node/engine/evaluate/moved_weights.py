"""Trained weights at a factor on their delta: a part of the way from the base model, or beyond its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from trainer_node.engine.model.adapters import Deltas


@contextmanager
def moving(deltas: Deltas, start: Mapping[str, torch.Tensor]) -> Iterator[Callable[[float], None]]:
    """Give what moves the trained weights to a factor on their delta; on exit they are as before.

    A copy of them is kept, and moved tensor by tensor: less than the optimizer needed.
    """
    before = {name: value.clone() for name, value in deltas.state().items()}

    def move(factor: float) -> None:
        for name, value in deltas.state().items():
            if is_moved(name):
                value.copy_(torch.lerp(start[name].to(value), before[name], factor))

    try:
        yield move
    finally:
        deltas.load_state(before)


def scaled(
    weights: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], factor: float
) -> dict[str, torch.Tensor]:
    """Return trained weights, each at `factor` times its distance from the start."""
    return {
        name: torch.lerp(start[name].to(value), value, factor) if is_moved(name) else value
        for name, value in weights.items()
    }


def is_moved(name: str) -> bool:
    """Return whether a weight is moved: of LoRA's two factors only the second, which starts at zero.

    The delta is their product.
    """
    return ".lora_A." not in name
