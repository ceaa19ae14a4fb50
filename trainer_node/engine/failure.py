"""What a failed run or trial says: a code, and one sentence for people."""

from __future__ import annotations

import torch

from shared.errors import EngineError, PodiumError
from shared.files import is_disk_full
from shared.messages.runs import ErrorCode
from trainer_node.engine.memory.oom import is_out_of_memory


def explain(error: Exception) -> tuple[ErrorCode, str]:
    """Return an error's code and one sentence for people."""
    if isinstance(error, EngineError):
        return error.code, str(error)
    if is_out_of_memory(error):
        return ErrorCode.OUT_OF_MEMORY, f"out of memory, also at the smallest step: {_first_line(error)}"
    if isinstance(error, OSError) and is_disk_full(error):
        return ErrorCode.DISK_FULL, f"the disk is full: {error}"
    if isinstance(error, torch.AcceleratorError):
        return ErrorCode.DEVICE, f"the device failed: {_first_line(error)}"
    prefix = "" if isinstance(error, PodiumError) else f"{type(error).__name__}: "
    return ErrorCode.INTERNAL, f"{prefix}{_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]
