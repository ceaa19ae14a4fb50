"""One choice at a time: what each part of a training run is worth, paired on the same tasks and rows.

python -m bench ablations [--only GROUP ...] [--tasks N] [--seeds N] [--gpu] [--workers N] [--results FILE] \
    [--known-only]

Each group compares ways to train with its first one (bench/ablations/variants.py). Tasks are the arena's: its
data sets, small models and damage. Every variant is trained by the engine on the same rows, on the token
clock, and scored on the same 300 rows that nobody trained on. A figure is the mean over tasks of the gap to
the group's first one in nat (negative: better), with a 95% interval by resampling tasks and rows; it is also
given for clean and for damaged base models, and for the loss by the spread of the completions' lengths. More
seeds of a task have other rows in another order, and count as one task. Results are appended to a file, and
what is there is not run again. With --gpu the base model is SmolLM2-135M, on the
first GPU, which several tasks can share. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from bench.ablations.gaps import BY_SPREAD, summary, table
from bench.ablations.spread import spread_of
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
SHARE = 0.5  # of the suite's rows: a run takes seconds


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
    _task("python_code", "qwen3", "reinit"),
    _task("manual_pages", "llama", "pruning"),
)

GPU_ROWS = 400
GPU_TASKS = tuple(
    Task(source, "smollm2", GPU_ROWS, EPOCHS, 7)
    for source in ("wordnet", "german_english", "messages", "emoji_json")
)


class Line(Struct, frozen=True):
    """One line of the results file."""

    task: Task
    result: VariantResult


def with_seeds(tasks: Sequence[Task], seeds: int) -> list[Task]:
    """Return every task with so many seeds, the first seed of all of them first."""
    return [replace(task, seed=task.seed + number) for number in range(seeds) for task in tasks]


def read_lines(path: Path) -> dict[Task, dict[Variant, VariantResult]]:
    """Return the results of earlier runs."""
    found: dict[Task, dict[Variant, VariantResult]] = {}
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


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups")
    parser.add_argument("--tasks", type=int, default=len(TASKS), help="the first so many")
    parser.add_argument("--seeds", type=int, default=1, help="of each task: other rows in another order")
    parser.add_argument("--gpu", action="store_true", help="SmolLM2-135M on the first GPU")
    parser.add_argument("--workers", type=int, default=1, help="tasks at once")
    parser.add_argument("--results", type=Path, help="by default in the cache, one for CPUs and one for GPUs")
    parser.add_argument("--known-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    results = options.results or results_file("ablations", gpu=options.gpu)
    tasks = with_seeds((GPU_TASKS if options.gpu else TASKS)[: options.tasks], options.seeds)
    wanted, cache = variants_of(options.only), cache_folder()
    if not options.known_only:
        hardware = shared_gpu(options.workers) if options.gpu else CPU
        train_missing(tasks, wanted, cache, results, hardware=hardware, workers=options.workers)
    lines = read_lines(results)
    known = {task: lines[task] for task in tasks if task in lines}
    spreads = {task: spread_of(task, cache) for task in known} if BY_SPREAD in options.only else {}
    found = table(options.only, known, spreads)
    print("\n".join(map(str, found)))
    print(json.dumps(summary(found, len(known))))


if __name__ == "__main__":
    main()
