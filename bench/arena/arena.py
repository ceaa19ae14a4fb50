"""The accuracy arena: profiles train the same tasks at equal tokens, and rows nobody trained on judge them.

python -m bench arena --suite cpu|kinds [--page FOLDER]
python -m bench arena [--sources NAME ...] [--models NAME ...] [--rows N] [--budgets E ...] [--seeds N] \
    [--first-seed N] [--damage WAY ...] [--kind KIND ...] [--kl-coef C ...] [--profiles NAME ...] \
    [--prices cpu] [--workers N] [--results FILE]

A task is a data set, a base model, a number of training rows, a budget, a seed, damage to the model, and its
kind (bench/arena/kinds/kind.py). The budget is the time of E epochs, with all that a profile trains in it, on
a clock that the machine's own speed doesn't move: so a result repeats exactly on a noisy machine. That is the
token clock, on which scoring takes no time, nor does the padding of small batches, nor what the base model is
asked. With --prices each step and each score takes what it was measured to take (bench/arena/prices/). Each
run is the real engine in a process of its own; with --gpu all of them share the first GPU, and a result
repeats but for that GPU's rounding. Results are appended to a file (by default in the arena's cache), and
what is there is not run again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from bench.arena.damage import WAYS
from bench.arena.kinds.kind import FORMS, KINDS, Form
from bench.arena.models import MODELS
from bench.arena.packages import cache_folder
from bench.arena.page import write_page
from bench.arena.prices.prices import PRICES
from bench.arena.sources import SOURCES
from bench.arena.standings import Entry, by_task, print_table, summary
from bench.arena.suite import SUITES
from bench.arena.task import Task, model_folder, pack_rows, rows_of
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.offers import FileFormat
from shared.messages.runs import OutcomeStatus, WorkerJob, decode_outcome

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
CLOCK_RATE = 20.0  # tokens per simulated second: so slow that the reserves before a deadline do not count
RUN_S = 3600.0
BOSS = "winner_2026_06"
AUTO_ON_FOUR = "auto_on_four"  # `auto` on four devices that share the time: with enough, a trial on each
CPU = Hardware(device="cpu", count=1, memory_bytes=8 * 2**30)


def run(task: Task, profile: str, cache: Path, hardware: Hardware = CPU) -> Entry:
    """Train and score in a process of its own; an entry without a loss says why."""
    with tempfile.TemporaryDirectory(prefix="arena-") as name:
        folder = Path(name)
        job = write_job(task, profile, cache, folder, hardware)
        command = [sys.executable, "-m", "bench.arena.contestant", str(job)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Entry(task, profile, None, [], 0, 0.0, f"not done within {RUN_S:g} s")
        outcome_path = folder / "outcome.json"
        if done.returncode or not outcome_path.exists():
            return Entry(task, profile, None, [], 0, 0.0, (done.stderr or "no outcome")[-500:])
        outcome = decode_outcome(outcome_path.read_bytes())
        if outcome.status is not OutcomeStatus.READY or outcome.metrics is None:
            return Entry(task, profile, None, [], 0, 0.0, outcome.error or outcome.status.value)
        losses = json.loads((folder / "test_losses.json").read_text())
        before, metrics = folder / "base_losses.json", outcome.metrics
        base = float(np.mean(json.loads(before.read_text()))) if before.exists() else None
        steps, epochs = metrics.steps, metrics.epochs
        return Entry(task, profile, float(np.mean(losses)), losses, steps, epochs, base_loss=base)


def write_job(task: Task, profile: str, cache: Path, folder: Path, hardware: Hardware = CPU) -> Path:
    """The engine's job for a task, with its rows; the path of its job.json."""
    model = model_folder(task, cache)
    train, test = rows_of(task, cache)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.json").write_bytes(msgspec.json.encode(rows))
    form = FORMS[task.kind]
    tokens = tokens_of(folder / "train.json", model, form)
    epoch = PRICES[task.prices].of_epoch(tokens, len(train)) if task.prices else tokens
    job = WorkerJob(
        task_id="arena",
        task="arena",
        slot="a",
        task_type=form.task_type,
        model=f"arena/{task.model}",
        model_path=str(model),
        dataset=str(folder / "train.json"),
        file_format=FileFormat.JSON,
        dataset_type=form.columns,
        start_at=0.0,
        ready_by=task.epochs * epoch / CLOCK_RATE,
        hardware=hardware,
        processes=4 if profile == AUTO_ON_FOUR else 0,
        threads=1,
        clock="wall" if task.prices else "token",
        token_clock_rate=CLOCK_RATE,
        profile=profile,
        seed=task.seed,
        scorer=form.scorer,
        kl_coefficient=task.kl_coefficient,
    )
    path = folder / "job.json"
    path.write_bytes(encode(job))
    if task.prices:
        (folder / "prices").write_text(task.prices)
    return path


