"""The accuracy arena: profiles train the same tasks in the same time, and rows nobody trained on judge them.

python -m bench arena [--sources NAME ...] [--models NAME ...] [--rows N] [--budgets E ...] [--seeds N] \
    [--profiles NAME ...] [--workers N] [--results FILE]

A task is a data set, a base model, a number of training rows, a budget and a seed. The budget is the time of
E epochs on the token clock, with all the training that a profile does in it, so that a result repeats exactly
on a noisy machine; scoring takes none. Each run is the real engine in a process of its own. Results are
appended to a file (by default in the arena's cache), and what is there is not run again. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from bench.arena.judge import duel, wilson
from bench.arena.models import MODELS, base_model
from bench.arena.packages import cache_folder
from bench.arena.rows import Row, split
from bench.arena.sources import SOURCES, load
from shared.messages import (
    DatasetType,
    FileFormat,
    Hardware,
    OutcomeStatus,
    TaskType,
    WorkerJob,
    decode_outcome,
    encode,
)

SMOLLM2 = Path.home() / ".cache" / "podium" / "smollm2-135m-instruct"
ROOT = Path(__file__).parents[2]
PROFILES = (
    "auto",
    "winner_2026_06",
    "maximum_accuracy",
    "lora_r128",
    "lora_r16",
    "autotrain_like",
    "trl_default",
    "reference_miner",
)
COLUMNS = DatasetType(field_instruction="prompt", field_output="completion")
CLOCK_RATE = 1000.0  # tokens per simulated second; only ratios matter
MOST_TEST = 300
RUN_S = 3600.0


class Task(Struct, frozen=True, order=True):
    """One task of the arena."""

    source: str
    model: str
    rows: int
    epochs: float  # the budget
    seed: int

    def __str__(self) -> str:
        return f"{self.source} on {self.model}, {self.rows} rows, {self.epochs:g} epochs, seed {self.seed}"


class Entry(Struct, frozen=True):
    """One profile's submission to a task; `losses` row by row, none if it was not valid."""

    task: Task
    profile: str
    loss: float | None
    losses: list[float]
    steps: int
    epochs: float
    error: str = ""


def model_folder(name: str, cache: Path) -> Path:
    """A base model's folder: one of the arena's own, or the demo's SmolLM2-135M (`make setup`)."""
    return SMOLLM2 if name == "smollm2" else base_model(name, cache)


def rows_of(task: Task, cache: Path) -> tuple[list[Row], list[Row]]:
    """The task's training and test rows; the seed decides which of the data set's rows are trained on."""
    parts = split(load(task.source, cache), most_test=MOST_TEST)
    order = np.random.default_rng(task.seed).permutation(len(parts.train))[: task.rows]
    return [parts.train[number] for number in order], parts.test


def run(task: Task, profile: str, cache: Path) -> Entry:
    """Train and score in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="arena-") as name:
        folder = Path(name)
        job = write_job(task, profile, cache, folder)
        command = [sys.executable, "-m", "bench.arena.contestant", str(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False
        )
        outcome_path = folder / "outcome.json"
        if done.returncode or not outcome_path.exists():
            return Entry(task, profile, None, [], 0, 0.0, (done.stderr or "no outcome")[-500:])
        outcome = decode_outcome(outcome_path.read_bytes())
        if outcome.status is not OutcomeStatus.READY or outcome.metrics is None:
            return Entry(task, profile, None, [], 0, 0.0, outcome.error or outcome.status.value)
        losses = json.loads((folder / "test_losses.json").read_text())
        metrics = outcome.metrics
        return Entry(task, profile, float(np.mean(losses)), losses, metrics.steps, metrics.epochs)


def write_job(task: Task, profile: str, cache: Path, folder: Path) -> Path:
    """The engine's job for a task, with its rows; the path of its job.json."""
    model = model_folder(task.model, cache)
    train, test = rows_of(task, cache)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(rows))
    tokens = tokens_of(folder / "train.json", model)
    job = WorkerJob(
        task_id="arena",
        task="arena",
        slot="a",
        task_type=TaskType.INSTRUCT,
        model=f"arena/{task.model}",
        model_path=str(model),
        dataset=str(folder / "train.json"),
        file_format=FileFormat.JSON,
        dataset_type=COLUMNS,
        start_at=0.0,
        ready_by=task.epochs * tokens / CLOCK_RATE,
        hardware=Hardware(device="cpu", count=1, memory_bytes=8 * 2**30),
        threads=1,
        clock="token",
        token_clock_rate=CLOCK_RATE,
        profile=profile,
        seed=task.seed,
    )
    path = folder / "job.json"
    path.write_bytes(encode(job))
    return path


