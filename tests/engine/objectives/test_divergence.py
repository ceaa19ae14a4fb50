"""The divergence from the base model against a plain computation with whole distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.planning.architectures import Batching
from shared.planning.plan import Plan
from trainer_node.engine.data.examples import IGNORED, BaseStates, Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.evaluate.base_states import count_places, fill
from trainer_node.engine.evaluate.metric import score_sft
from trainer_node.engine.model import logprobs
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.objectives import sft

LENGTHS = [9, 12, 30, 7, 5]
COEFFICIENT = 0.7


@pytest.fixture(params=["lora", "dense"])
def deltas(request: pytest.FixtureRequest, tiny_model: Path, make_plan: Callable[..., Plan]) -> Deltas:
    return add_deltas(load_model(str(tiny_model), torch.float32), make_plan(request.param), seed=0)


@pytest.fixture
def examples(make_examples: Callable[..., Examples]) -> Examples:
    """Return rows of which the second has a label on its first token."""
    first = np.zeros(len(LENGTHS), dtype=bool)
    first[1] = True
    return replace(make_examples(LENGTHS), first_labelled=first)


def known(model: torch.nn.Module, examples: Examples) -> Examples:
    """Return the rows with the states of the model as it is, in another order than theirs in the array."""
    counts = count_places(examples)
    starts = (np.cumsum(counts[::-1]) - counts[::-1])[::-1]
    states = np.zeros((int(counts.sum()), 64), np.float32)
    fill(states, model, examples.with_base(BaseStates(None, starts)))
    weight = COEFFICIENT * len(examples) / len(states)
    return examples.with_base(BaseStates(states, starts, weight))


def change(deltas: Deltas) -> None:
    random = torch.Generator().manual_seed(1)
    for parameter in deltas.parameters.values():
        parameter.data.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=random))


def documents(examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and the labels as the scorer has them: also on a document's first token."""
    firsts = examples.first_labelled
    assert firsts is not None
    for (start, end), first in zip(pairwise(examples.offsets.tolist()), firsts, strict=True):
        ids = torch.from_numpy(examples.ids[start:end]).long()
        labels = torch.from_numpy(examples.labels[start:end].copy()).long()
        if first:
            labels[0] = ids[0]
        yield ids, labels


def plain(model: Any, base: Any, examples: Examples) -> Tensor:
    """Return the score as upstream computes it: row by row, from all logits of both models."""
    losses, total, count = [], torch.zeros(()), 0
    for ids, labels in documents(examples):
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        with torch.no_grad():
            wanted = torch.log_softmax(base(input_ids=ids[None], use_cache=False).logits[0].float(), -1)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED))
        logp, mask = torch.log_softmax(logits, -1), labels != IGNORED
        total = total + (logp.exp() * (logp - wanted)).sum(-1)[mask].sum()
        count += int(mask.sum())
    return torch.stack(losses).mean() + COEFFICIENT * total / count


@pytest.mark.parametrize("batching", Batching)
def test_the_metric(deltas: Deltas, examples: Examples, tiny_model: Path, batching: Batching) -> None:
    base = load_model(str(tiny_model), torch.float32)
    deltas.model.batching = batching
    ready = known(deltas.model, examples)
    bare = score_sft(deltas.model, examples)
    assert score_sft(deltas.model, ready).loss == pytest.approx(bare.loss, abs=1e-6)  # no step, no divergence
    change(deltas)
    with torch.no_grad():
        wanted = float(plain(deltas.network, base, examples))
    found = score_sft(deltas.model, ready)
    assert found.loss == pytest.approx(wanted, abs=2e-5)
    assert wanted > score_sft(deltas.model, examples).loss + 0.01
    # A single row keeps the weight of all rows.
    assert score_sft(deltas.model, ready.take([2])).loss == pytest.approx(found.per_example[2], abs=2e-6)


@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("plain_head", [True, False])
def test_the_gradient(
    deltas: Deltas,
    examples: Examples,
    tiny_model: Path,
    rows: int,
    plain_head: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logprobs, "logit_rows", lambda vocabulary, cpu: rows * logprobs.COPIES)
    base = load_model(str(tiny_model), torch.float32)
    deltas.model.plain_head = plain_head
    ready = known(deltas.model, examples)
    change(deltas)
    batch = collate(ready, [2, 0, 4, 1, 3], 80)
    loss = sft.loss(deltas.model, batch) / len(examples)
    parameters = list(deltas.parameters.values())
    found = torch.autograd.grad(loss, parameters)
    wanted_loss = plain(deltas.network, base, examples)
    wanted = torch.autograd.grad(wanted_loss, parameters)
    assert loss.item() == pytest.approx(wanted_loss.item(), abs=2e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_first_labels_stay_with_their_rows(examples: Examples) -> None:
    taken = examples.take([3, 1])
    assert taken.compared[0] == 0
    assert taken.compared[taken.offsets[1]] == 1
    assert taken.fingerprint() != examples.fingerprint()
