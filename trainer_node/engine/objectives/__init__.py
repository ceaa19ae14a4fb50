"""Objectives: a batch -> the sum of its examples' losses; the loop divides by the examples of its step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shared.errors import EngineError
from shared.messages.offers import TaskType
from shared.messages.runs import ErrorCode
from trainer_node.engine.data.packing import Batch
from trainer_node.engine.objectives import dpo, sft

Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]


def loss_for(task_type: TaskType) -> Loss:
    """Return the loss that a kind of task is scored by; EngineError(UNSUPPORTED) if there is none."""
    if task_type in (TaskType.INSTRUCT, TaskType.CHAT):
        return sft.loss
    if task_type is TaskType.DPO:
        return dpo.loss
    raise EngineError(ErrorCode.UNSUPPORTED, f"there is no objective for a {task_type.value}")
