"""The planner's memory estimate against peaks of the engine's own steps, traced without a GPU.

`python -m bench memory` has 15 cases of whole models; here are three.
"""

from __future__ import annotations

import pytest

from bench.performance.memory import LEAST, MOST, plan_of
from bench.performance.traced_memory import Case, estimated, traced_peak


@pytest.mark.parametrize(
    "case",
    [
        Case(model="qwen3-0.6b", layers=3, capacity=16384),  # queries and keys are normed
        Case(model="llama-1b", layers=3, rank=16, capacity=16384),  # LoRA, nothing is recomputed
        Case(model="llama-1b", recomputed=True),  # of a few layers the head's chunk would be most
    ],
    ids=lambda case: case.name,
)
def test_the_estimate_is_near_the_traced_peak(case: Case) -> None:
    memory = estimated(case)
    peak = traced_peak(case, plan_of("smollm2-135m", "LoRA 16"))
    assert LEAST <= (memory.total - memory.process) / peak - 1 <= MOST
