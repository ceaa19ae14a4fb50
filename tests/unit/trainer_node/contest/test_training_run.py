"""What a contest's run does when its worker can't start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from trainer_node.contest.training_run import TrainingRun
from trainer_node.worker.slot_lock import StuckError


async def test_a_worker_that_can_not_start_yet_is_tried_again() -> None:
    async def start(*args: object) -> None:
        """Find a process on the lock that the kernel can't end."""
        raise StuckError("slot.lock is held")

    run = TrainingRun.__new__(TrainingRun)
    nothing = SimpleNamespace(remove_parts=int, remove_outcome=int, newest_step=int)
    run.folder, run.supervisor = cast(Any, nothing), cast(Any, SimpleNamespace(start=start))
    run._deaths, run._counted = 0, True
    await run._start()
    assert run._counted  # it is no death
