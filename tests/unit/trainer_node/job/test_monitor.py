"""What of a worker's progress a node publishes."""

from __future__ import annotations

from shared.messages import Phase, Progress
from trainer_node.job.monitor import worth_publishing


def test_a_message_is_always_published() -> None:
    lines = [
        Progress(
            task="t", slot="a", phase=Phase.INGEST, step=step, message="3 rows dropped" if step == 1 else None
        )
        for step in range(5)
    ]
    assert [reported.step for reported in worth_publishing(lines)] == [1, 4]
    assert worth_publishing([]) == []
