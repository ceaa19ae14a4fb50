"""Runs in trackio's own files on this machine: one SQLite file per project, which `trackio show` reads.

`trackio.init` and `trackio.log` are for one run at a time, stamp a row with the time at which it is written,
and only warn when a write fails. The layer below them takes times and keys, drops a row whose key it has, and
raises. It is no documented interface: pyproject.toml holds trackio to the minor version that is tested.
"""

from __future__ import annotations

import sqlite3
from importlib import import_module
from typing import Any

from podium.tracking.facts import Facts
from podium.tracking.runs import RunUpdate
from shared.errors import PodiumError, SettingsError

INSTALL = "tracking needs trackio 0.43: pip install '.[tracking]'"


class TrackerError(PodiumError):
    """A tracker can't be read or written now; the next try may succeed."""


class TrackioStore:
    """One project of trackio. Several processes may write to it at once."""

    def __init__(self, project: str) -> None:
        try:
            # 0.9 s, and only this command needs it
            self._storage: Any = import_module("trackio.sqlite_storage").SQLiteStorage
            self.folder = str(import_module("trackio.utils").TRACKIO_DIR)
        except (ImportError, AttributeError) as error:  # or a version that is built otherwise
            raise PodiumError(f"{INSTALL} ({error})") from error
        self._project = project
        try:
            self._storage.validate_project_name(project)
        except ValueError as error:
            raise SettingsError(f"--project {project!r}: {error}") from error

    def facts(self, run_id: str) -> Facts | None:
        """Return the facts of a run; None if it is not there. Raises TrackerError."""
        try:
            found: Facts | None = self._storage.get_run_config(self._project, run_id=run_id)
        except (OSError, sqlite3.Error, ValueError) as error:
            raise TrackerError(f"trackio's files in {self.folder} can't be read: {error}") from error
        return found

    def write(self, update: RunUpdate) -> None:
        """Store the rows that are not there yet, and the facts, in one transaction. Raises TrackerError."""
        try:
            self._storage.bulk_log(
                project=self._project,
                run=update.name,
                run_id=update.id,
                metrics_list=[row.values for row in update.rows],
                steps=[row.step for row in update.rows],
                timestamps=[row.timestamp for row in update.rows],
                log_ids=[f"{update.id}/{row.key}" for row in update.rows],
                config=update.facts,
            )
        except (OSError, sqlite3.Error, ValueError) as error:
            raise TrackerError(f"trackio's files in {self.folder} can't be written: {error}") from error
