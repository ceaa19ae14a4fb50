"""When a running worker has to be killed."""

from __future__ import annotations

from typing import Any

import pytest

from shared.messages import Phase
from trainer_node.job.monitor import must_stop


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        ({}, None),
        ({"silent_s": 899.0}, None),
        ({"silent_s": 900.0}, "no progress for 900 s"),
        ({"now": 99.9}, None),
        ({"now": 89.9, "silent_s": 80.0}, None),
        ({"now": 90.0, "silent_s": 20.0}, "no progress for 20 s"),  # it should have been ready
        ({"now": 90.0, "silent_s": 20.0, "phase": Phase.VERIFY}, "no progress for 20 s"),
        ({"now": 95.0, "silent_s": 20.0, "started_at": 91.0}, None),
        ({"now": 100.0}, "the deadline passed"),
        ({"now": 100.0, "phase": None}, "the deadline passed"),
        ({"now": 100.0, "phase": Phase.EXPORT}, None),  # about to finish
        ({"now": 100.0, "phase": Phase.EXPORT, "silent_s": 900.0}, "no progress for 900 s"),
        ({"now": 120.0, "started_at": 95.0}, None),  # started late, exports at once
    ],
)
def test_a_worker_is_killed_for_silence_and_at_the_deadline(seen: dict[str, Any], why: str | None) -> None:
    usual: dict[str, Any] = {
        "now": 50.0,
        "silent_s": 1.0,
        "hang_s": 900.0,
        "started_at": 10.0,
        "ready_by": 90.0,
        "deadline_at": 100.0,
        "phase": Phase.TRAIN,
    }
    assert must_stop(**(usual | seen)) == why
