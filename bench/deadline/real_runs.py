"""Real short runs against the wall clock: worker processes that are halted and killed on their way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.harness import tiny_jobs
from shared.files import folder_digest
from shared.messages.runs import OutcomeStatus, Phase, decode_progress, decode_worker_job
from trainer_node.worker.progress import stop_reason

BUDGET_S = 60.0  # until ready_by; imports alone take 5 CPU seconds of it, with every start
RESERVE_S = 6.0  # ready_by is so long before the deadline
LAST_CALL_S = 54.0  # after the deadline: a tenth of upstream's margin would be enough for a job of an hour
HANG_S = 900.0
AT_ONCE = 2
LONGEST_STALL_S = 15.0
POLL_S = 0.1


def runs(count: int, seed: int, folder: Path, data: Path) -> dict[str, float]:
    """Make so many runs, two at a time; return the figures."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ends = list(pool.map(lambda index: live(folder / str(index), data, seed + index), range(count)))
    missed = [index for index, end in enumerate(ends) if end is None or end > RESERVE_S + LAST_CALL_S]
    for index in missed:
        print(f"run {index}: no submission, kept in {tiny_jobs.keep(folder / str(index) / 'job.json')}")
    return {
        "runs": count,
        "without_submission": len(missed),
        "after_ready_by": sum(end is None or end > 0 for end in ends),
        "latest_s": round(max((end for end in ends if end is not None), default=0.0), 2),
    }


def live(folder: Path, data: Path, seed: int) -> float | None:
    """Make one run with a stall and up to two kills; return its export's seconds after `ready_by`."""
    luck, began = random.Random(seed), time.time()
    job = tiny_jobs.write_job(
        folder, data, profile="lora_r16", clock="wall", start_at=began, ready_by=began + BUDGET_S
    )
    kills = sorted(began + luck.uniform(0.0, BUDGET_S) for _ in range(luck.randint(0, 2)))
    stall = (began + luck.uniform(0.2, 1.0) * BUDGET_S, luck.uniform(1.0, LONGEST_STALL_S))
    worker, started, stalled = tiny_jobs.start(job), time.time(), False
    while (now := time.time()) < began + BUDGET_S + RESERVE_S + LAST_CALL_S:
        outcome = tiny_jobs.outcome_of(job)
        if outcome is not None and outcome.status is not OutcomeStatus.STOPPED:
            tiny_jobs.kill(worker)
            return _end(job, began + BUDGET_S)
        if not stalled and now >= stall[0]:
            stalled = True
            _signal(worker, signal.SIGSTOP)
        elif stalled and stall[0] + stall[1] <= now < stall[0] + stall[1] + 1:
            _signal(worker, signal.SIGCONT)
        if (
            (kills and now >= kills[0] and kills.pop(0))
            or _late(job, started, now)
            or worker.poll() is not None
        ):
            tiny_jobs.kill(worker)
            worker, started = tiny_jobs.start(job), time.time()
        time.sleep(POLL_S)
    tiny_jobs.kill(worker)
    return None


def _late(job: Path, started: float, now: float) -> bool:
    """Return whether the node would end this worker."""
    path = job.parent / "progress.jsonl"
    phase, reported_at = None, started
    if path.exists():
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
        last = decode_progress(lines[-1]) if lines else None
        phase, reported_at = (last.phase, max(started, last.at)) if last else (None, started)
    ready_by = decode_worker_job(job.read_bytes()).ready_by
    why = stop_reason(
        now=now,
        silent_s=now - reported_at,
        hang_s=HANG_S,
        started_at=started,
        ready_by=ready_by,
        deadline_at=ready_by + RESERVE_S,
        phase=phase or Phase.LOADING,
    )
    return why is not None


def _end(job: Path, ready_by: float) -> float | None:
    outcome = tiny_jobs.outcome_of(job)
    assert outcome is not None
    export = job.parent / "export"
    if outcome.status is OutcomeStatus.READY and folder_digest(export) == outcome.digest:
        return outcome.at - ready_by
    print(f"{job.parent.name}: {outcome.status} {outcome.error}", flush=True)
    return None


def _signal(worker: subprocess.Popen[bytes], number: int) -> None:
    if worker.poll() is None:
        os.killpg(worker.pid, number)
