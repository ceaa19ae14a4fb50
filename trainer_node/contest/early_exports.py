"""Exports of the run under way, each made by a process of its own while the worker trains."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from shared.files import file_digest
from shared.json_files import read_json_if_possible
from shared.logs import get_logger
from shared.messages.runs import Outcome
from trainer_node.contest.next_action import export_due
from trainer_node.contest.worker_jobs import Times
from trainer_node.worker.run_folder import RunFolder

MODULE: Final = "trainer_node.engine.early_export"
NOTHING_YET: Final = 3
END_S: Final = 2.0  # for a killed process to be gone: the final export waits for it

log = get_logger()


class EarlyExports:
    """At most one export process, for the newest checkpoint of one run."""

    def __init__(self, run: RunFolder, times: Times, environment: dict[str, str]) -> None:
        self.run = run
        self.times = times
        self.environment = environment
        self.target = run.path / "early"
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._last_at: float | None = None
        self._last_s = 0.0
        self._seen: str | None = None  # what the newest export was made from

    def take(self) -> Outcome | None:
        """Return the outcome of an export that has just been finished, its files in `target`."""
        if self._process is None or (status := self._process.poll()) is None:
            return None
        self._process = None
        self._last_s = time.time() - self._began
        if status == NOTHING_YET:
            return None
        self._last_at = self._began
        if status:
            log.warning("an early export failed; the run goes on", status=status)
            return None
        outcome = read_json_if_possible(self._outcome_file, Outcome)
        if outcome is None:
            log.warning("an early export left no outcome")
        return outcome

    def start_if_due(self, below: float | None) -> None:
        """Start an export if there is something new and time for it; measured losses must be `below`."""
        state = self._state()
        due = export_due(
            now=time.time(),
            ready_by=self.times.ready_by,
            started_at=self.times.started_at,
            last_at=self._last_at,
            last_s=self._last_s,
            news=state is not None and state != self._seen,
        )
        if self._process is not None or not due:
            return
        self._seen, self._began = state, time.time()
        shutil.rmtree(self.target, ignore_errors=True)
        self._outcome_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", MODULE, str(self.run.path), str(self.target)]
        command += [] if below is None else [repr(below)]
        with (self.run.path / "early.log").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environment, "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )

    def stop(self) -> None:
        """End the export process, if one runs: what the worker leaves is better. Blocks, END_S at most."""
        if self._process is None:
            return
        self._process.kill()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:  # in a system call; the kernel ends it later
            log.warning("an early export doesn't end; going on", pid=self._process.pid, after_s=END_S)
        self._process = None

    @property
    def _outcome_file(self) -> Path:
        return self.target.with_name(f"{self.target.name}.json")

    def _state(self) -> str | None:
        """Return a name for what could be exported now; None before the first checkpoint."""
        step, searched = self.run.newest_step(), self.run.path / "search.json"
        if step is None or not (self.run.path / "run.json").exists():
            return None
        return f"{step}" if not searched.exists() else f"{step} {file_digest(searched)}"
