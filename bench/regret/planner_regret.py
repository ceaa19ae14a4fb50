"""How much the planner's choice loses against the best of a grid that was trained to the end.

python -m bench planner_regret [--sources NAME ...] [--models NAME ...] [--rows N ...] [--budgets E ...] \
    [--seeds N] [--workers N] [--results FOLDER] [--grid-epochs E ...]

Tasks and budgets are those of `python -m bench arena`. On each the profile `auto` searches and trains within
the budget, and `auto_once` carries out the same plan once. The grid (bench/regret/grid.py) has every rate,
method, batch and number of epochs up to the budget, each trained on its own; it is shared by all budgets.
Regret is a profile's test loss minus the grid's lowest. The lowest of many is chosen by the rows that it is
scored on, so it is lower than a choice can be; `fair` regret chooses it on one half of the test rows and
scores it on the other. What is in the results folder is not run again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from bench.arena.arena import play
from bench.arena.models import MODELS
from bench.arena.packages import cache_folder
from bench.arena.sources import SOURCES
from bench.arena.standings import Entry, by_task
from bench.arena.task import Task
from bench.regret.grid import EPOCHS, Point, PointResult, points
from bench.regret.training_process import results_of

PROFILES = ("auto", "auto_once")
# Four kinds of rows that are short: a grid has 120 runs.
DEFAULT_SOURCES = ("wordnet", "german_english", "messages", "emoji_json")


class GridKey(Struct, frozen=True, order=True):
    """What a grid was trained on: a task without its budget."""

    source: str
    model: str
    rows: int
    seed: int

    def task(self, epochs: float) -> Task:
        """The task with a budget."""
        return Task(self.source, self.model, self.rows, epochs, self.seed)


class GridEntry(Struct, frozen=True):
    """One line of the grids' file."""

    key: GridKey
    result: PointResult


class Regret(Struct, frozen=True):
    """One task: what the profiles lose against the grid."""

    task: Task
    best: Point
    lowest: float  # the grid's loss at its best point
    fair_lowest: float  # of a point chosen by other rows than it is scored on
    losses: dict[str, float]  # by profile

    def of(self, profile: str, *, fair: bool = False) -> float:
        """The profile's regret in nat."""
        return self.losses[profile] - (self.fair_lowest if fair else self.lowest)


def read_grids(path: Path) -> dict[GridKey, dict[Point, PointResult]]:
    """The points that were trained before."""
    found: dict[GridKey, dict[Point, PointResult]] = {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        entry = msgspec.json.decode(line, type=GridEntry)
        found.setdefault(entry.key, {})[entry.result.point] = entry.result
    return found


def train_points(key: GridKey, missing: Sequence[Point], cache: Path) -> Iterator[PointResult]:
    """Train points in a process of its own; each as soon as it is done."""
    # Time enough for the longest: the number of epochs ends each run.
    task = key.task(2 * max(point.epochs for point in missing))
    return results_of("bench.regret.grid", task, "point", missing, PointResult, cache)


def train_grids(
    keys: Sequence[GridKey], wanted: Sequence[Point], cache: Path, path: Path, workers: int
) -> dict[GridKey, dict[Point, PointResult]]:
    """Train what the file lacks of each grid, several grids at once; all points of all grids."""
    known = read_grids(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def train(key: GridKey) -> None:
        missing = [point for point in wanted if point not in known.get(key, {})]
        for count, result in enumerate(train_points(key, missing, cache) if missing else (), 1):
            line = msgspec.json.encode(GridEntry(key, result)) + b"\n"
            with path.open("ab") as file:  # one write: lines of several threads stay whole
                file.write(line)
            loss = f"{np.mean(result.losses):.4f}" if result.losses else "diverged"
            print(f"[{count}/{len(missing)}] {key.source} on {key.model}: {result.point} {loss}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(train, keys))
    return read_grids(path)


def lowest(results: Sequence[PointResult]) -> tuple[Point, float, float]:
    """The best point, its loss, and what a point loses that was chosen on one half of the rows."""
    valid = [result for result in results if result.losses]
    losses = np.array([result.losses for result in valid])
    means = losses.mean(axis=1)
    even, odd = losses[:, ::2], losses[:, 1::2]
    by_even, by_odd = int(even.mean(axis=1).argmin()), int(odd.mean(axis=1).argmin())
    fair = (odd[by_even].sum() + even[by_odd].sum()) / losses.shape[1]
    best = int(means.argmin())
    return valid[best].point, float(means[best]), float(fair)


def regrets(
    entries: Sequence[Entry], grids: dict[GridKey, dict[Point, PointResult]], wanted: Sequence[Point]
) -> list[Regret]:
    """Each task whose profiles all gave a submission, against the points that fit its budget."""
    found = []
    for task, several in by_task(entries).items():
        losses = {profile: entry.loss for profile, entry in several.items()}
        if any(loss is None for loss in losses.values()):
            continue
        grid = grids[GridKey(task.source, task.model, task.rows, task.seed)]
        affordable = [grid[point] for point in wanted if point.epochs <= task.epochs]
        best, loss, fair = lowest(affordable)
        known = {profile: one for profile, one in losses.items() if one is not None}
        found.append(Regret(task, best, loss, fair, known))
    return found


def summary(found: Sequence[Regret], tasks: int, grid_points: int) -> dict[str, Any]:
    """The figures of all tasks."""

    def figures(profile: str) -> dict[str, float]:
        plain = [one.of(profile) for one in found]
        return {
            "median": round(median(plain), 4),
            "worst": round(max(plain), 4),
            "fair_median": round(median(one.of(profile, fair=True) for one in found), 4),
        }

    return {
        "tasks": tasks,
        "invalid": tasks - len(found),
        "grid_points": grid_points,
        "regret": {profile: figures(profile) for profile in PROFILES} if found else {},
    }


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m bench planner_regret", description=__doc__)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(DEFAULT_SOURCES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[150])
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.0, 16.0], help="in epochs")
    parser.add_argument("--grid-epochs", type=float, nargs="+", default=list(EPOCHS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=cache_folder() / "planner_regret")
    options = parser.parse_args()
    if min(options.grid_epochs) > min(options.budgets):
        parser.error("no point of the grid fits the smallest budget: give --grid-epochs a smaller number")
    cache, wanted = cache_folder(), points(tuple(options.grid_epochs))
    parts = (options.sources, options.models, options.rows, range(options.seeds))
    keys = [GridKey(*values) for values in itertools.product(*parts)]
    tasks = [key.task(epochs) for key, epochs in itertools.product(keys, options.budgets)]
    entries = play(tasks, PROFILES, cache, options.results / "profiles.jsonl", options.workers)
    grids = train_grids(keys, wanted, cache, options.results / "grids.jsonl", options.workers)
    found = regrets(entries, grids, wanted)
    print(f"\n{'':58}{'auto':>8} {'once':>8} {'lowest':>8}  best point")
    for one in found:
        cells = " ".join(f"{one.of(profile):+8.4f}" for profile in PROFILES)
        print(f"{str(one.task)[:58]:58}{cells} {one.lowest:8.4f}  {one.best}")
    print(json.dumps(summary(found, len(tasks), len(wanted))))


if __name__ == "__main__":
    main()
