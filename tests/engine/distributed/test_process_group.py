"""How the processes that train together share out their packs."""

from __future__ import annotations

from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup


def test_packs_are_dealt_out_in_turn_and_the_last_is_repeated() -> None:
    groups = [ProcessGroup(rank, 2) for rank in range(2)]
    assert groups[0].share("abc") == [(0, "a", True), (2, "c", True)]
    assert groups[1].share("abc") == [(1, "b", True), (3, "c", False)]
    assert SINGLE_PROCESS.share("ab") == [(0, "a", True), (1, "b", True)]
    assert ProcessGroup(3, 4).share([]) == []