def tokens_of(path: Path, model: Path) -> int:
    """The tokens of the rows in a file, as the engine reads them."""
    from trainer_node.engine.data.examples import read_rows, scored_length, tokenize
    from trainer_node.engine.model.loading import load_config, load_tokenizer

    rows = read_rows(str(path), FileFormat.JSON, allow_private_urls=False).rows
    length = scored_length(load_config(str(model)))
    examples, _ = tokenize(rows, TaskType.INSTRUCT, COLUMNS, load_tokenizer(str(model)), length)
    return int(examples.lengths.sum())


def read_entries(path: Path) -> dict[tuple[Task, str], Entry]:
    """The results of earlier runs."""
    if not path.exists():
        return {}
    entries = [msgspec.json.decode(line, type=Entry) for line in path.read_bytes().splitlines()]
    return {(entry.task, entry.profile): entry for entry in entries}


def play(
    tasks: Sequence[Task], profiles: Sequence[str], cache: Path, results: Path, workers: int
) -> list[Entry]:
    """Run what the results file lacks, several at once; all entries of these tasks and profiles."""
    known = read_entries(results)
    wanted = list(itertools.product(tasks, profiles))
    missing = [pair for pair in wanted if pair not in known]
    results.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool, results.open("ab") as file:
        running = {pool.submit(run, task, profile, cache): (task, profile) for task, profile in missing}
        for count, done in enumerate(as_completed(running), 1):
            entry = done.result()
            known[entry.task, entry.profile] = entry
            file.write(msgspec.json.encode(entry) + b"\n")
            file.flush()
            text = entry.error.strip().splitlines()[-1:] if entry.loss is None else f"{entry.loss:.4f}"
            print(f"[{count}/{len(missing)}] {entry.task}: {entry.profile} {text}", flush=True)
    return [known[pair] for pair in wanted]


def table(entries: Iterable[Entry], profiles: Sequence[str]) -> dict[Task, dict[str, Entry]]:
    """Print the losses task by task; the entries by task and profile."""
    by_task: dict[Task, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        by_task[entry.task][entry.profile] = entry
    print(f"\n{'':58}" + " ".join(f"{name[:14]:>14}" for name in profiles))
    for task, found in sorted(by_task.items()):
        losses = {name: found[name].loss for name in profiles}
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        cells = ["-" if loss is None else f"{loss:.4f}{'*' * (loss == best)}" for loss in losses.values()]
        print(f"{str(task)[:58]:58}" + " ".join(f"{cell:>14}" for cell in cells))
    return by_task


def summary(by_task: dict[Task, dict[str, Entry]], champion: str, rivals: Sequence[str]) -> dict[str, Any]:
    """How the champion did against its rivals, by upstream's rules."""
    places, margins = [], []
    duels: dict[str, dict[str, list[float]]] = {rival: defaultdict(list) for rival in rivals}
    invalid = 0
    for found in by_task.values():
        mine = found[champion]
        others = [found[rival] for rival in rivals]
        losses = [entry.loss for entry in others if entry.loss is not None]
        if mine.loss is None:
            invalid += 1
            places.append(len(rivals) + 1)
            continue
        places.append(1 + sum(loss < mine.loss for loss in losses))
        margins.append(min(losses, default=mine.loss) - mine.loss)
        for entry in others:
            if entry.loss is None:
                continue
            judged = duel(np.array(mine.losses), np.array(entry.losses))
            for rule in ("group", "knockout", "boss"):
                duels[entry.profile][rule].append(float(getattr(judged, rule)))
            duels[entry.profile]["margin"].append(judged.margin)
    count, first = len(places), sum(place == 1 for place in places)
    against = {
        rival: {
            **{rule: round(float(np.mean(rules[rule])), 3) for rule in ("group", "knockout", "boss")},
            "median_margin": round(median(rules["margin"]), 4),
        }
        for rival, rules in duels.items()
        if rules["margin"]
    }
    return {
        "tasks": count,
        "first_place_rate": round(first / max(1, count), 3),
        "first_place_interval": [round(bound, 3) for bound in wilson(first, count)],
        "top2_rate": round(sum(place <= 2 for place in places) / max(1, count), 3),
        "penalty_rate": round(invalid / max(1, count), 3),
        "margin_vs_best": round(median(margins), 4) if margins else None,
        "worst_margin": round(min(margins), 4) if margins else None,
        "against": against,
    }


def main() -> None:
    """Run the arena and print who won."""
    parser = argparse.ArgumentParser(prog="python -m bench arena", description=__doc__)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--models", nargs="+", choices=(*MODELS, "smollm2"), default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[400])
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0, 10.0], help="in epochs")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), help="the first one is judged")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=cache_folder() / "results.jsonl")
    options = parser.parse_args()
    parts = (options.sources, options.models, options.rows, options.budgets, range(options.seeds))
    tasks = [Task(*values) for values in itertools.product(*parts)]
    champion, *rivals = options.profiles
    entries = play(tasks, options.profiles, cache_folder(), options.results, options.workers)
    by_task = table(entries, options.profiles)
    print(json.dumps({"champion": champion, **summary(by_task, champion, rivals)}))


if __name__ == "__main__":
    main()
