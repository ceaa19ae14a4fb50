"""Passes that are recorded once: the same gradients and losses as passes that are computed each time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.planning.plan import Plan
from shared.planning.throughput import waits_for_launches
from tests.engine.step_state import step_state
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate, pack
from trainer_node.engine.model import attention, recorded_pass
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.attention import PER_DOCUMENT, Chosen, _dense
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.model.recorded_pass import (
    Pass,
    RecordedPass,
    Room,
    fitted_pack,
    on_cuda,
    recorded_pass_for,
    room_for,
)
from trainer_node.engine.objectives import sft
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import loop

LENGTHS = [9, 30, 4, 17, 12, 25, 7, 14, 11, 6, 22, 8, 19, 5, 10, 16]
CAPACITY = 64


def by_hand(compute: Pass) -> tuple[Callable[[], None], Tensor]:
    """Stand in for a graph on a CPU: the pass is computed again, on what lies in the same tensors now."""
    loss = torch.zeros(())

    def replay() -> None:
        loss.copy_(compute())

    for _ in range(2):  # as before a recording: what they add to the gradients must not stay
        compute()
    return replay, loss


@pytest.fixture
def deltas(tiny_model: Path, make_plan: Callable[..., Plan]) -> Deltas:
    made = add_deltas(load_model(str(tiny_model), "float32"), make_plan("mixed"), seed=3)
    made.model.train()
    return made


def steps(deltas: Deltas, rows: Examples, plan: Plan, recorded: RecordedPass | None) -> list[Any]:
    """Losses and gradients of the loop's own steps, over packs that are filled differently."""
    run = step_state(plan, deltas, rows, recorded=recorded)
    found = []
    for packs in ([[0, 1], [2, 3, 4]], [[5, 6, 7]], [[8], [9, 10, 11, 2], [12]]):
        answer = loop.gradients(run, packs, Stop())
        assert answer is not None
        found.append(float(answer[0]))
        for parameter in deltas.parameters.values():
            assert parameter.grad is not None
            found.append(parameter.grad.clone())
            parameter.grad = None
    return found


