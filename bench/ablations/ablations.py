"""One choice at a time: what each part of a training run is worth, paired on the same tasks and rows.

python -m bench ablations [--only GROUP ...] [--tasks N] [--gpu] [--workers N] [--results FILE] [--known-only]

Each group compares ways to train with its first one (bench/ablations/variants.py). Tasks are the arena's: its
data sets, small models and damage. Every variant is trained by the engine on the same rows, on the token
clock, and scored on the same 300 rows that nobody trained on. A figure is the mean over tasks of the gap to
the group's first one in nat (negative: better), with a 95% interval by resampling tasks and rows. Results are
appended to a file, and what is there is not run again. With --gpu the base model is SmolLM2-135M, on the
first GPU, which several tasks can share. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bench.ablations.trainer import VariantResult
from bench.ablations.variants import GROUPS, Variant, variants_of
from bench.arena.arena import CPU, results_file, shared_gpu
from bench.arena.damage import Way
from bench.arena.packages import cache_folder
from bench.arena.suite import ROWS
from bench.arena.task import Task, model_folder
from bench.regret.training_process import results_of
from shared.messages.hardware import Hardware

EPOCHS = 8.0  # time enough for every run: the number of its epochs ends it
RESAMPLES = 2000
SHARE = 0.5  # of the suite's rows: a run takes seconds


# Clean and damaged base models in turn, two architectures, rows of different lengths and languages.
def _task(source: str, model: str, damage: Way | None = None) -> Task:
    return Task(source, model, round(SHARE * ROWS[source]), EPOCHS, 7, damage)


# Clean and damaged base models, two architectures, rows of different lengths and languages.
TASKS = (
    _task("wordnet", "llama"),
    _task("german_english", "qwen3"),
    _task("messages", "llama"),
    _task("wordnet", "qwen3", "pruning"),
    _task("emoji_json", "qwen3"),
    _task("german_english", "llama", "noise"),
    _task("fortunes", "llama"),
    _task("foldoc", "qwen3"),
)

GPU_ROWS = 400
GPU_TASKS = tuple(
    Task(source, "smollm2", GPU_ROWS, EPOCHS, 7)
    for source in ("wordnet", "german_english", "messages", "emoji_json")
)

Known = dict[Task, dict[Variant, VariantResult]]


class Line(Struct, frozen=True):
    """One line of the results file."""

    task: Task
    result: VariantResult


class Gap(Struct, frozen=True):
    """A variant against the first one of its group, over all tasks that have both."""

    group: str
    variant: str
    nat: float  # mean gap; negative: better
    low: float
    high: float
    better: int  # tasks with a lower mean
    tasks: int
    diverged: int

    def __str__(self) -> str:
        if not self.tasks:
            return f"{self.group:17} {self.variant:52} not run"
        interval = f"[{self.low:+.4f}, {self.high:+.4f}]"
        lost = f", {self.diverged} diverged" if self.diverged else ""
        return (
            f"{self.group:17} {self.variant:52} {self.nat:+.4f} {interval}  "
            f"better on {self.better} of {self.tasks}{lost}"
        )


def read_lines(path: Path) -> Known:
    """Return the results of earlier runs."""
    found: Known = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        one = msgspec.json.decode(line, type=Line)
        found.setdefault(one.task, {})[one.result.variant] = one.result
    return found


def train(
    task: Task, missing: Sequence[Variant], cache: Path, hardware: Hardware = CPU
) -> Iterator[VariantResult]:
    """Train variants in a process of its own; each as soon as it is done."""
    model_folder(task, cache)  # a damaged copy is written once
    return results_of("bench.ablations.trainer", task, "variant", missing, VariantResult, cache, hardware)


def train_missing(
    tasks: Sequence[Task],
    wanted: Sequence[Variant],
    cache: Path,
    path: Path,
    *,
    hardware: Hardware = CPU,
    workers: int = 1,
) -> None:
    """Train what the file lacks, several tasks at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_lines(path)

    def train_task(task: Task) -> None:
        known = lines.get(task, {})
        missing = [variant for variant in wanted if variant not in known]
        for count, result in enumerate(train(task, missing, cache, hardware) if missing else (), 1):
            with path.open("ab") as file:  # one write: lines of several threads stay whole
                file.write(msgspec.json.encode(Line(task, result)) + b"\n")
            loss = f"{np.mean(result.losses):.4f}" if result.losses else "diverged"
            print(f"[{count}/{len(missing)}] {task}: {result.variant.name} {loss}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(train_task, tasks))


def gap(
    group: str, variant: Variant, base: Variant, known: Mapping[Task, Mapping[Variant, VariantResult]]
) -> Gap:
    """Return a variant's gap to its group's first one; a run that diverged counts in no mean."""
    pairs = [(found[base], found[variant]) for found in known.values() if base in found and variant in found]
    gaps = [
        np.array(mine.losses) - np.array(first.losses)
        for first, mine in pairs
        if mine.losses and first.losses
    ]
    low, high = interval(gaps) if gaps else (0.0, 0.0)
    return Gap(
        group,
        variant.name,
        float(np.mean([one.mean() for one in gaps])) if gaps else 0.0,
        low,
        high,
        sum(bool(one.mean() < 0) for one in gaps),
        len(gaps),
        sum(not mine.losses for _, mine in pairs),
    )


def interval(gaps: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Return the 95% interval of the mean gap, by resampling tasks and then each one's rows."""
    random = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = random.integers(0, len(gaps), len(gaps))
        rows = [gaps[task][random.integers(0, len(gaps[task]), len(gaps[task]))].mean() for task in drawn]
        means[number] = np.mean(rows)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def table(groups: Sequence[str], known: Mapping[Task, Mapping[Variant, VariantResult]]) -> list[Gap]:
    """Return every comparison; the methods are judged on clean and on damaged base models apart too."""
    found = []
    for name in groups:
        base, *others = GROUPS[name]
        found += [gap(name, variant, base, known) for variant in others]
        if name == "method":
            for word, damaged in (("clean", False), ("damaged", True)):
                some = {task: one for task, one in known.items() if bool(task.damage) is damaged}
                found += [gap(f"{name}, {word}", variant, base, some) for variant in others]
    return found


def summary(found: Sequence[Gap], tasks: int) -> dict[str, Any]:
    """Return the figures of the last line."""
    rows = {
        f"{one.group}: {one.variant}": [round(x, 4) for x in (one.nat, one.low, one.high)] for one in found
    }
    return {"tasks": tasks, "diverged": sum(one.diverged for one in found), "gaps": rows}


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups")
    parser.add_argument("--tasks", type=int, default=len(TASKS), help="the first so many")
    parser.add_argument("--gpu", action="store_true", help="SmolLM2-135M on the first GPU")
    parser.add_argument("--workers", type=int, default=1, help="tasks at once")
    parser.add_argument("--results", type=Path, help="by default in the cache, one for CPUs and one for GPUs")
    parser.add_argument("--known-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    results = options.results or results_file("ablations", gpu=options.gpu)
    tasks, wanted = (GPU_TASKS if options.gpu else TASKS)[: options.tasks], variants_of(options.only)
    if not options.known_only:
        hardware = shared_gpu(options.workers) if options.gpu else CPU
        train_missing(tasks, wanted, cache_folder(), results, hardware=hardware, workers=options.workers)
    lines = read_lines(results)
    known = {task: lines[task] for task in tasks if task in lines}
    found = table(options.only, known)
    print("\n".join(map(str, found)))
    print(json.dumps(summary(found, len(known))))


if __name__ == "__main__":
    main()
