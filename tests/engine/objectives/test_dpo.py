"""Preference loss against a plain computation, and its packing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.evaluate.metric import reference_logprobs, score_dpo
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.objectives import dpo

LENGTHS = [9, 12, 30, 7, 5, 8]  # three pairs


@pytest.fixture
def pairs(make_examples: Callable[..., Examples]) -> Examples:
    return make_examples(LENGTHS, group=2)


@pytest.fixture
def deltas(tiny_model: Path, make_plan: Callable[..., Plan]) -> Deltas:
    return add_deltas(load_model(str(tiny_model), torch.float32), make_plan("lora"), seed=0)


def change(deltas: Deltas) -> None:
    random = torch.Generator().manual_seed(1)
    for parameter in deltas.parameters.values():
        parameter.data.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=random))


@torch.no_grad()
def plain_logprob(model: torch.nn.Module, pairs: Examples, document: int) -> float:
    span = slice(pairs.offsets[document], pairs.offsets[document + 1])
    ids = torch.from_numpy(pairs.ids[span]).long()[None]
    labels = torch.from_numpy(pairs.labels[span]).long()
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return -F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum").item()


def test_untrained_is_ln_2(deltas: Deltas, pairs: Examples) -> None:
    ready = pairs.with_reference(reference_logprobs(deltas.model, pairs))
    assert score_dpo(deltas.model, ready).loss == pytest.approx(math.log(2), abs=1e-6)


def test_equals_the_plain_computation(deltas: Deltas, pairs: Examples, tiny_model: Path) -> None:
    stock = load_model(str(tiny_model), torch.float32)
    before = [plain_logprob(stock, pairs, document) for document in range(6)]
    np.testing.assert_allclose(reference_logprobs(deltas.model, pairs), before, rtol=1e-5)
    ready = pairs.with_reference(np.array(before, np.float32))
    change(deltas)
    after = [plain_logprob(deltas.network, pairs, document) for document in range(6)]
    gains = np.array(after) - np.array(before)
    wanted = np.log1p(np.exp(-0.1 * (gains[0::2] - gains[1::2])))
    assert np.ptp(wanted) > 0.01
    found = score_dpo(deltas.model, ready)
    np.testing.assert_allclose(found.per_example, wanted, atol=1e-5)
    packed = dpo.loss(deltas.model, collate(ready, [2, 0, 1], 80))
    assert packed.item() == pytest.approx(wanted.sum(), abs=1e-4)


def test_packing_changes_no_gradient(deltas: Deltas, pairs: Examples) -> None:
    ready = pairs.with_reference(reference_logprobs(deltas.model, pairs))
    change(deltas)
    found = []
    for packs in ([[0, 1, 2]], [[2], [0], [1]]):
        for parameter in deltas.parameters.values():
            parameter.grad = None
        for indices in packs:
            dpo.loss(deltas.model, collate(ready, indices, 80)).backward()
        found.append({name: parameter.grad for name, parameter in deltas.parameters.items()})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_pairs_without_reference_are_refused(deltas: Deltas, pairs: Examples) -> None:
    with pytest.raises(ValueError, match="reference"):
        dpo.loss(deltas.model, collate(pairs, [0], 80))
