"""Two jobs on half a box each, or four on a quarter: what each division of the same box ends with.

python -m bench two_or_four [--tasks N] [--results FILE] [--known-only]

Four jobs are offered at once, or one after another, with a time in which half of the box trains 1, 2 or 8
epochs of each. The box is simulated (bench/slots/box.py); a job ends after 4 epochs at the latest. The losses
are real: the engine trains small models of the arena for as many epochs as the job gets, and nobody trained
on the rows that are scored. A refused job has no submission: its task is lost. `as_base` counts the base
model's loss for it. Whether more GPUs train a step as well as fewer is not simulated: the batch is the same.
Results are appended to a file, and what is there is not run again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from msgspec import Struct

from bench.ablations.ablations import TASKS, read_lines, train_missing
from bench.ablations.variants import Training, Variant
from bench.arena.judge import duel
from bench.arena.packages import cache_folder
from bench.arena.task import Task
from bench.slots.box import Offer, SlotRun, play

HALF_EPOCHS = (1.0, 2.0, 8.0)  # that half of the box trains in a job's time
MOST_EPOCHS = 4.0
JOBS = 4
EPOCH_TOKENS, SECONDS = 100_000, 3600.0
DIVISIONS = (2, 4)
UNTRAINED = Variant("the base model", scale=0.0)

Losses = Mapping[float, Sequence[float]]  # by epochs; 0: the base model's


class Ended(Struct, frozen=True):
    """One division of the box under one load."""

    slots: int
    runs: list[SlotRun]
    refused: int


def variant_of(epochs: float) -> Variant:
    """Return the run of so many epochs."""
    return Variant(f"{epochs:g} epochs", Training(epochs=epochs))


def offers_of(half_epochs: float, *, at_once: bool) -> tuple[list[Offer], float]:
    """Return four offers and the speed of the box; one after another: as fast as two slots can take them."""
    speed = 2 * half_epochs * EPOCH_TOKENS / SECONDS
    gap = 0.0 if at_once else SECONDS / 2
    return [Offer(f"job {n + 1}", n * gap, SECONDS, EPOCH_TOKENS) for n in range(JOBS)], speed


def ended(half_epochs: float, *, at_once: bool) -> list[Ended]:
    """Return both divisions of the box under the same offers."""
    offers, speed = offers_of(half_epochs, at_once=at_once)
    found = []
    for slots in DIVISIONS:
        runs, refused = play(offers, slots, speed, MOST_EPOCHS)
        found.append(Ended(slots, runs, len(refused)))
    return found


def wanted_epochs() -> list[float]:
    """Return every length that a job can get."""
    found = {
        run.epochs
        for half in HALF_EPOCHS
        for at_once in (True, False)
        for one in ended(half, at_once=at_once)
        for run in one.runs
    }
    return sorted(found)


def figures(one: Ended, several: Sequence[Losses]) -> dict[str, float]:
    """Return what a division ends with, over all tasks."""
    count = len(one.runs) + one.refused
    losses = [float(np.mean(losses[run.epochs])) for losses in several for run in one.runs]
    missing = [float(np.mean(losses[0.0])) for losses in several] * one.refused
    return {
        "delivered": len(one.runs),
        "refused": one.refused,
        "loss": round(mean(losses), 4),
        "as_base": round(mean([*losses, *missing]), 4),
        "minutes": round(mean(run.took_s for run in one.runs) / 60, 1),
        "delivery_rate": round(len(one.runs) / count, 3),
    }


def wins(two: Ended, four: Ended, several: Sequence[Losses]) -> dict[str, int]:
    """Return how many tasks each division wins by the knockout rule; who has no submission loses."""
    mine = {run.offer.name: run.epochs for run in two.runs}
    others = {run.offer.name: run.epochs for run in four.runs}
    found = {"two": 0, "four": 0, "none": 0}
    for losses in several:
        for name in {*mine, *others}:
            if name not in others or name not in mine:
                found["two" if name in mine else "four"] += 1
                continue
            first, second = np.array(losses[mine[name]]), np.array(losses[others[name]])
            if duel(first, second).knockout:
                found["two"] += 1
            else:
                found["four" if duel(second, first).knockout else "none"] += 1
    return found


def report(several: Sequence[Losses]) -> dict[str, Any]:
    """Return the figures of every load."""
    found: dict[str, Any] = {}
    for half in HALF_EPOCHS:
        for at_once in (True, False):
            two, four = ended(half, at_once=at_once)
            found[f"half trains {half:g} epochs, {'at once' if at_once else 'one after another'}"] = {
                "two": figures(two, several),
                "four": figures(four, several),
                "wins": wins(two, four, several),
            }
    return found


def losses_of(task: Task, path: Path) -> Losses | None:
    """Return a task's losses by epochs; None if a run is missing or diverged."""
    known = read_lines(path).get(task, {})
    found = {epochs: variant_of(epochs) for epochs in wanted_epochs()}
    found[0.0] = UNTRAINED
    if any(one not in known or not known[one].losses for one in found.values()):
        return None
    return {epochs: known[one].losses for epochs, one in found.items()}


def main() -> None:
    """Train what is missing and print both divisions of the box."""
    parser = argparse.ArgumentParser(
        prog="python -m bench two_or_four",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", type=int, default=4, help="the first so many of the ablations'")
    parser.add_argument("--results", type=Path, default=cache_folder() / "two_or_four.jsonl")
    parser.add_argument("--known-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    tasks = TASKS[: options.tasks]
    if not options.known_only:
        wanted = [UNTRAINED, *map(variant_of, wanted_epochs())]
        train_missing(tasks, wanted, cache_folder(), options.results)
    several = [one for task in tasks if (one := losses_of(task, options.results))]
    loads = report(several) if several else {}
    for name, one in loads.items():
        print(f"\n{name}")
        for division in ("two", "four"):
            print(f"  {division:5}", ", ".join(f"{key} {value:g}" for key, value in one[division].items()))
        print("  wins ", ", ".join(f"{key} {value}" for key, value in one["wins"].items()))
    print(json.dumps({"tasks": len(several), "loads": loads}))


if __name__ == "__main__":
    main()
