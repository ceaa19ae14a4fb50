"""Kill runs at random moments and inside saves; a resumed run must end bit-equal to an undisturbed one.

    python -m bench resume --kills 20    # about 8 minutes on two shared cores
    python -m bench resume --quick       # one mode, 2 kills

Every mode runs once undisturbed and then with kills (kill -9), on the token clock, in real worker processes:
half of the kills at a uniformly random moment of the run (including imports and finish), the others during a
save, when its `.tmp-` folder appears. Export, weights, optimiser and average must be equal; the folders of a
run that is not, and of the undisturbed one, are kept. Then one run on the wall clock with the default cadence
measures the cost of checkpoints. The last line is one JSON object: `kills, not_bit_equal, checkpoint_share`
and more.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

from bench.harness import tiny_jobs
from shared.messages.offers import TaskType
from shared.messages.runs import OutcomeStatus, WorkerJob

MODES: dict[str, dict[str, Any]] = {
    "LoRA with dropout": {"profile": "lora_dropout"},
    "dense": {"profile": "maximum_accuracy"},
    "DPO": {
        "profile": "lora_dropout",
        "task_type": TaskType.DPO,
        "dataset_type": tiny_jobs.PREFERENCES,
    },
    "DDP, 2 processes": {"profile": "lora_dropout", "processes": 2},
}
PER_RUN = 4  # kills of one run: after them it may end
SAVES = 5  # at most so many saves are let pass before one is hit
WITHIN_S = 0.01  # a save of the tiny model takes about this long
RUN_S = 300.0  # no run takes so long


@dataclass
class Report:
    """The figures of the last line."""

    kills: int = 0
    inside_a_save: int = 0
    runs: int = 0
    not_bit_equal: int = 0
    checkpoint_share: float | None = None
    modes: dict[str, int] = field(default_factory=dict)  # kills by mode


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-cost", action="store_true", help="leave the run on the wall clock out")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    args = parser.parse_args()
    names = [name for name in args.modes if set(MODES[name]) <= {*WorkerJob.__struct_fields__}]
    kills = args.kills
    if args.quick:
        names, kills = names[:1], 2
    report, moments = Report(), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = tiny_jobs.write_rows(folder / "rows.json")
        for index, mode in enumerate(names):
            share = kills * (index + 1) // len(names) - kills * index // len(names)
            disturb(mode, share, folder / f"mode-{index}", data, moments, report)
        if not args.no_cost:
            report.checkpoint_share = cost(folder / "cost", data, quick=args.quick)
    print(json.dumps(asdict(report)))


def disturb(mode: str, kills: int, folder: Path, data: Path, moments: random.Random, report: Report) -> None:
    """`kills` kills of as many runs as they need, each compared with an undisturbed one."""
    changes = {"ready_by": 100.0, "checkpoint_interval_s": 8.0, **MODES[mode]}
    calm = tiny_jobs.write_job(folder / "calm", data, **changes)
    began = time.monotonic()
    finish(calm)
    whole_s = time.monotonic() - began
    wanted = dict(tiny_jobs.weights_of(calm))
    print(f"{mode}: undisturbed in {whole_s:.1f} s, {len(wanted)} files of weights", flush=True)
    report.modes[mode] = 0
    while report.modes[mode] < kills:
        report.runs += 1
        job = tiny_jobs.write_job(folder / f"rough-{report.runs}", data, **changes)
        for _ in range(min(PER_RUN, kills - report.modes[mode])):
            moment = at_a_moment(moments.uniform(0.0, whole_s))
            if report.kills % 2:
                moment = in_a_save(job, moments)
            checkpoints = job.parent / "checkpoints"
            before = set(checkpoints.glob(".tmp-*"))
            worker = tiny_jobs.start(job)
            moment(worker)
            if worker.poll() is not None:  # it was faster than the kill
                break
            tiny_jobs.kill(worker)
            report.kills += 1
            report.modes[mode] += 1
            report.inside_a_save += bool(set(checkpoints.glob(".tmp-*")) - before)
        finish(job)
        equal = dict(tiny_jobs.weights_of(job)) == wanted
        report.not_bit_equal += not equal
        word = "bit-equal" if equal else f"NOT EQUAL, kept in {tiny_jobs.keep(calm, job)}"
        print(f"{mode}: {resumes(job)} resumes, {word}", flush=True)


def at_a_moment(delay_s: float) -> Callable[[Popen[bytes]], None]:
    """Waits so long, or until the worker has ended."""

    def wait(worker: Popen[bytes]) -> None:
        try:
            worker.wait(delay_s)
        except TimeoutExpired:
            return

    return wait


def in_a_save(job: Path, moments: random.Random) -> Callable[[Popen[bytes]], None]:
    """Waits until some save is under way, or until the worker has ended."""
    number, checkpoints = moments.randint(1, SAVES), job.parent / "checkpoints"
    within_s = moments.uniform(0.0, WITHIN_S)

    def wait(worker: Popen[bytes]) -> None:
        seen: set[str] = set()
        old = {path.name for path in checkpoints.glob(".tmp-*")}
        while len(seen) < number and worker.poll() is None:
            seen |= {path.name for path in checkpoints.glob(".tmp-*")} - old
            time.sleep(0.0002)
        time.sleep(within_s)

    return wait


def finish(job: Path) -> None:
    """Run a job to its end; AssertionError if that isn't READY, and its folder is kept."""
    worker = tiny_jobs.start(job)
    try:
        with suppress(TimeoutExpired):
            worker.wait(RUN_S)
    finally:
        ended = worker.poll()
        tiny_jobs.kill(worker)
    outcome = tiny_jobs.outcome_of(job)
    if outcome is None or outcome.status is not OutcomeStatus.READY:
        end = f"after {RUN_S:g} s" if ended is None else f"exit status {ended}"
        why = f"no outcome, {end}" if outcome is None else outcome.error or outcome.status.value
        log = (job.parent / "worker.log").read_text()[-2000:]
        raise AssertionError(f"{why}; kept in {tiny_jobs.keep(job)}\n{log}")


def resumes(job: Path) -> int:
    """Return how often a finished run was resumed from a checkpoint."""
    outcome = tiny_jobs.outcome_of(job)
    return outcome.metrics.resumes if outcome and outcome.metrics else 0


def cost(folder: Path, data: Path, *, quick: bool) -> float:
    """Share of a whole run's time that its checkpoints take, on the wall clock, at the default cadence.

    What training waits for, and what writing during it costs its cores. A dense run of SmolLM2-135M
    (1.3 GB a checkpoint) over 4 minutes where it is at hand, else the tiny model.
    """
    from bench.deadline import stage_costs as costs

    if quick or not costs.SMOLLM2.exists():
        now = time.time()
        job = tiny_jobs.write_job(
            folder, data, profile="maximum_accuracy", clock="wall", start_at=now, ready_by=now + 15.0
        )
    else:
        job = costs.smollm2(folder, 240.0)
    report = costs.measure(job)
    print(json.dumps(report), flush=True)
    return float(report["checkpoint_share"])


if __name__ == "__main__":
    main()
