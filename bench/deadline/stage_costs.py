"""Measure the parts of a real run: the durations that bench.deadline's simulated machine uses.

    python -m bench stage_costs              # 4 minutes of SmolLM2-135M, dense, on this machine
    python -m bench stage_costs --minutes 2

One worker run in this process, with a timer around each part. Wall seconds are the cost if nothing else
runs; this process's CPU seconds show whether that was the case. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import tiny_jobs
from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType
from shared.messages.runs import decode_worker_job
from shared.planning.hardware import machine_memory

SMOLLM2 = Path("~/.cache/podium/smollm2-135m-instruct").expanduser()
WORDNET = tiny_jobs.ROOT / "examples" / "wordnet" / "nouns_train.json"


class Spent(NamedTuple):
    """One call of a part."""

    wall_s: float
    cpu_s: float
    rows: int


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4.0)
    minutes = parser.parse_args().minutes
    start = _timed(
        lambda: subprocess.run([sys.executable, "-c", "import trainer_node.engine.pipeline"], check=True)
    )
    with tempfile.TemporaryDirectory() as name:
        report = measure(smollm2(Path(name) / "job", 60 * minutes))
    print(json.dumps({"start_s": round(start, 2), **report}))


def smollm2(folder: Path, budget_s: float) -> Path:
    """Return a dense run of SmolLM2-135M on the wall clock, from now."""
    now, memory = time.time(), machine_memory()[0]
    return tiny_jobs.write_job(
        folder,
        WORDNET,
        profile="maximum_accuracy",
        clock="wall",
        model_path=str(SMOLLM2),
        dataset_type=DatasetType(field_instruction="instruct", field_output="output"),
        threads=None,
        hardware=Hardware(device="cpu", count=os.cpu_count() or 1, memory_bytes=memory),
        start_at=now,
        ready_by=now + budget_s,
    )


def measure(job: Path) -> dict[str, Any]:
    """Run a job to its end; seconds by part, the share of its time that checkpoints took, and in steps."""
    from trainer_node.engine import pipeline
    from trainer_node.engine.signals import Stop

    with clocked_parts() as spent:
        status = pipeline.main(job, Stop())
    outcome, given = tiny_jobs.outcome_of(job), decode_worker_job(job.read_bytes())
    assert status == 0, outcome
    assert outcome is not None
    assert outcome.metrics is not None
    whole_s = outcome.at - given.start_at
    import torch

    beside_s = sum(call.cpu_s for call in spent["checkpoint.save"]) / torch.get_num_threads()
    waited_s = sum(call.wall_s for call in [*spent["loop.save"], *spent["Saver.wait"]])
    return {
        "seconds": {name: _median(calls) for name, calls in spent.items()},
        "checkpoints": len(spent["checkpoint.save"]),
        "checkpoint_share": round((beside_s + waited_s) / whole_s, 4),
        "waited_share": round(waited_s / whole_s, 4),
        "step_share": round(sum(call.wall_s for call in spent["loop.one_step"]) / whole_s, 4),
        "tokens_per_s": round(outcome.metrics.tokens_per_s, 1),
    }


@contextmanager
def clocked_parts() -> Iterator[dict[str, list[Spent]]]:
    """Clock every call of the engine's parts while this is open; yield the calls by part."""
    from trainer_node.engine import assemble, prepare
    from trainer_node.engine.evaluate import metric
    from trainer_node.engine.export import writer
    from trainer_node.engine.train import async_saver, checkpoint, loop

    parts: tuple[tuple[Any, str], ...] = (
        (assemble, "load_model"),
        (prepare, "ingest"),
        (metric, "score_sft"),
        (checkpoint, "save"),
        (loop, "save"),
        (loop, "one_step"),
        (async_saver.Saver, "wait"),
        (writer, "write"),
        (writer, "verify"),
    )
    spent: defaultdict[str, list[Spent]] = defaultdict(list)
    before = [(place, name, getattr(place, name)) for place, name in parts]
    for place, name, real in before:
        setattr(place, name, _clocked(real, spent[f"{place.__name__.rpartition('.')[2]}.{name}"]))
    try:
        yield spent
    finally:
        for place, name, real in before:
            setattr(place, name, real)


def _median(calls: list[Spent]) -> dict[str, float]:
    """Return the median time of a part's calls, per row where it has rows."""
    walls = [call.wall_s / max(1, call.rows) for call in calls]
    cpus = [call.cpu_s / max(1, call.rows) for call in calls]
    if not calls:
        return {"calls": 0}
    return {
        "calls": len(calls),
        "wall": round(statistics.median(walls), 3),
        "cpu": round(statistics.median(cpus), 3),
    }


def _clocked(real: Callable[..., Any], calls: list[Spent]) -> Callable[..., Any]:
    def clocked(*args: Any, **kwargs: Any) -> Any:
        began, cpu = time.monotonic(), _cpu_s()
        result = real(*args, **kwargs)
        rows = len(args[1]) if real.__name__ == "score_sft" else 0
        calls.append(Spent(time.monotonic() - began, _cpu_s() - cpu, rows))
        return result

    return clocked


def _cpu_s() -> float:
    """Return this process's CPU seconds; in a thread other than the main one, that thread's."""
    main_thread = threading.current_thread() is threading.main_thread()
    return time.process_time() if main_thread else time.thread_time()


def _timed(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
