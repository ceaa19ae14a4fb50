"""Check that jobs of the profile `auto` deliver in time and decide alike, whatever stops them on the way.

    python -m bench deliveries            # 1,000 simulated runs, 200 on the token clock, 20 real kills
    python -m bench deliveries --quick    # 40, 20 and 2

Three parts, each with the real search, pipeline, checkpoints and closing:

- on the clock of bench/deadline/simulated_machine.py, which counts the tokens of steps and the seconds of all
  else, with slow periods, stalls and restarts; every fourth run is also killed while it averages, exports or
  reloads. Losses are those of bench/deadline/landscape.py: trials turn, diverge and differ.
- on the token clock, killed at random events and resumed (bench/deadline/decisions.py)
- real workers that really train, on the token clock, killed with SIGKILL at random moments and inside saves:
  what they decide and submit must be equal bit for bit. The folders of a run that is not, and of the
  undisturbed one, are kept.

`late`: a submission after upstream's deadline less 30 s to store it; `without_submission`: none at all;
`decisions_differ`: resumed runs that tried, found or submitted something else. The last line is one JSON
object.
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
from pathlib import Path
from typing import Any

import torch

from bench.deadline import decisions, runs, simulated_machine
from bench.deadline.landscape import Landscape
from bench.deadline.simulated_machine import World
from bench.harness import tiny_jobs
from bench.reliability import resume
from shared.messages.runs import Phase
from trainer_node.engine.search.strategy.best_trial import is_probe
from trainer_node.engine.search.trial import read_search

ROWS, PROBE_ROWS = 60, 16_000  # the second has steps enough for probes
PROBES = 100  # every so many-th run is one of those
PROBE_TOKENS = 1_800_000.0  # that one of those has time for: about four epochs
MOST_HOURS = 1.5
LEAST_TOKENS_PER_S = 1.5  # a pack of 100 tokens may not look like a hanging process, even ten times slower
AIMS = (Phase.CHOOSE, Phase.EXPORT, Phase.VERIFY)
AIMED = 4  # every so many-th run is killed in one of these phases as well
REAL = {"profile": "auto", "ready_by": 40.0, "checkpoint_interval_s": 4.0}
REAL_KILLS = 4  # of one real run


class AimedWorld(World):
    """A machine that also fails soon after the run reaches a phase."""

    aim: Phase | None = None

    def reached(self, phase: Phase) -> None:
        """Note the phase that the run reports."""
        entered = phase is self.aim and phase is not self.phase
        super().reached(phase)
        if entered:
            self.aim = None
            seconds = self.seconds
            lasts = {Phase.CHOOSE: 20 * seconds.row, Phase.EXPORT: seconds.export, Phase.VERIFY: seconds.load}
            self.faults.restarts.append(self.now + self.noise.uniform(0.0, 0.7) * lasts[phase])
            self.faults.restarts.sort()


def place_of(folder: Path, world: World) -> str:
    """Return in which part of the job it was killed."""
    known = read_search(folder)
    if world.phase is Phase.TRAIN and known is not None:
        if known.trial is None:
            return "between trials"
        return "refit" if known.trial.refit else "main run" if known.trial.main else "trial"
    return {Phase.CHOOSE: "averaging", Phase.EXPORT: "export", Phase.VERIFY: "verify"}.get(
        world.phase or Phase.LOADING, "start"
    )


def simulate(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Make so many runs on the simulated machine; return the figures."""
    few = tiny_jobs.write_rows(folder / "few.json", ROWS)
    many = tiny_jobs.write_rows(folder / "many.json", PROBE_ROWS)
    counts: Counter[str] = Counter(
        runs=count, late=0, without_submission=0, after_ready_by=0, after_our_deadline=0
    )
    places: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    began = time.monotonic()
    for index in range(count):
        luck = random.Random(seed * 1_000_003 + index)
        probes = index % PROBES == PROBES - 1
        hours = math.exp(luck.uniform(math.log(0.25), math.log(MOST_HOURS)))
        budget_s = hours * runs.HOUR - runs.MARGIN_S
        ready_by = budget_s - min(runs.RESERVE_S, runs.RESERVE_SHARE * budget_s)
        tokens = max(LEAST_TOKENS_PER_S * ready_by, math.exp(luck.uniform(math.log(1_500), math.log(20_000))))
        if probes:
            tokens = PROBE_TOKENS
        seconds, faults = simulated_machine.draw(luck, ready_by, tokens)
        if probes:
            seconds.row /= PROBE_ROWS / ROWS  # all of them take as long as few do
        world = AimedWorld(seconds, faults, luck, ready_by, budget_s)
        world.aim = luck.choice(AIMS) if index % AIMED == 0 else None
        run = folder / f"run-{index}"
        ended = runs.live(
            world,
            run,
            many if probes else few,
            computes=False,
            profile="auto",
            answers=Landscape(luck),
            killed=lambda run=run, world=world: places.update([place_of(run, world)]),  # type: ignore[misc]
        )
        counts["without_submission"] += math.isinf(ended.at)
        counts["late"] += budget_s + runs.MARGIN_S - runs.STORE_S < ended.at < math.inf
        counts["after_ready_by"] += ended.at > ready_by
        counts["after_our_deadline"] += ended.at > budget_s
        counts["loss_not_measured"] += not ended.measured
        counts["restarts"] += world.kills
        counts["ended_by_the_node"] += world.node_kills
        tried.update(kinds_of(run))
        if ended.at > budget_s:
            why = ended.why or f"{ended.at - budget_s:.0f} s after our deadline, {world.last_words()}"
            print(f"run {index}: {why}", flush=True)
        if index % 50 == 49:
            print(f"{index + 1} runs in {time.monotonic() - began:.0f} s: {dict(counts)}", flush=True)
        shutil.rmtree(run)
    return {**counts, "killed_in": dict(sorted(places.items())), "trials": dict(sorted(tried.items()))}


