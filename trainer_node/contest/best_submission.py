"""The best submission so far: what lies in the submission folder, and whether another one is better."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from shared.files import is_disk_full
from shared.logs import get_logger
from shared.messages.runs import Outcome
from trainer_node.contest.submission import InvalidSubmissionError, SubmissionFolder, linked
from trainer_node.contest.untrained_adapter import NoAdapterError, write_untrained

log = get_logger()


class Installed(Struct, frozen=True, kw_only=True):
    """What lies in the submission folder."""

    source: str  # "untrained", "earlier container", "early" or "final"
    run: str = ""  # the run folder that it came from
    loss: float | None = None  # on held-out rows; None if it was not measured


def is_better(new: Installed, old: Installed | None, base_loss: float | None) -> bool:
    """Return whether a submission should replace another one.

    A run's own final choice replaces its early exports whatever was measured: it was made among them. Where
    runs differ the lower measured loss wins, and an unmeasured one replaces only what was not measured.
    """
    if old is None:
        return True
    if new.source == "untrained":
        return False
    if new.source == "final" and new.run == old.run:
        return True
    if old.source == "untrained":
        return new.loss is None or base_loss is None or new.loss < base_loss
    if old.loss is None:
        return True
    return new.loss is not None and new.loss < old.loss


class BestSubmission:
    """Replaces the submission by better ones; one that can't be written leaves it as it is."""

    def __init__(self, folder: SubmissionFolder, started_at: float) -> None:
        self.folder = folder
        self.started_at = started_at
        self.installed: Installed | None = None
        self.base_loss: float | None = None  # of the base model, on the held-out rows of the run

    @property
    def loss(self) -> float | None:
        """Return the held-out loss of what lies there, if it was measured."""
        return self.installed.loss if self.installed is not None else None

    def begin(self, model_folder: Path, model: str) -> None:
        """Have a submission at once: an earlier container's, else an adapter that changes nothing."""
        self.folder.prepare()
        if not self.folder.objections():
            self.installed = Installed(source="earlier container")
            log.info("an earlier container of this task left a valid submission; it stays until a better one")
            return
        self._install(
            Installed(source="untrained"), lambda folder: write_untrained(model_folder, model, folder)
        )

    def note_base_loss(self, loss: float | None) -> None:
        """Take down the base model's held-out loss."""
        self.base_loss = loss if loss is not None else self.base_loss

    def offer(self, source: str, run: str, outcome: Outcome, export: Path) -> bool:
        """Install an export if it is better than what lies there; return whether it was."""
        metrics = outcome.metrics
        if metrics is not None:
            self.note_base_loss(metrics.base_loss)
        new = Installed(source=source, run=run, loss=metrics.final_loss if metrics else None)
        if not is_better(new, self.installed, self.base_loss):
            log.info("an export is not better than the submission", loss=new.loss, source=source, run=run)
            return False
        return self._install(new, linked(export))

    def _install(self, new: Installed, fill: Callable[[Path], None]) -> bool:
        try:
            self.folder.install(fill)
        except (InvalidSubmissionError, NoAdapterError) as error:
            log.error("an export is not a valid submission", source=new.source, error=str(error))
            return False
        except OSError as error:
            what = "the disk is full" if is_disk_full(error) else "the submission can't be written"
            log.error(what, source=new.source, error=str(error))
            return False
        self.installed = new
        after_s = round(time.time() - self.started_at, 1)
        log.info("submission in place", source=new.source, loss=new.loss, after_s=after_s)
        return True
