"""The training loss: the scorer's metric, Hugging Face's loss, the same however examples are packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.evaluate.metric import score_sft
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.objectives import sft

LENGTHS = [9, 30, 4, 17, 12]


@pytest.fixture
def deltas(tiny_model: Path, make_plan: Callable[..., Plan]) -> Deltas:
    found = add_deltas(load_model(str(tiny_model), torch.float32), make_plan("mixed"), seed=3)
    random = torch.Generator().manual_seed(1)
    for name, parameter in found.parameters.items():
        if ".lora_B." in name:  # zero at the start: the gradient of lora_A would be zero as well
            parameter.data.normal_(0, 0.1, generator=random)
    return found


def gradients(deltas: Deltas, examples: Examples, packs: list[list[int]], capacity: int) -> dict[str, Any]:
    deltas.model.train()
    for indices in packs:
        sft.loss(deltas.model, collate(examples, indices, capacity)).backward()
    found = {name: parameter.grad for name, parameter in deltas.parameters.items()}
    for parameter in deltas.parameters.values():
        parameter.grad = None
    return found


def test_the_loss_is_the_metric(deltas: Deltas, make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(LENGTHS)
    loss = sft.loss(deltas.model, collate(examples, [0, 1, 2, 3, 4], 80)) / len(examples)
    assert loss.item() == pytest.approx(score_sft(deltas.model, examples).loss, abs=1e-6)


def test_packing_changes_neither_loss_nor_gradients(
    deltas: Deltas, make_examples: Callable[..., Examples]
) -> None:
    examples = make_examples(LENGTHS)
    together = gradients(deltas, examples, [[0, 1, 2, 3, 4]], 80)
    for packs in ([[0], [1], [2], [3], [4]], [[4, 2], [1, 0, 3]]):
        apart = gradients(deltas, examples, packs, 64)
        assert together.keys() == apart.keys()
        for name, gradient in together.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradient, apart[name], atol=1e-6, rtol=1e-4, msg=name)


def test_equals_the_hugging_face_loss_and_gradients(
    deltas: Deltas, make_examples: Callable[..., Examples]
) -> None:
    examples = make_examples([21])
    batch = collate(examples, [0], 21)
    ours = sft.loss(deltas.model, batch)
    ours.backward()
    found = {name: parameter.grad for name, parameter in deltas.parameters.items()}
    for parameter in deltas.parameters.values():
        parameter.grad = None
    labels = torch.from_numpy(examples.labels).long()[None]
    theirs = deltas.network(input_ids=batch.ids_T[None], labels=labels, use_cache=False).loss
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for name, parameter in deltas.parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_padding_has_no_part_in_it(deltas: Deltas, make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(LENGTHS)
    tight = gradients(deltas, examples, [[0, 1]], 39)
    padded = gradients(deltas, examples, [[0, 1]], 100)
    for name, gradient in tight.items():
        torch.testing.assert_close(gradient, padded[name], atol=1e-7, rtol=1e-5, msg=name)


def test_long_answers_weigh_no_more_than_short_ones(
    deltas: Deltas, make_examples: Callable[..., Examples]
) -> None:
    examples = make_examples([4, 60])
    short, long = (sft.loss(deltas.model, collate(examples, [index], 64)).item() for index in (0, 1))
    both = sft.loss(deltas.model, collate(examples, [0, 1], 64)).item()
    assert both == pytest.approx(short + long, abs=1e-5)


def test_training_lowers_it_and_dropout_follows_the_global_generator(
    tiny_model: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    plan = make_plan("lora", dropout=0.2, dtype="bfloat16")
    deltas = add_deltas(load_model(str(tiny_model), plan.dtype), plan, seed=0)
    examples = make_examples([16] * 4)
    optimizer = torch.optim.AdamW(deltas.param_groups(plan))
    before = score_sft(deltas.model, examples).loss
    deltas.model.train()
    for step in range(20):
        torch.manual_seed(step)
        loss = sft.loss(deltas.model, collate(examples, [0, 1, 2, 3], 64)) / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert score_sft(deltas.model, examples).loss < before - 0.5

    def dropped(seed: int) -> float:
        torch.manual_seed(seed)
        return sft.loss(deltas.model, collate(examples, [0, 1, 2, 3], 64)).item()

    assert dropped(1) == dropped(1) != dropped(2)
