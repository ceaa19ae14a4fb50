"""Copies of trained weights in main memory: all processes of a group hold one, or none."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer_node.engine.search import held_copies
from trainer_node.engine.search.held_copies import copy_that_fits

SIZE = 12  # bytes of the weights


def copied(
    others: Sequence[bool], memory: float, parallel: str = "fsdp2", world: int = 2
) -> dict[str, torch.Tensor] | None:
    """Return this process's copy; `others`: whether the other process has room for one, and then has one."""
    answers = iter(others)
    group = SimpleNamespace(gather_objects=lambda here: [here, next(answers)], others=0, sharers=world)
    job = SimpleNamespace(hardware=SimpleNamespace(device="cpu", memory_bytes=memory))
    run: Any = SimpleNamespace(process_group=group, job=job)
    deltas = SimpleNamespace(state=lambda: {"w": torch.ones(3)})
    adapted: Any = SimpleNamespace(deltas=deltas, plan=SimpleNamespace(parallel=parallel))
    return copy_that_fits(run, adapted)


def test_the_processes_parts_are_one_copy_together_and_replicas_are_several() -> None:
    assert copied((True, True), 10 * SIZE) is not None
    assert copied((True, True), 9.9 * SIZE) is None
    assert copied((True, True), 20 * SIZE, "ddp") is not None
    assert copied((True, True), 19.9 * SIZE, "ddp") is None


def test_no_process_has_a_copy_if_one_of_them_has_no_room() -> None:
    assert copied((False,), 10 * SIZE) is None


def test_no_process_has_a_copy_if_one_of_them_could_not_make_its_own() -> None:
    assert copied((True, False), 10 * SIZE) is None


def test_memory_that_can_not_be_had_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(_: Any) -> dict[str, torch.Tensor]:
        raise MemoryError

    monkeypatch.setattr(held_copies, "copy_of", out_of_memory)
    assert copied((True, True), 10 * SIZE) is None
