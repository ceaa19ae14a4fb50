"""How the processes that train together share out their packs, and what one of them sends of an error."""

from __future__ import annotations

import errno

import pytest
import torch

from shared.errors import EngineError
from shared.files import is_disk_full
from shared.messages.runs import ErrorCode
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup, portable
from trainer_node.engine.memory.oom import is_out_of_memory


def test_packs_are_dealt_out_in_turn_and_the_last_is_repeated() -> None:
    groups = [ProcessGroup(rank, 2) for rank in range(2)]
    assert groups[0].share("abc") == [(0, "a", True), (2, "c", True)]
    assert groups[1].share("abc") == [(1, "b", True), (3, "c", False)]
    assert SINGLE_PROCESS.share("ab") == [(0, "a", True), (1, "b", True)]
    assert ProcessGroup(3, 4).share([]) == []


def test_an_error_that_is_sent_is_still_what_it_was() -> None:
    full = portable(OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(full, OSError)
    assert is_disk_full(full)
    assert is_out_of_memory(portable(torch.OutOfMemoryError("CUDA out of memory")))
    assert is_out_of_memory(portable(MemoryError()))


def test_an_error_that_can_not_be_sent_keeps_its_text() -> None:
    class OwnError(Exception):
        """Of a library: no other process knows it."""

    for error in (OwnError("a bad kernel"), EngineError(ErrorCode.DEVICE, "a bad kernel")):
        assert str(portable(error)) == f"{type(error).__name__}: a bad kernel"


def test_one_process_raises_its_own_error() -> None:
    SINGLE_PROCESS.raise_in_all(None)
    with pytest.raises(OSError, match="a full disk"):
        SINGLE_PROCESS.raise_in_all(OSError(errno.ENOSPC, "a full disk"))
