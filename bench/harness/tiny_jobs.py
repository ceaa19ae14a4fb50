"""Real workers on a tiny real model, for the benches of resume and deadline.

`python -m bench.harness.tiny_jobs RUN_FOLDER/job.json` is the engine's worker with two additional profiles,
because no house profile has dropout on LoRA factors, or dense deltas next to LoRA, that a model of 70,000
weights can use.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import Outcome, WorkerJob, decode_outcome
from shared.planning.profiles import PROFILES
from shared.planning.recipe import Recipe
from trainer_node.engine.__main__ import leave, main
from trainer_node.engine.distributed import launch

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "oracle" / "base"
DROPOUT = Recipe(profile="lora_dropout", rank=8, alpha=16.0, dropout=0.1, device_batch=8)
MIXED = Recipe(profile="lora_and_dense", rank=24, alpha=32.0, dropout=0.0, device_batch=8)  # k and v dense
INSTRUCT = DatasetType(field_instruction="question", field_output="answer")
PREFERENCES = DatasetType(field_prompt="question", field_chosen="answer", field_rejected="worse")


def write_rows(path: Path, count: int = 300) -> Path:
    """Rows that a tiny model can learn, for instruct and for DPO."""
    rows = [
        {
            "question": f"What comes after {i % 37}?" + " Think." * (i % 5),
            "answer": f"It is {i % 37 + 1}, of course.",
            "worse": f"It is {i % 11}.",
        }
        for i in range(count)
    ]
    path.write_text(json.dumps(rows))
    return path


def write_job(folder: Path, data: Path, **changes: Any) -> Path:
    """Write a job in a folder of its own, by default on the token clock; return its job.json."""
    fields: dict[str, Any] = {
        "task_id": folder.name,
        "task": folder.name,
        "slot": "a",
        "task_type": TaskType.INSTRUCT,
        "model": "podium/tiny",
        "model_path": str(MODEL),
        "dataset": str(data),
        "file_format": FileFormat.JSON,
        "dataset_type": INSTRUCT,
        "start_at": 0.0,
        "ready_by": 100.0,
        "hardware": Hardware(device="cpu", count=1, memory_bytes=2**33),
        "threads": 1,
        "clock": "token",
        "token_clock_rate": 1000.0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_bytes(encode(WorkerJob(**{**fields, **changes})))
    return path


def start(job: Path) -> subprocess.Popen[bytes]:
    """Start a worker process on a job as leader of its own group; its output goes to worker.log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (job.parent / "worker.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.harness.tiny_jobs", str(job)],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )


def kill(worker: subprocess.Popen[bytes]) -> None:
    """kill -9 for the worker and all its processes."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def outcome_of(job: Path) -> Outcome | None:
    """Return the worker's outcome, if it is written."""
    path = job.parent / "outcome.json"
    return decode_outcome(path.read_bytes()) if path.exists() else None


def weights_of(job: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every file of weights that a finished run left: its export and its newest checkpoint."""
    newest = max((job.parent / "checkpoints").glob("step-*"))
    for folder in (job.parent / "export", newest):
        for path in sorted(folder.glob("*.safetensors")):
            yield f"{folder.name}/{path.name}", path.read_bytes()


def keep(*jobs: Path) -> Path:
    """Copy the folders of these jobs, logs and all, out of a bench's temporary one; return where they are."""
    kept = Path(tempfile.mkdtemp(prefix="podium-kept-"))
    for job in jobs:
        shutil.copytree(job.parent, kept / job.parent.name)
    return kept


if __name__ == "__main__":
    PROFILES.update({recipe.profile: recipe for recipe in (DROPOUT, MIXED)})
    launch.command = lambda job_path: [
        sys.executable,
        "-m",
        "bench.harness.tiny_jobs",
        str(job_path),
    ]  # ranks know them too
    leave(main())
