"""What a run's parts say while they are put together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.clock import WallClock
from shared.messages.hardware import Hardware
from shared.planning import hardware
from shared.planning.plan import Plan
from tests.engine.worker_run import bare_job
from trainer_node.engine import assemble
from trainer_node.engine.context import RunContext
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.model.attention import PER_DOCUMENT, Chosen, _dense
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop

TIB = 2**40
RECORD: Any = SimpleNamespace(fingerprint="rows")
SHARDED: Any = SimpleNamespace(parallel="fsdp2")


def test_a_run_says_that_its_attention_is_slow(
    tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [Chosen(PER_DOCUMENT, _dense(), "torch-varlen: no kernel image")]
    monkeypatch.setattr(assemble, "choose_kernels", lambda config, device: chosen)
    said: list[str] = []
    reporter = Reporter(tmp_path / "progress.jsonl", "t", "a")
    monkeypatch.setattr(reporter, "message", said.append)
    run = RunContext(bare_job(model_path=str(tiny_model)), tmp_path, WallClock(), reporter, Stop())
    assemble.load_base(run, make_plan("lora", dtype="float32"))
    (told,) = said
    assert told.startswith("training is slower: ")
    assert "torch-varlen: no kernel image" in told


class OneOfFour(ProcessGroup):
    """Rank 0 of four processes, which hears nothing of the others."""

    def broadcast_floats(self, *numbers: float) -> tuple[float, ...]:
        return numbers


def most_per_rank(
    monkeypatch: pytest.MonkeyPatch, folder: Path, total: float, free: float, **job: Any
) -> float:
    """Return the bytes that each of four processes may copy on a machine with so much memory."""
    memory = folder / "meminfo"
    memory.write_text(f"MemTotal: {int(total) // 1024} kB\nMemAvailable: {int(free) // 1024} kB\n")
    monkeypatch.setattr(hardware, "MEMORY_FILE", memory)
    monkeypatch.setattr(hardware, "memory_limits", lambda: [])
    reporter = Reporter(folder / "progress.jsonl", "t", "a")
    gpus = Hardware(device="H100", count=4, memory_bytes=80 * 2**30)
    run = RunContext(bare_job(hardware=gpus, **job), folder, WallClock(), reporter, Stop(), OneOfFour(0, 4))
    return assemble.make_saver(run, RECORD, [SHARDED]).most_bytes


def test_all_processes_copy_what_the_first_one_finds_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others find less free memory, as the first one's copies are there already."""
    monkeypatch.setattr(OneOfFour, "broadcast_floats", lambda *_: (40e9,))
    assert most_per_rank(monkeypatch, tmp_path, TIB, 0.1 * TIB) == 10e9


def test_a_large_sharded_checkpoint_is_copied_on_a_usual_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = partial(most_per_rank, monkeypatch, tmp_path)
    dense_8b, average, dense_14b = 21e9, 7e9, 39.6e9  # bytes of each rank
    assert most(TIB, 0.9 * TIB) > dense_14b
    assert most(TIB, 0.6 * TIB) > dense_8b + average
    # Upstream's container with four GPUs, which has no other slot.
    assert most(440e9, 420e9, memory_share=1.0) > dense_14b
    assert most(440e9, 420e9) > dense_8b


@pytest.mark.parametrize("total", [64e9, 256e9, TIB])
@pytest.mark.parametrize("free_share", [0.01, 0.2, 0.95])
def test_two_slots_that_begin_at_once_leave_memory_free(
    total: float, free_share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_share * total
    both = 2 * 4 * most_per_rank(monkeypatch, tmp_path, total, free)
    assert both <= 0.81 * free
    assert both <= 0.41 * total
