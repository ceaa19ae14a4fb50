"""The interface of every artifact store, and its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from shared.errors import PodiumError
from shared.messages.jobs import Job


class Stored(Struct, frozen=True):
    """A task's one submission, read back from where it is."""

    digest: str
    artifact: str  # where it is, as a result names it
    remark: str = ""  # why it is not where it was to go


class StoreError(PodiumError):
    """The store doesn't work now, so what it holds is unknown: wait, and decide nothing."""


class NotTakenError(PodiumError):
    """The store will never take this submission; the one on disk has to do."""


class Remote(Protocol):
    """A store beyond this machine. The first writer stores a task's submission, and only once."""

    async def find(self, job: Job) -> Stored | None:
        """Read the task's submission back; None if there is none. Raises StoreError and BusError."""
        ...

    async def store(
        self, job: Job, folder: Path, digest: str, *, must_hold: Callable[[], None], limit_s: float
    ) -> Stored:
        """Put a folder there unless something is; what is there now, read back.

        `must_hold` is called right before the one write that decides, and raises if this node may no longer
        act for the slot. Raises StoreError and BusError (nobody knows what is there), and NotTakenError.
        """
        ...