def kinds_of(folder: Path) -> Counter[str]:
    """Return how many trials of each kind a run finished."""
    known = read_search(folder)
    kinds: Counter[str] = Counter()
    for one in known.done if known else []:
        short = one.trial.short or is_probe(one.trial)
        kind = (
            "refits" if one.trial.refit else "main runs" if one.trial.main else "probes" if short else "whole"
        )
        kinds[kind] += 1
        kinds["without a loss"] += one.loss is None
        kinds["turned"] += one.lowest_epochs is not None
    return kinds


def kill_real(kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Kill real workers; how many runs ended with other decisions or weights than the undisturbed one.

    Runs that gave a trial up, as its worker died twice without a checkpoint of it, are counted apart.
    """
    folder.mkdir()
    data = tiny_jobs.write_rows(folder / "rows.json", ROWS)
    calm = tiny_jobs.write_job(folder / "calm", data, **REAL)
    began = time.monotonic()
    resume.finish(calm)
    whole_s = time.monotonic() - began
    wanted = (decisions.decided(calm.parent)[0], dict(tiny_jobs.weights_of(calm)))
    print(f"real: undisturbed in {whole_s:.0f} s, {len(wanted[0])} trials", flush=True)
    luck = random.Random(seed)
    counts = {"kills": 0, "runs": 0, "differ": 0, "given_up": 0}
    while counts["kills"] < kills:
        job = tiny_jobs.write_job(folder / f"rough-{counts['runs']}", data, **REAL)
        for _ in range(min(REAL_KILLS, kills - counts["kills"])):
            moment = resume.at_a_moment(luck.uniform(0.0, whole_s))
            if counts["kills"] % 2:
                moment = resume.in_a_save(job, luck)
            worker = tiny_jobs.start(job)
            moment(worker)
            if worker.poll() is not None:  # it was faster than the kill
                break
            tiny_jobs.kill(worker)
            counts["kills"] += 1
        resume.finish(job)
        found = (decisions.decided(job.parent)[0], dict(tiny_jobs.weights_of(job)))
        counts["runs"] += 1
        # On a slow machine two kills may hit a trial before its first checkpoint: then it is given up.
        given_up = "is given up" in (job.parent / "progress.jsonl").read_text()
        counts["given_up"] += given_up
        word = "equal" if found == wanted else "a trial was given up"
        if found != wanted and not given_up:
            counts["differ"] += 1
            word = f"NOT EQUAL, kept in {tiny_jobs.keep(calm, job)}"
        print(f"real: {counts['kills']} kills, {resume.resumes(job)} resumes of this run, {word}", flush=True)
    return counts


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        prog="python -m bench deliveries",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--resumed", type=int, default=200, help="runs on the token clock")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of real workers")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.quick:
        args.runs, args.resumed, args.kills = 40, 20, 2
    torch.set_num_threads(1)
    gc.freeze()  # what the imports made lives to the end
    warnings.filterwarnings("ignore", category=FutureWarning)
    memory = runs.MEMORY if runs.MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        report = simulate(args.runs, args.seed, folder)
        data = tiny_jobs.write_rows(folder / "rows.json", ROWS)
        report["token_clock"] = decisions.compare(args.resumed, args.seed, folder, data)
        print(f"token clock: {report['token_clock']}", flush=True)
        report["real"] = kill_real(args.kills, args.seed, folder / "real") if args.kills else {"differ": 0}
    report["decisions_differ"] = report["token_clock"]["differ"] + report["real"]["differ"]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
