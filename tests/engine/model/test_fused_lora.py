from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.fused_lora import fuse_lora, unfuse_lora
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.objectives import sft

Run = tuple[float, dict[str, torch.Tensor]]


def _deltas(folder: Path, plan: Plan) -> Deltas:
    deltas = add_deltas(load_model(str(folder), plan.dtype), plan, seed=0)
    random = torch.Generator().manual_seed(1)
    for name, weight in deltas.parameters.items():
        if ".lora_B." in name:  # zero at the start, where A's gradient would be zero, too
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=random))
    deltas.model.train()
    return deltas


def _gradients(deltas: Deltas, examples: Examples) -> Run:
    deltas.model.zero_grad()
    loss = sft.loss(deltas.model, collate(examples, [0, 1, 2], 40))
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in deltas.parameters.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 3e-2)])
def test_loss_and_gradients_are_those_of_peft(
    tiny_model: Path,
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
    dtype: str,
    tolerance: float,
) -> None:
    deltas, examples = _deltas(tiny_model, make_plan(dtype=dtype)), make_examples([9, 4, 20], seed=0)
    loss, gradients = _gradients(deltas, examples)
    assert unfuse_lora(deltas.network) == 14
    stock_loss, stock = _gradients(deltas, examples)
    assert loss == pytest.approx(stock_loss, rel=tolerance)
    for name, gradient in stock.items():
        assert float(gradient.norm()) > 0
        assert float((gradients[name] - gradient).norm()) <= tolerance * float(gradient.norm()), name


def test_scoring_and_a_switched_off_adapter_go_peft_s_own_way(
    tiny_model: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    deltas, examples = _deltas(tiny_model, make_plan(dtype="bfloat16")), make_examples([9, 4, 20], seed=0)
    batch = collate(examples, [0, 1, 2], 40)
    with torch.no_grad():
        scored = deltas.model(batch)
    with deltas.network.disable_adapter():
        base = deltas.model(batch).detach()
    unfuse_lora(deltas.network)
    with torch.no_grad():
        assert torch.equal(scored, deltas.model(batch))
    with deltas.network.disable_adapter():
        assert torch.equal(base, deltas.model(batch).detach())
    assert not torch.equal(scored, base)


def test_layers_with_dropout_stay_peft_s(tiny_model: Path, make_plan: Callable[..., Plan]) -> None:
    deltas = add_deltas(load_model(str(tiny_model), "float32"), make_plan(dropout=0.05), seed=0)
    assert unfuse_lora(deltas.network) == 0
    assert fuse_lora(deltas.network) == 0
