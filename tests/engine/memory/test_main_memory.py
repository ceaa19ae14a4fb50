"""Who may hold how much of a slot's main memory, and that it is less than all of it."""

from __future__ import annotations

import pytest

from shared.messages.hardware import Hardware
from tests.engine.worker_run import bare_job
from trainer_node.engine.memory import main_memory
from trainer_node.engine.memory.main_memory import most_for_checkpoints, most_for_copy, slot_memory

GPUS = Hardware(device="H100", count=4, memory_bytes=80 * 2**30)
CPU = Hardware(device="cpu", count=8, memory_bytes=1000)
COPIES = 4  # a lowest point's, the start's and two trials'


@pytest.mark.parametrize(("hardware", "share"), [(GPUS, 0.8), (CPU, 0.5)])
def test_all_that_is_held_leaves_room_for_what_comes_and_goes(
    hardware: Hardware, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_memory, "machine_memory", lambda: (2000, 2000))
    job = bare_job(hardware=hardware)
    assert slot_memory(job) == 1000
    assert most_for_checkpoints(job) + COPIES * most_for_copy(job) == pytest.approx(share * 1000)


def test_what_is_taken_already_is_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_memory, "machine_memory", lambda: (2000, 100))
    assert most_for_checkpoints(bare_job(hardware=GPUS)) == pytest.approx(40)
    assert most_for_checkpoints(bare_job(hardware=CPU)) == pytest.approx(100)


def test_a_slot_without_another_one_has_all_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_memory, "machine_memory", lambda: (2000, 2000))
    assert slot_memory(bare_job(hardware=GPUS, memory_share=1.0)) == 2000
