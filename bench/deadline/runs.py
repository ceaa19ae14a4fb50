"""Check that a submission is on disk at the deadline, in runs with slowdowns, stalls and restarts.

    python -m bench deadline            # 1,000 simulated runs and 20 real ones
    python -m bench deadline --quick    # 40 and 2

Simulated runs use the real pipeline, schedule, loop, checkpoints and finish with a tiny real model, in this
process, on the clock of bench/deadline/simulated_machine.py, whose docstring is the fault model; one run of
20 also really trains, scores and reloads. Real runs are worker processes, see bench/deadline/real_runs.py. A
run counts as without submission if no complete export (READY, with the stated digest) is on disk 30 s before
upstream's deadline. The last line is one JSON object: `runs, without_submission, training_share` and more.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.deadline import real_runs, simulated_machine, simulated_pipeline
from bench.deadline.simulated_machine import Faults, Killed, Seconds, World
from bench.deadline.simulated_pipeline import Answers, Ear
from bench.harness import tiny_jobs
from shared.errors import EngineError
from shared.files import folder_digest
from shared.messages.runs import OutcomeStatus, decode_worker_job
from trainer_node.engine.context import RunContext
from trainer_node.engine.export import unverified
from trainer_node.engine.pipeline import pipeline
from trainer_node.engine.signals import Stop

MARGIN_S = 150.0  # between our deadline and upstream's
STORE_S = 30.0  # of it are for storing the submission
RESERVE_S, RESERVE_SHARE = 30.0, 0.1  # ready_by is so long before our deadline: the node's settings
STARTS = 50  # a run that begins more often is given up
ROWS, HOUR_ROWS, REAL_ROWS = 800, 12_000, 20_000  # more than there is time for
COMPUTES = 20  # every so many-th simulated run trains, scores and reloads for real
MEMORY = Path("/dev/shm")  # 30 checkpoints a run: a disk would take most of the bench's time
HOUR = 3600.0
# SmolLM2-135M, dense, on two cores: as measured in a run with four times as much work as cores; and for cores
# that are free, from the CPU seconds of stage_costs. Tokens are a third of what scoring a row's 25 gives.
LOADED = Seconds(start=12.0, load=1.5, ingest=1.6, row=0.41, save=12.4, export=3.3, tokens_per_s=20.0)
FREE = Seconds(start=5.0, load=0.3, ingest=1.1, row=0.12, save=4.5, export=0.6, tokens_per_s=70.0)


@dataclass(frozen=True)
class Ended:
    """The end of one run; times are seconds since the job arrived."""

    at: float  # infinite = never
    why: str  # it ended without a submission
    world: World
    measured: bool = False  # its loss is known


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--real", type=int, default=20)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", default="maximum_accuracy", help="of the simulated runs")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.real = min(args.runs, 40), min(args.real, 2)
    torch.set_num_threads(1)
    gc.freeze()  # what the imports made lives to the end
    warnings.filterwarnings("ignore", category=FutureWarning)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        folder = Path(name)
        data = tiny_jobs.write_rows(folder / "rows.json", ROWS)
        report = simulate(args.runs, args.seed, folder, data, args.profile)
        hour = tiny_jobs.write_rows(folder / "hour.json", HOUR_ROWS)
        report["training_share"] = training_share(FREE, folder / "free", hour)
        report["training_share_loaded"] = training_share(LOADED, folder / "loaded", hour)
        many = tiny_jobs.write_rows(folder / "many.json", REAL_ROWS)
        real = real_runs.runs(args.real, args.seed, folder / "real", many)
    report["without_submission"] += real["without_submission"]
    report["real"] = real
    print(json.dumps(report))


def simulate(runs: int, seed: int, folder: Path, data: Path, profile: str) -> dict[str, Any]:
    """Make so many simulated runs; return the figures."""
    counts: Counter[str] = Counter(runs=runs, without_submission=0, after_ready_by=0, after_our_deadline=0)
    began = time.monotonic()
    for index in range(runs):
        luck = random.Random(seed * 1_000_003 + index)
        hours = math.exp(luck.uniform(math.log(0.25), math.log(12.0)))
        budget_s = hours * HOUR - MARGIN_S
        reserve_s = min(RESERVE_S, RESERVE_SHARE * budget_s)
        ready_by = budget_s - reserve_s
        seconds, faults = simulated_machine.draw(luck, ready_by, tokens=luck.uniform(25_000, 75_000))
        machine = World(seconds, faults, luck, ready_by, budget_s)
        ended = live(machine, folder / f"run-{index}", data, computes=index % COMPUTES == 0, profile=profile)
        late = ended.at > budget_s + MARGIN_S - STORE_S
        counts["without_submission"] += late
        counts["trained_to_the_end"] += ended.at > 0.8 * ready_by
        counts["after_ready_by"] += ended.at > ready_by
        counts["after_our_deadline"] += ended.at > budget_s
        counts["loss_not_measured"] += not ended.measured
        counts["restarts"] += machine.kills
        counts["ended_by_the_node"] += machine.node_kills
        if ended.at > budget_s:
            why = ended.why or f"{ended.at - budget_s:.0f} s after our deadline, {machine.last_words()}"
            print(f"run {index}: {why}", flush=True)
        if index % 50 == 49:
            print(f"{index + 1} runs in {time.monotonic() - began:.0f} s: {dict(counts)}", flush=True)
        shutil.rmtree(folder / f"run-{index}")
    return dict(counts)


def live(
    machine: World,
    folder: Path,
    data: Path,
    *,
    computes: bool,
    profile: str = "maximum_accuracy",
    answers: Answers | None = None,
    killed: Callable[[], None] = lambda: None,
) -> Ended:
    """Make one run, restarted whenever it is `killed`, as the node does."""
    profile = "lora_r16" if computes else profile  # PEFT takes its time at every start
    path = tiny_jobs.write_job(
        folder, data, profile=profile, clock="wall", start_at=0.0, ready_by=machine.ready_by
    )
    job = decode_worker_job(path.read_bytes())
    for _ in range(STARTS):
        reporter = Ear.__new__(Ear)
        reporter.world = machine
        reporter.__init__(folder / "progress.jsonl", job.task, job.slot)  # type: ignore[misc]
        try:
            with simulated_pipeline.costs(machine, computes=computes, answers=answers):
                machine.begin()
                outcome = unverified.at_once(folder, job, machine.now, reporter)
                if outcome is None:
                    machine.imports()
                    imports = (1 - simulated_machine.PYTHON_SHARE) * machine.seconds.start
                    outcome = pipeline(RunContext(job, folder, machine, reporter, Stop(), import_s=imports))
        except Killed:
            killed()
            continue
        except EngineError as error:
            return Ended(math.inf, f"{error.code}: {error}", machine)
        if outcome.status is not OutcomeStatus.READY or folder_digest(folder / "export") != outcome.digest:
            return Ended(math.inf, f"{outcome.status}, digest {outcome.digest}", machine)
        measured = outcome.metrics is not None and outcome.metrics.final_loss is not None
        return Ended(machine.now, "", machine, measured)
    return Ended(math.inf, f"started {STARTS} times", machine)


def training_share(seconds: Seconds, folder: Path, data: Path) -> float:
    """Share of a one-hour job's whole time that is spent in steps, without faults."""
    budget_s = HOUR - MARGIN_S
    machine = World(seconds, Faults(), random.Random(0), budget_s - RESERVE_S, budget_s)
    ended = live(machine, folder, data, computes=False)
    assert ended.at < machine.ready_by, ended.why
    parts = ", ".join(
        f"{kind} {spent:.0f}" for kind, spent in sorted(machine.spent.items(), key=lambda item: -item[1])
    )
    print(f"one hour: ready at {ended.at:.0f} s; {parts}", flush=True)
    return round(machine.spent["step"] / HOUR, 4)


if __name__ == "__main__":
    main()
