"""Measure Podium's overhead from accepting a job to its first optimiser step, and the node's CPU meanwhile.

    python -m bench overhead [--jobs 5]     # about 3 minutes

A real broker, gateway and node with default timings, and the real engine on a tiny model, one job after
another. The overhead is the time from the job's acceptance to the end of its first optimiser step, without
the parts that every training script has, measured in the same run:

- interpreter and imports: from the worker process's start to its first report, sent when all is imported;
- model loading: from the second report of phase `loading` to the start of the baseline.

The rest (`overhead_s`) is finding, claiming and starting the job, reading and tokenising its data, the base
model's loss, the plan, and the first step itself. The node's CPU is its process's CPU time from the first
step to the end of training, as a share of one core. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from bench.harness.fleet import ENGINE, GATEWAYS, ROOT, Fleet
from podium.client import Client, Refusal
from shared.errors import PodiumError
from shared.logs import set_up_logs
from shared.messages.encoding import encode
from shared.messages.offers import DatasetType, Decision, FileFormat, Offer, TaskType
from shared.messages.runs import Phase, Progress, decode_progress

MODEL, MODEL_FOLDER = "podium/tiny", ROOT / "tests" / "data" / "oracle" / "base"
DATA = ROOT / "examples" / "wordnet" / "nouns_train.json"
NODE, SLOT = "node-a", "a"
JOB_S = 120.0  # of the tiny model: it trains by the clock until then, or for its epochs
PATIENCE_S = 240.0
OVERHEAD_S, NODE_CPU_SHARE = 1.0, 0.01  # what is promised
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Parts(Struct, frozen=True, kw_only=True):
    """Seconds of one job, from its acceptance to the end of its first step; and the node's CPU."""

    total_s: float
    worker_s: float  # until the worker process is there
    imports_s: float
    ingest_s: float
    loading_s: float
    baseline_s: float  # and the plan
    first_step_s: float
    node_cpu_share: float

    @property
    def overhead_s(self) -> float:
        """Return the time without imports and model loading."""
        return self.total_s - self.imports_s - self.loading_s


class Bench:
    """One fleet of one slot."""

    def __init__(self, folder: Path) -> None:
        self.fleet = Fleet(
            folder,
            ENGINE,
            lambda: 0.2,
            nodes={NODE: SLOT},
            models={MODEL: str(MODEL_FOLDER)},
            dataset_roots=(str(DATA.parent),),
        )

    async def job(self, task: str) -> Parts:
        """Run one job to its end."""
        decision = await self.until("the job to be accepted", lambda: self._offer(task))
        run = self.fleet.node_folder(NODE) / "runs" / task
        await self.until("the first step", lambda: self._stepped(task, run))
        pid = self.fleet.members[NODE].pid
        if pid is None:
            raise PodiumError("the node is gone")
        began, used = time.monotonic(), cpu_s(pid)
        await self.until("the end of training", lambda: _first(read(run / "progress.jsonl"), Phase.CHOOSE))
        share = (cpu_s(pid) - used) / (time.monotonic() - began)
        lines = read(run / "progress.jsonl")
        await self.until("the result", lambda: self._ended(task))
        return parts(decision, self.fleet.worker_starts(SLOT, task)[0], lines, share)

    async def until(self, what: str, look: Callable[[], Any]) -> Any:
        """Poll `look` in a thread until it returns a true value, and return that."""
        give_up_at = time.monotonic() + PATIENCE_S
        while not (found := await asyncio.to_thread(look)):
            if time.monotonic() > give_up_at:
                raise PodiumError(f"waited {PATIENCE_S:g} s for {what}")
            await asyncio.sleep(0.2)
        return found

    def _offer(self, task: str) -> Decision | None:
        offer = Offer(
            task_id=task,
            task_type=TaskType.INSTRUCT,
            model=MODEL,
            hours_to_complete=JOB_S / 3600,
            dataset=str(DATA),
            file_format=FileFormat.JSON,
            dataset_type=DatasetType(field_instruction="instruct", field_output="output"),
            model_params_count=140_000,
        )
        try:
            decision = Client(self.fleet.url(GATEWAYS[0])).offer(encode(offer))
        except PodiumError:  # not up yet
            return None
        return None if isinstance(decision, Refusal) or not decision.accepted else decision

    def _stepped(self, task: str, run: Path) -> bool:
        return first_step(read(run / "progress.jsonl")) is not None or self._ended(task)

    def _ended(self, task: str) -> bool:
        views = {view.task: view for view in Client(self.fleet.url(GATEWAYS[0])).tasks()}
        if (state := views[task].state) in ("failed", "expired", "cancelled"):
            result = views[task].result
            raise PodiumError(f"{task} {state}: {result.reason if result else 'no reason'}")
        return state == "submitted"


def read(path: Path) -> list[Progress]:
    """Whole lines of a progress file."""
    if not path.exists():
        return []
    whole = (line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
    return [decode_progress(line) for line in whole]


def first_step(lines: list[Progress]) -> Progress | None:
    """Return whether the first optimiser step is done."""
    return next((line for line in lines if line.phase is Phase.TRAIN and line.step == 1), None)


def parts(decision: Decision, worker_at: float, lines: list[Progress], cpu_share: float) -> Parts:
    """Take one job apart."""
    step = first_step(lines)
    ingest, baseline, train = (_first(lines, phase) for phase in (Phase.INGEST, Phase.BASELINE, Phase.TRAIN))
    if step is None or ingest is None or baseline is None or train is None:
        raise PodiumError("the worker skipped a phase")
    loading = next(line for line in lines if line.phase is Phase.LOADING and line.at > ingest.at)
    return Parts(
        total_s=step.at - decision.decided_at,
        worker_s=worker_at - decision.decided_at,
        imports_s=lines[0].at - worker_at,
        ingest_s=loading.at - lines[0].at,
        loading_s=baseline.at - loading.at,
        baseline_s=train.at - baseline.at,
        first_step_s=step.at - train.at,
        node_cpu_share=cpu_share,
    )


def _first(lines: list[Progress], phase: Phase) -> Progress | None:
    return next((line for line in lines if line.phase is phase), None)


def cpu_s(pid: int) -> float:
    """CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


async def measure(folder: Path, jobs: int) -> list[Parts]:
    """Several jobs, one after another."""
    bench = Bench(folder)
    try:
        await bench.fleet.start()
        return [await bench.job(f"job-{number}") for number in range(jobs)]
    finally:
        await bench.fleet.close()


def main() -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=5)
    args = parser.parse_args()
    set_up_logs("console", "error", service="overhead")
    with tempfile.TemporaryDirectory(prefix="podium-overhead-") as folder:
        found = asyncio.run(measure(Path(folder), args.jobs))
    for one in found:
        print(", ".join(f"{name} {value:.3f}" for name, value in msgspec.structs.asdict(one).items()))
    names = [*Parts.__struct_fields__[:-1], "overhead_s"]
    summary = {name: round(statistics.median(getattr(one, name) for one in found), 3) for name in names}
    summary["node_cpu_share"] = round(statistics.median(one.node_cpu_share for one in found), 5)
    violations = (summary["overhead_s"] >= OVERHEAD_S) + (summary["node_cpu_share"] >= NODE_CPU_SHARE)
    print(json.dumps({"jobs": len(found)} | summary | {"violations": violations}))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
