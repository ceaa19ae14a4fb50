"""Matrices rounded to bf16 by what they do to their inputs, not to the nearest numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.export import rounding
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.loading import load_model

ROWS = [9, 20, 33, 12]


def _nearest(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).float()


def _products(tokens: int, inputs: int, causes: int) -> Tensor:
    """Of inputs that go together, as `causes` of them move all, with a little of their own."""
    noise = torch.Generator().manual_seed(1)
    x_TI = torch.randn(tokens, causes, generator=noise) @ torch.randn(causes, inputs, generator=noise)
    x_TI += 0.1 * torch.randn(tokens, inputs, generator=noise)
    return x_TI.T @ x_TI


def _off(weight: Tensor, rounded: Tensor, products: Tensor) -> float:
    """How far the module's outputs are off, squared."""
    error = rounded - weight
    return float((error @ products * error).sum())


@pytest.mark.parametrize("inputs", [24, 300])  # in one block, and in several
def test_outputs_are_closer_to_what_was_trained_than_those_of_the_nearest_numbers(inputs: int) -> None:
    torch.manual_seed(0)
    weight, products = torch.randn(16, inputs), _products(2000, inputs, 6)
    found = rounding.round_matrix(weight, products)
    assert found is not None
    assert torch.equal(found, _nearest(found))
    assert _off(weight, found, products) < 0.25 * _off(weight, _nearest(weight), products)
    assert float((found - weight).abs().max()) < 0.1


def test_inputs_that_do_not_go_together_leave_the_nearest_numbers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 200)
    found = rounding.round_matrix(weight, torch.diag(torch.rand(200) + 0.5))
    assert found is not None
    assert torch.equal(found, _nearest(weight))


def test_numbers_that_bf16_has_stay_as_they_are() -> None:
    torch.manual_seed(0)
    weight = _nearest(torch.randn(16, 200))
    found = rounding.round_matrix(weight, _products(500, 200, 6))
    assert found is not None
    assert torch.equal(found, weight)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_inputs_that_tell_nothing_round_nothing(value: float) -> None:
    assert rounding.round_matrix(torch.randn(4, 8), torch.full((8, 8), value)) is None


@pytest.fixture
def deltas(tiny_model: Path, make_plan: Callable[..., Plan]) -> Deltas:
    """The tiny model in bf16 with dense matrices that are moved a little."""
    found = add_deltas(load_model(str(tiny_model), torch.bfloat16), make_plan("dense", dtype="bfloat16"), 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in found.parameters.values():
            weight += 0.01 * torch.randn_like(weight)
    return found


def test_a_models_matrices_are_rounded_with_the_inputs_of_its_rows(
    deltas: Deltas, make_examples: Callable[..., Examples]
) -> None:
    names, rows = rounding.matrices_of(deltas), make_examples(ROWS)
    assert {f"{name}.weight" for name in names} == set(deltas.parameters)
    modules = {name: deltas.model.base.get_submodule(name) for name in names}
    products = rounding.input_products(deltas.model, modules, rows)
    before = {name: weight.clone() for name, weight in deltas.state().items()}
    found = rounding.rounded(deltas.model, names, rows, lambda: True)
    assert list(found) == names
    gains = []
    for name, matrix in found.items():
        weight = before[f"{name}.weight"]
        assert torch.equal(matrix, _nearest(matrix))
        gains.append(_off(weight, matrix, products[name]) / _off(weight, _nearest(weight), products[name]))
    assert max(gains) < 1.0
    assert all(torch.equal(weight, before[name]) for name, weight in deltas.state().items())
    assert not any(module._forward_pre_hooks for module in deltas.model.base.modules())


def test_modules_that_do_not_fit_at_once_are_looked_at_in_turns(
    deltas: Deltas, make_examples: Callable[..., Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, rows = rounding.matrices_of(deltas), make_examples(ROWS)
    wanted = rounding.rounded(deltas.model, names, rows, lambda: True)
    monkeypatch.setattr(rounding, "MOST_BYTES", 1)
    found = rounding.rounded(deltas.model, names, rows, lambda: True)
    assert all(torch.equal(found[name], wanted[name]) for name in names)


def test_the_time_ends_it_between_two_matrices_or_in_a_pass_over_the_rows(
    deltas: Deltas, make_examples: Callable[..., Examples]
) -> None:
    names, rows = rounding.matrices_of(deltas), make_examples(ROWS)
    asked = 1 + len(names)  # before the pass, and at each module: the rows are one pack
    for more, count in ((0, 0), (2, 2), (-3, 0), (-asked, 0)):
        answers = iter([True] * (asked + more))
        found = rounding.rounded(deltas.model, names, rows, partial(next, answers, False))
        assert list(found) == names[:count]
        assert not any(module._forward_pre_hooks for module in deltas.model.base.modules())


def test_pairs_are_rows_as_well(deltas: Deltas, make_examples: Callable[..., Examples]) -> None:
    names = rounding.matrices_of(deltas)
    found = rounding.rounded(deltas.model, names, make_examples(ROWS, group=2), lambda: True)
    assert list(found) == names
