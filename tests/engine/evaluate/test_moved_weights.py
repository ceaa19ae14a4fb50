"""Weights that are moved along their delta, and back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from trainer_node.engine.evaluate.moved_weights import moving, scaled


def test_weights_go_a_part_of_their_way_and_lora_by_its_second_factor() -> None:
    start = {"weight": torch.ones(2), "x.lora_A.w": torch.ones(2), "x.lora_B.w": torch.zeros(2)}
    weights = {
        "weight": torch.full((2,), 3.0),
        "x.lora_A.w": torch.full((2,), 5.0),
        "x.lora_B.w": torch.ones(2),
    }
    half = scaled(weights, start, 0.5, like=weights)
    assert half["weight"].tolist() == [2.0, 2.0]
    assert half["x.lora_A.w"].tolist() == [5.0, 5.0]
    assert half["x.lora_B.w"].tolist() == [0.5, 0.5]


def test_a_model_is_moved_from_where_it_was_each_time_and_has_its_own_weights_again() -> None:
    weights = {"weight": torch.tensor([0.3, 0.7])}
    deltas: Any = SimpleNamespace(state=lambda: weights, load_state=lambda state: load(weights, state))
    with moving(deltas, {"weight": torch.zeros(2)}) as move:
        for factor in (0.5, 1.3):
            move(factor)
            assert torch.equal(weights["weight"], factor * torch.tensor([0.3, 0.7]))
    assert torch.equal(weights["weight"], torch.tensor([0.3, 0.7]))


def load(weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Copy a state into the weights, as a model does."""
    for name, value in state.items():
        weights[name].copy_(value)
