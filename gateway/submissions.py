"""Answer upstream's request for a task's submission, from the ledger alone and at once."""

from __future__ import annotations

import time
from typing import Final

from msgspec import Struct

from gateway.errors import NoSubmissionError
from gateway.state.ledger import Ledger
from shared.messages import ResultStatus

HUB: Final = "hf://"


class Submission(Struct, frozen=True):
    """The location of a task's submission."""

    repo: str
    model_hash: str | None


def submission_of(ledger: Ledger, token: str) -> Submission:
    """Return a task's submission, which stays available for good. Raises NoSubmissionError."""
    task = ledger.task(token)
    if task is None:
        raise NoSubmissionError("no such task was accepted")
    result = ledger.chain_of(task.record).result
    if result is None:
        raise NoSubmissionError(f"no submission yet: the task is {ledger.state(task, time.time())}")
    if result.status is not ResultStatus.SUBMITTED or result.artifact is None:
        raise NoSubmissionError(f"no submission: the task ended as {result.status}: {result.reason}")
    return Submission(repository(result.artifact), result.model_hash)


def repository(artifact: str) -> str:
    """Return the repository's name on the hub; an artifact stored elsewhere keeps its full name."""
    if not artifact.startswith(HUB):
        return artifact
    return artifact.removeprefix(HUB).partition("@")[0]