def shared_gpu(workers: int) -> Hardware:
    """The first GPU as each of several processes sees it: with its part of the memory."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return Hardware(device=properties.name, count=1, memory_bytes=properties.total_memory // workers)


def results_file(name: str, *, gpu: bool) -> Path:
    """Where results are kept by default: those of a GPU are not compared with those of a CPU."""
    return cache_folder() / f"{name}{'-gpu' if gpu else ''}.jsonl"


def tokens_of(path: Path, model: Path, form: Form) -> int:
    """The tokens of the rows in a file, as the engine reads them."""
    from trainer_node.engine.data.examples import longest_row, read_rows, tokenize
    from trainer_node.engine.model.loading import load_config, load_tokenizer

    rows = read_rows(str(path), FileFormat.JSON, allow_private_urls=False).rows
    length = longest_row(load_config(str(model)), form.task_type, form.scorer)
    tokenizer = load_tokenizer(str(model))
    examples, _ = tokenize(rows, form.task_type, form.columns, tokenizer, length, scorer=form.scorer)
    return int(examples.lengths.sum())


def read_entries(path: Path) -> dict[tuple[Task, str], Entry]:
    """The results of earlier runs."""
    if not path.exists():
        return {}
    entries = [msgspec.json.decode(line, type=Entry) for line in path.read_bytes().splitlines()]
    return {(entry.task, entry.profile): entry for entry in entries}


def play(
    tasks: Sequence[Task],
    profiles: Sequence[str],
    cache: Path,
    results: Path,
    workers: int,
    hardware: Hardware = CPU,
) -> list[Entry]:
    """Run what the results file lacks, several at once; all entries of these tasks and profiles."""
    known = read_entries(results)
    wanted = list(itertools.product(tasks, profiles))
    missing = [pair for pair in wanted if pair not in known]
    for task, _ in missing:
        model_folder(task, cache)  # a damaged copy is written once, not by several runs at the same time
    results.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool, results.open("ab") as file:
        running = {
            pool.submit(run, task, profile, cache, hardware): (task, profile) for task, profile in missing
        }
        try:
            for count, done in enumerate(as_completed(running), 1):
                entry = done.result()
                known[entry.task, entry.profile] = entry
                file.write(msgspec.json.encode(entry) + b"\n")
                file.flush()
                print(f"[{count}/{len(missing)}] {entry.task}: {entry.profile} {said(entry)}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # nobody would keep what the others find
            raise
    return [known[pair] for pair in wanted]


def said(entry: Entry) -> str:
    """Return an entry's loss as people read it, else the last line of why there is none."""
    if entry.loss is not None:
        return f"{entry.loss:.4f}" + (f" (base {entry.base_loss:.4f})" if entry.base_loss is not None else "")
    return entry.error.strip().rpartition("\n")[2] or "failed"


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """Return every combination of what the command names; coefficients only where the kind has one."""
    kinds = [
        (kind, coefficient)
        for kind in options.kind
        for coefficient in (options.kl_coef if kind == "kl" else [0.0])
    ]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    parts = (options.sources, options.models, options.rows, options.budgets, seeds, options.damage, kinds)
    return [Task(*values, *kind) for *values, kind in itertools.product(*parts)]


def main() -> None:
    """Run the arena and print who won."""
    parser = argparse.ArgumentParser(prog="python -m bench arena", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, help="a fixed list, in place of --sources to --kl-coef")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--models", nargs="+", choices=(*MODELS, "smollm2"), default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[400])
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0, 10.0], help="in epochs")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first task")
    parser.add_argument("--damage", nargs="+", choices=WAYS, default=[None], help="of the base models")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=["instruct"], help="of the tasks")
    parser.add_argument("--kl-coef", type=float, nargs="+", default=[0.3], help="of tasks of the kind kl")
    parser.add_argument("--prices", choices=PRICES, default="", help="count scores and each step's own cost")
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), help="the first one is judged")
    parser.add_argument("--boss", default=BOSS, help="whom the winner of a tournament has to beat")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu", action="store_true", help="all workers share the first GPU")
    parser.add_argument("--pack", type=Path, help="only write rows for a machine without packages")
    parser.add_argument("--results", type=Path, help="by default in the cache, one for CPUs and one for GPUs")
    parser.add_argument("--page", type=Path, help="folder for a page with plots")
    parser.add_argument("--known-only", action="store_true", help="judge the tasks whose results are there")
    options = parser.parse_args()
    results = options.results or results_file("results", gpu=options.gpu)
    if options.pack:
        for source in options.sources:
            print(pack_rows(source, cache_folder(), options.pack))
        return
    tasks = SUITES[options.suite]() if options.suite else tasks_of(options)
    if options.prices:
        tasks = [replace(task, prices=options.prices) for task in tasks]
    champion, *rivals = options.profiles
    if options.known_only:
        known = read_entries(results)
        tasks = [task for task in tasks if all((task, name) in known for name in options.profiles)]
    hardware = shared_gpu(options.workers) if options.gpu else CPU
    entries = play(tasks, options.profiles, cache_folder(), results, options.workers, hardware)
    found = by_task(entries)
    print_table(found, options.profiles)
    figures = {"champion": champion, **summary(found, champion, rivals, options.boss)}
    if options.page:
        write_page(options.page, found, options.profiles, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
