"""Noise on embeddings: only where a batch has some, of the size it should have, and the same on every way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from shared.planning.architectures import Batching
from shared.planning.plan import Plan
from tests.engine.step_state import step_state
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import Batch, collate
from trainer_node.engine.data.token_noise import Noise
from trainer_node.engine.model import hidden_states
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.model.recorded_pass import Pass, RecordedPass, room_for
from trainer_node.engine.objectives import sft
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import loop
from trainer_node.engine.train.cpu_threads import CpuThreads

LENGTHS = [9, 30, 4, 17, 12, 25, 7, 14]
NOISE = Noise(alpha=5.0, seed=0, step=0)


@pytest.fixture
def rows(make_examples: Callable[..., Examples]) -> Examples:
    return make_examples(LENGTHS)


@pytest.fixture
def deltas(tiny_model: Path, make_plan: Callable[..., Plan], rows: Examples) -> Deltas:
    """A model that has had noise before, in an object of its own around it."""
    network = load_model(str(tiny_model), "float32")
    label_model(network)(collate(rows, [0], LENGTHS[0], noise=NOISE))
    return add_deltas(network, make_plan("lora", dtype="float32"), seed=3)


def embedded(deltas: Deltas, batch: Batch) -> Tensor:
    """Return what the layers are given in the model's one pass, [T, H]."""
    seen, embeddings = list[Tensor](), deltas.model.base.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda *given: seen.append(given[2].detach()))
    try:
        deltas.model(batch)
    finally:
        hook.remove()
    assert len(seen) == 1
    return seen[0][0]


def test_noise_is_as_large_as_its_document_is_short(deltas: Deltas, rows: Examples) -> None:
    capacity = sum(LENGTHS[:4]) + 10
    plain = embedded(deltas, collate(rows, [0, 1, 2, 3], capacity))
    noisy = embedded(deltas, collate(rows, [0, 1, 2, 3], capacity, noise=NOISE))
    noise_TH, start = (noisy - plain).abs(), 0
    for length in LENGTHS[:4]:
        most = 5.0 / (length * noise_TH.shape[1]) ** 0.5
        assert float(noise_TH[start : start + length].max()) == pytest.approx(most, rel=0.05)
        start += length
    assert not noise_TH[start:].any()  # the padding


def test_padded_rows_have_the_noise_of_packed_ones(deltas: Deltas, rows: Examples) -> None:
    batch = collate(rows, [1, 0, 3, 2], sum(LENGTHS[:4]) + 5, noise=NOISE)
    packed = deltas.model(batch)
    deltas.model.batching = Batching.PADDED
    torch.testing.assert_close(deltas.model(batch), packed, rtol=1e-4, atol=1e-4)
    without = deltas.model(collate(rows, [1, 0, 3, 2], sum(LENGTHS[:4]) + 5))
    assert not torch.allclose(without, packed, rtol=1e-3, atol=1e-3)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_noise_that_is_drawn_in_parts_is_the_same(
    deltas: Deltas, rows: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(rows, [0, 1, 2, 3], 64, noise=NOISE)
    whole = embedded(deltas, batch)
    monkeypatch.setattr(hidden_states, "DRAWN_AT_ONCE", 7 * whole.shape[1])
    assert torch.equal(embedded(deltas, batch), whole)


def by_hand(compute: Pass) -> tuple[Callable[[], None], Tensor]:
    """Stand in for a graph on a CPU: the pass is computed again, on what lies in the same tensors now."""
    loss = torch.zeros(())

    def replay() -> None:
        loss.copy_(compute())

    return replay, loss


@pytest.mark.parametrize("way", ["threads", "recorded", "two packs"])
def test_a_step_has_the_same_noise_on_every_way(
    way: str, deltas: Deltas, rows: Examples, make_plan: Callable[..., Plan]
) -> None:
    """Steps have noise of their own: what was drawn when a pass was recorded is not replayed."""
    plan = replace(make_plan("lora", dtype="float32", capacity=160), noise=5.0)
    everything = list(range(len(LENGTHS)))

    def gradients(packs: list[list[int]], plan: Plan, step: int, **changes: object) -> list[Tensor]:
        deltas.model.train()
        assert loop.gradients(step_state(plan, deltas, rows, step=step, **changes), packs, Stop()) is not None
        found = [parameter.grad.clone() for parameter in deltas.parameters.values()]
        for parameter in deltas.parameters.values():
            parameter.grad = None
        return found

    packs, changes = [everything], dict[str, object]()
    if way == "threads":
        threads = CpuThreads(2, 2)
        assert threads.backward(deltas, sft.loss, rows, everything, 1, Noise(5.0, 0, 0)) is not None
        changes["cpu_threads"] = threads
    elif way == "recorded":
        recorded = RecordedPass(deltas, sft.loss, room_for(rows, packs, 160), by_hand)
        assert recorded.backward(rows, everything, 1, Noise(5.0, 0, 9)) is not None
        changes["recorded"] = recorded
    else:
        packs = [everything[3:], everything[:3]]
    for parameter in deltas.parameters.values():
        parameter.grad = None
    plain, first, second = (
        gradients([everything], replace(plan, noise=noise), step)
        for noise, step in ((0.0, 0), (5.0, 0), (5.0, 1))
    )
    for one, other in ((plain, first), (first, second)):
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(one, other, strict=True))
    for step, wanted in enumerate((first, second)):
        found = gradients(packs, plan, step, **changes)
        for one, same in zip(wanted, found, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-6)
