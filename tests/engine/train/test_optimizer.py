"""AdamW's steps: all weights change or none, whatever memory or a gradient does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer_node.engine.train.optimizer import MOMENTS, apply_gradients, make_moments

SIZES = (3, 1, 4)
NO, YES = torch.tensor(False), torch.tensor(True)


def adamw() -> torch.optim.Optimizer:
    """Return an optimizer over two groups, whose weights have gradients."""
    weights = [torch.nn.Parameter(torch.linspace(-1.0, 1.0, size)) for size in SIZES]
    for number, weight in enumerate(weights, 1):
        weight.grad = torch.full_like(weight, 0.1 * number)
    groups = [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=0.01, fused=True)


def weights_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def all_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return copies of the weights, and of all that is kept of them, in one order."""
    weights = weights_of(optimizer)
    kept = [optimizer.state[weight][name] for weight in weights for name in ("step", *MOMENTS)]
    return [tensor.detach().clone() for tensor in (*weights, *kept)]


def are_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("call", range(1, len(MOMENTS) * len(SIZES) + 1))
def test_memory_that_runs_out_before_the_first_step_changes_nothing(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = 0, torch.zeros_like

    def zeros_like(*values: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made: torch.Tensor = real(*values, **options)
        return made

    optimizer, undisturbed = adamw(), adamw()
    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    with pytest.raises(torch.OutOfMemoryError):
        apply_gradients(optimizer, skip=NO)
    assert are_equal(weights_of(optimizer), weights_of(undisturbed))
    made = [state for state in map(optimizer.state.get, weights_of(optimizer)) if state]
    assert len(made) == (call - 1) // len(MOMENTS)
    assert all(state.keys() == {"step", *MOMENTS} for state in made)
    assert not any(value.any() for state in made for value in state.values())
    for _ in range(2):  # the first one is tried again
        apply_gradients(optimizer, skip=NO)
        apply_gradients(undisturbed, skip=NO)
    assert are_equal(all_of(optimizer), all_of(undisturbed))


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_skipped_changes_no_weight_no_moment_and_no_count(steps_before: int) -> None:
    optimizer = adamw()
    for _ in range(steps_before):
        apply_gradients(optimizer, skip=NO)
    make_moments(optimizer)
    before = all_of(optimizer)
    for bad in (float("nan"), float("inf"), 1.0):
        for weight in weights_of(optimizer):
            assert weight.grad is not None
            weight.grad.fill_(bad)
        apply_gradients(optimizer, skip=YES)
        assert are_equal(all_of(optimizer), before)
    apply_gradients(optimizer, skip=NO)
    assert not are_equal(all_of(optimizer), before)


def test_a_weight_without_a_gradient_has_no_moments() -> None:
    optimizer = adamw()
    idle = weights_of(optimizer)[1]
    idle.grad = None
    make_moments(optimizer)
    assert idle not in optimizer.state
