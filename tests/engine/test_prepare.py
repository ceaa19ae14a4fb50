"""What a run finds out about its machine before the first step."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from shared.messages import Hardware
from tests.engine.train.test_loop import JOB
from trainer_node.engine import prepare
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "planned"),
    [
        (78.6, 80),  # what a context and the driver leave
        (76.1, 80),
        (40.0, 40),  # another process's memory, or a slice of the GPU
    ],
)
def test_the_plan_is_made_for_the_memory_that_is_free(
    free: float, planned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), 80 * GIB))
    hardware = Hardware(device="H100", count=1, memory_bytes=80 * GIB)
    job, said = replace(JOB, hardware=hardware), list[str]()
    group = ProcessGroup(device=torch.device("cuda", 0))
    found = prepare.with_free_memory(job, group, said.append)
    assert found.hardware.memory_bytes == planned * GIB
    assert said == [] or said == ["only 40.0 of 80.0 GiB of a GPU are free: the plan is made for that"]
    assert bool(said) == (planned < 80)


def test_a_cpu_has_the_memory_that_its_half_states() -> None:
    assert prepare.with_free_memory(JOB, SINGLE_PROCESS, pytest.fail) is JOB
