"""One process of test_turns: `turns_side.py FOLDER`."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

from shared.messages.hardware import Hardware
from trainer_node.engine.__main__ import leave
from trainer_node.engine.distributed.process_group import ProcessGroup, destroy, join
from trainer_node.engine.distributed.turns import first_then_others

LOAD_S = 0.2  # of a process that loads in its turn
WAIT_S = 60.0  # for the others' beginning, where they should load at the same time


def main() -> None:
    """Load twice, as a rank: what fits in memory several times, and what doesn't."""
    group, folder = join(Hardware(device="cpu", count=3, memory_bytes=2**34), 100.0), Path(sys.argv[1])
    found = {
        "small": loads_overlap(group, 0, folder / "small"),
        "large": loads_overlap(group, 2**60, folder / "large"),
    }
    (folder / f"{group.rank}.json").write_text(json.dumps(found))
    destroy(group)


def loads_overlap(group: ProcessGroup, size: int, folder: Path) -> bool:
    """Whether the processes after rank 0 load at the same time what takes `size` bytes in each."""
    folder.mkdir(exist_ok=True)
    places = [folder / str(rank) for rank in range(1, group.world)]
    times: list[tuple[float, float]] = []

    def load() -> tuple[str, int]:
        began = time.monotonic()
        (folder / str(group.rank)).touch()
        until = began + (LOAD_S if size or group.is_main else WAIT_S)
        while time.monotonic() < until and (size or not all(place.exists() for place in places)):
            time.sleep(0.01)
        times.append((began, time.monotonic()))
        return "model", size

    assert first_then_others(group, load) == "model"
    (first, *others) = [spans[0] for spans in group.gather_objects(times)]
    assert all(began >= first[1] for began, _ in others)
    return any(later[0] < earlier[1] for earlier, later in pairwise(sorted(others)))


if __name__ == "__main__":
    main()
    leave(0)
