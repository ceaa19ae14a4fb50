"""The worker process: `python -m trainer_node.engine RUN_FOLDER/job.json`."""

from __future__ import annotations

import gc
import os
import signal
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from trainer_node.engine.signals import STOP_FILE, Stop

OUT_OF_MEMORY_SCORE = "500"  # of 1000; any process may raise its own


def main() -> int:
    """Run one job; 0 = ready or stopped, 1 = failed, 2 = wrong call."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("usage: python -m trainer_node.engine RUN_FOLDER/job.json", file=sys.stderr)
        return 2
    job_path = Path(sys.argv[1]).absolute()
    stop = Stop()
    stop.write_outcome = lambda: _write_stopped(job_path.parent)  # until the job is read, and more is known
    stop.install(decides=os.environ.get("RANK", "0") == "0")
    _outlive_pipes(job_path.parent / "worker.log")
    _go_first()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Huge pages for large tensors. A step of SmolLM2-135M that trains embeddings makes several of 113 MB: it
    # takes 1.14 s on a CPU, and 1.28 s without (docs/experiments.md). torch reads it when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    began = time.monotonic()
    from trainer_node.engine.distributed import launch  # nothing is imported before signals are listened to
    from trainer_node.engine.export import unverified

    first = launch.rank_of(os.environ) is None
    if first and unverified.submitted(job_path, stop):
        return 0
    if first and (world := launch.world_of(job_path)) > 1:
        ranks = launch.Ranks(launch.command(job_path), world, job_path.parent / STOP_FILE)
        status = ranks.run()
        stop.close()
        if not (ranks.stopping and status == 128 + signal.SIGTERM):
            return status
        stop.write_outcome()  # rank 0 didn't even listen yet
        return 0
    launch.die_with_parent()
    from trainer_node.engine import pipeline  # takes seconds

    gc.freeze()  # half a million objects that live to the end: no collection needs to look at them
    return pipeline.main(job_path, stop, time.monotonic() - began)


def leave(status: int) -> NoReturn:
    """End this process without taking torch apart, which takes .6 s: the slot's next job waits for it.

    All that counts is on disk by now, and no thread writes any more.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk
            stream.flush()
    os._exit(status)


def _outlive_pipes(log: Path) -> None:
    """Send output that goes into a pipe to a file: when the reader dies, the next line would kill the run."""
    for descriptor in (1, 2):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, descriptor)
            os.close(file)


def _go_first(score: Path = Path("/proc/self/oom_score_adj")) -> None:
    """Let the kernel end workers before their nodes when memory runs out, whichever is larger."""
    with suppress(OSError):  # no such file, or a higher score that may not be lowered
        score.write_text(OUT_OF_MEMORY_SCORE)


def _write_stopped(folder: Path) -> None:
    """Write the outcome of a worker that was stopped before it could read its job."""
    temporary = folder / ".outcome.json"
    temporary.write_text('{"status":"stopped"}')
    os.replace(temporary, folder / "outcome.json")


if __name__ == "__main__":
    leave(main())