@pytest.mark.parametrize(
    "room",
    [
        Room(CAPACITY, documents=9, labels=60, longest=30),
        Room(
            CAPACITY, documents=4, labels=60, longest=30
        ),  # some packs have no room and are computed as usual
        Room(CAPACITY, documents=9, labels=24, longest=30),
    ],
)
def test_steps_are_those_without_a_recording(
    room: Room, deltas: Deltas, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    rows, plan = make_examples(LENGTHS), make_plan("mixed", capacity=CAPACITY)
    wanted = steps(deltas, rows, plan, None)
    recorded = RecordedPass(deltas, sft.loss, room, by_hand)
    found = steps(deltas, rows, plan, recorded)
    assert deltas.model.recordable
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_recorded_is_computed_as_usual(
    deltas: Deltas, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    rows, plan = make_examples(LENGTHS), make_plan("mixed", capacity=CAPACITY)
    tries = []

    def refuse(compute: Pass) -> tuple[Callable[[], None], Tensor]:
        tries.append(compute())
        raise RuntimeError("operation not permitted when stream is capturing")

    recorded = RecordedPass(deltas, sft.loss, room_for(rows, [[0, 1]], CAPACITY), refuse)
    found = steps(deltas, rows, plan, recorded)
    assert not deltas.model.recordable
    assert len(tries) == 1  # nor is it tried again in another run of this model
    for one, other in zip(found, steps(deltas, rows, plan, None), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_a_recording_that_reads_old_memory_is_not_used(
    deltas: Deltas, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    rows, plan = make_examples(LENGTHS), make_plan("mixed", capacity=CAPACITY)

    def stale(compute: Pass) -> tuple[Callable[[], None], Tensor]:
        return lambda: None, compute()

    recorded = RecordedPass(deltas, sft.loss, room_for(rows, [[0, 1]], CAPACITY), stale)
    found = steps(deltas, rows, plan, recorded)
    assert not deltas.model.recordable
    for one, other in zip(found, steps(deltas, rows, plan, None), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_no_pass_is_computed_next_to_a_recording(
    deltas: Deltas, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    """A recording keeps as much memory as a pass takes: two would be twice what was planned."""
    seen = []

    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        seen.append("pass")
        return sft.loss(model, batch)

    def record(compute: Pass) -> tuple[Callable[[], None], Tensor]:
        replay, found = by_hand(compute)
        seen.append("recorded")

        def noted() -> None:
            replay()
            seen[-1] = "replay"

        return noted, found

    rows = make_examples(LENGTHS)
    recorded = RecordedPass(deltas, loss, room_for(rows, [[0, 1]], CAPACITY), record)
    assert recorded.backward(rows, [0, 1], 1) is not None
    assert seen == ["pass"] * 3 + ["recorded", "replay", "replay"]


def test_every_pack_of_an_epoch_has_room(make_examples: Callable[..., Examples]) -> None:
    rows = make_examples(LENGTHS)
    packs = pack(rows.lengths, CAPACITY, 0, 0)
    room = room_for(rows, packs, CAPACITY)
    for indices in packs:
        fitted = fitted_pack(collate(rows, indices, CAPACITY), room)
        assert fitted is not None
        assert len(fitted.cu_seqlens) == room.documents + 1
        assert len(fitted.weights_N) == len(fitted.labels_N) == room.labels
        assert fitted.cu_seqlens[-1] == CAPACITY
        assert fitted.cu_seqlens.diff().max() <= room.longest
        assert fitted.cu_seqlens.diff().min() >= 0
        assert float(fitted.weights_N.sum()) == pytest.approx(len(indices))


def test_only_what_is_small_waits_for_launches() -> None:
    assert waits_for_launches(135_000_000, 30, 1_500)
    assert waits_for_launches(494_000_000, 24, 8_192)
    assert not waits_for_launches(494_000_000, 24, 32_768)
    assert not waits_for_launches(1_240_000_000, 16, 16_384)
    assert not waits_for_launches(8_000_000_000, 32, 4_096)


def test_a_cpu_records_nothing(
    deltas: Deltas, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    rows = make_examples(LENGTHS)
    plan = make_plan("mixed", capacity=CAPACITY, dtype="bfloat16")
    packs = SimpleNamespace(of_epoch=lambda: [[0, 1]])
    assert recorded_pass_for(plan, deltas, sft.loss, rows, packs) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("cause", ["", "soft cap", "sinks", "no kernel"])
def test_no_recording_is_begun_that_must_fail(
    cause: str,
    deltas: Deltas,
    make_plan: Callable[..., Plan],
    make_examples: Callable[..., Examples],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Documents that are attended one by one have their lengths read from the GPU."""
    if cause == "soft cap":
        deltas.model.base.config.attn_logit_softcapping = 50.0
    elif cause == "sinks":
        deltas.model.base.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    name = PER_DOCUMENT if cause == "no kernel" else "torch-varlen"
    monkeypatch.setattr(attention, "choose_kernels", lambda config, device: [Chosen(name, _dense())])
    monkeypatch.setattr(recorded_pass, "RecordedPass", lambda *given: given)
    on_a_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    rows, plan = make_examples(LENGTHS), make_plan("mixed", capacity=CAPACITY, dtype="bfloat16")
    packs: Any = SimpleNamespace(of_epoch=lambda: [[0, 1]])
    known: Any = replace(deltas, parameters={"w": on_a_gpu})
    assert (recorded_pass_for(plan, known, sft.loss, rows, packs) is None) == bool(cause)


class FakeCuda:
    """Stands in for torch.cuda: notes whether a recording was begun, and the mode that finds waiting code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode, self.recordings = 1, 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, stub in {
            "current_stream": lambda: stream,
            "Stream": lambda: stream,
            "stream": lambda stream: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": self.graph,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stub)

    def graph(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        self.recordings += 1
        return nullcontext()

    def set_mode(self, mode: int | str) -> None:
        self.mode = 2 if mode == "error" else int(mode)


@pytest.mark.parametrize("waits", [False, True])
def test_a_pass_that_waits_for_the_gpu_is_found_before_the_recording(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch)

    def compute() -> Tensor:
        if waits and cuda.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.zeros(())

    with pytest.raises(RuntimeError, match="synchronizing") if waits else nullcontext():
        on_cuda(compute)
    assert cuda.recordings == (0 if waits else 1)
    assert cuda.mode == 1  # as it was


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_gives_the_same_gradients(
    tiny_model: Path, make_plan: Callable[..., Plan], make_examples: Callable[..., Examples]
) -> None:
    plan, rows = make_plan("mixed", capacity=CAPACITY, dtype="bfloat16"), make_examples(LENGTHS)
    model = load_model(str(tiny_model), "bfloat16").cuda()
    deltas = add_deltas(model, plan, seed=3)
    deltas.model.train()
    recorded = RecordedPass(deltas, sft.loss, Room(CAPACITY, 9, 60, 30), on_cuda)
    for indices in ([0, 1], [2, 3, 4], [5, 6, 7]):
        loss = recorded.backward(rows, indices, 3)
        assert loss is not None
        found = [
            parameter.grad.clone() for parameter in deltas.parameters.values() if parameter.grad is not None
        ]
        usual = sft.loss(deltas.model, collate(rows, indices, CAPACITY, "cuda")) / 3
        wanted = torch.autograd.grad(usual, list(deltas.parameters.values()))
        assert float(loss) == pytest.approx(float(usual), rel=1e-2)
        for one, other in zip(found, wanted, strict=True):
            assert float((one - other).norm()) <= 3e-2 * float(other.norm())
        for parameter in deltas.parameters.values():
            parameter.grad = None
