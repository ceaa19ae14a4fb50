"""Have the kernel kill a container's worker: a process that takes all memory of its control group.

    python -m bench.tournament.memory_taker WORKER

Of a group that is out of memory the kernel kills the process with the highest score: its memory, and for the
worker the most that can be added, the group's limit. A worker is larger than what this module imports. What
was taken is free again afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from shared.processes import start_time
from trainer_node.worker.crash import out_of_memory_kills

PIECE: Final = b"x" * (1 << 20)  # less than what the end of a worker sets free


def take_memory(worker: int) -> None:
    """Fill a worker's group from another process until the kernel has killed the worker."""
    command = [sys.executable, "-m", __name__, str(worker)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)


def group_of(pid: int, root: Path = Path("/")) -> Path:
    """Return the folder of a process's memory control group."""
    for line in (root / "proc" / str(pid) / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return root / "sys/fs/cgroup/memory" / path.lstrip("/")
        unified = root / "sys/fs/cgroup" / path.lstrip("/")
    return unified


def main(worker: int) -> None:
    """Take memory in the worker's group until the worker is gone."""
    began = start_time(worker)
    (group_of(worker) / "cgroup.procs").write_text(str(os.getpid()))
    Path(f"/proc/{worker}/oom_score_adj").write_text("1000")
    taken, kills = [], out_of_memory_kills()
    while out_of_memory_kills() == kills and began is not None and start_time(worker) == began:
        taken.append(bytearray(PIECE))


if __name__ == "__main__":
    main(int(sys.argv[1]))
