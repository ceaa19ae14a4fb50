"""One check of the GPU suite: run in a process of its own, ended at its limit, answered as JSON.

It has the environment of a worker, above all its allocator of GPU memory: recorded graphs and NCCL's buffers
lie in what that allocates.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from shared.settings import Settings
from trainer_node.hardware import worker_threads
from trainer_node.worker.environment import worker_environment

POLL_S = 0.05


class Setting(Struct, frozen=True, kw_only=True):
    """Where the checks run."""

    dry: bool  # on the CPU, with tiny shapes: does the suite itself work?
    folder: Path  # for files of a check, removed after it

    def keep(self, figures: dict[str, Any]) -> None:
        """Write down what is found so far: it counts even if the check fails or is killed."""
        _write(self.folder / "found.json", msgspec.json.encode(figures))


class Skip(Exception):
    """This machine has nothing for the check to look at; the text says what is missing."""


class Finding(Struct, frozen=True):
    """What a check found."""

    figures: dict[str, Any]
    faults: list[str] = []


class Answer(Struct, frozen=True, kw_only=True):
    """What the suite writes down of a check."""

    status: str  # "ok", "failed" or "skipped"
    seconds: float
    figures: dict[str, Any] = {}
    faults: list[str] = []


Check = Callable[[Setting], Finding]


def run_check(check: Check, *, dry: bool, limit_s: float) -> Answer:
    """Run a check in a forked process; it and all that it started is killed at its limit.

    Forked, not started: the libraries take ten seconds to import, and the parent has done that once. It must
    not have used CUDA.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="podium-gpu-") as name:
        setting = Setting(dry=dry, folder=Path(name))
        place = setting.folder / "answer.json"
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            _answer(check, setting, place)
        ended = _wait(child, began + limit_s)
        seconds = round(time.monotonic() - began, 1)
        kept = setting.folder / "found.json"
        figures = msgspec.json.decode(kept.read_bytes(), type=dict[str, Any]) if kept.exists() else {}
        if place.exists():
            answer = msgspec.json.decode(place.read_bytes(), type=Answer)
            return msgspec.structs.replace(answer, seconds=seconds, figures=figures | answer.figures)
        fault = f"it ended with exit status {ended}" if ended is not None else f"no answer in {limit_s:.0f} s"
        return Answer(status="failed", seconds=seconds, figures=figures, faults=[fault])


def _answer(check: Check, setting: Setting, place: Path) -> None:
    """In the forked process: carry the check out, write its answer, and end."""
    answer = Answer(status="failed", seconds=0.0, faults=["it was interrupted"])
    try:
        _become_worker(setting)
        found = check(setting)
        status = "failed" if found.faults else "ok"
        answer = Answer(status=status, seconds=0.0, figures=found.figures, faults=found.faults)
    except Skip as skip:
        answer = Answer(status="skipped", seconds=0.0, faults=[str(skip)])
    except Exception as error:
        where = traceback.format_exc().splitlines()[-8:]
        text = f"{type(error).__name__}: {str(error)[:400]}"
        answer = Answer(status="failed", seconds=0.0, figures={"where": where}, faults=[text])
    finally:
        _write(place, msgspec.json.encode(answer))
        os._exit(0)  # taking CUDA apart can hang, and nothing is left to do


def _become_worker(setting: Setting) -> None:
    """Replace this process's variables by those that a worker would get here.

    Early enough for torch, which is imported: it reads the allocator's when CUDA is first used.
    """
    temporary = setting.folder / "tmp"
    temporary.mkdir()
    threads = 1 if setting.dry else worker_threads(Settings())
    found = worker_environment(os.environ, threads, None, temporary=temporary)
    found["TORCHINDUCTOR_CACHE_DIR"] = str(setting.folder / "inductor")  # nothing of an earlier run
    os.environ.clear()
    os.environ.update(found)
    tempfile.tempdir = None  # the parent's place is remembered
    torch.set_num_threads(threads)  # OMP_NUM_THREADS was read when torch was loaded


def _write(place: Path, text: bytes) -> None:
    temporary = place.with_suffix(".part")
    temporary.write_bytes(text)
    os.replace(temporary, place)


def _wait(child: int, until: float) -> int | None:
    """Wait for a process; its exit status, or None if it had to be killed. Nothing of its group is left."""
    status = None
    while status is None and time.monotonic() < until:
        ended, raw = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(raw)
        else:
            time.sleep(POLL_S)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status
