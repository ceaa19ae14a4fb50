"""What the loop's `gradients` asks of the state of a run, for tests of single steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from shared.planning.plan import Plan
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS
from trainer_node.engine.model.adapters import Deltas
from trainer_node.engine.objectives import sft


def step_state(plan: Plan, deltas: Deltas, rows: Examples, **changes: Any) -> Any:
    """Return it: the first step of a run on the CPU, by one thread, with passes that are computed."""
    known = {
        "plan": plan,
        "seed": 0,
        "step": 0,
        "deltas": deltas,
        "objective": sft.loss,
        "examples": rows,
        "device": torch.device("cpu"),
        "process_group": SINGLE_PROCESS,
        "forward": None,
        "cpu_threads": None,
        "recorded": None,
        "alive": lambda: None,
    }
    return SimpleNamespace(**{**known, **changes})
