"""Training runs of one task in a process of its own: what is wanted goes in, results come back one by one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from bench.arena.arena import CPU, ROOT, write_job
from bench.arena.task import Task
from bench.regret.grid import RECIPE
from shared.messages.hardware import Hardware

Result = TypeVar("Result", bound=Struct)


def results_of(
    module: str,
    task: Task,
    name: str,
    wanted: Sequence[Struct],
    kind: type[Result],
    cache: Path,
    hardware: Hardware = CPU,
) -> Iterator[Result]:
    """Have `module` train what is wanted of a task; yield each result as soon as it is done.

    With the name `point` it reads points.json, and its results begin with their point. Raises RuntimeError if
    the process fails.
    """
    with tempfile.TemporaryDirectory(prefix=f"{name}s-") as temporary:
        folder = Path(temporary)
        job = write_job(task, RECIPE.profile, cache, folder, hardware)
        (folder / f"{name}s.json").write_bytes(msgspec.json.encode(list(wanted)))
        with (
            (folder / "errors").open("wb") as errors,
            subprocess.Popen(
                [sys.executable, "-m", module, str(job)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=errors,
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(f'{{"{name}"'.encode()):
                    yield msgspec.json.decode(line, type=kind)
        if process.returncode:
            raise RuntimeError(f"{module} ended early on {task}: {(folder / 'errors').read_text()[-1000:]}")
