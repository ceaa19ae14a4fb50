"""A drain does not wait for the store, whatever the store does with its cancellation."""

from __future__ import annotations

import asyncio
import errno
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shared.files import folder_digest
from shared.messages.jobs import Job
from shared.messages.runs import ErrorCode
from shared.settings import Settings
from trainer_node.artifacts import publisher
from trainer_node.artifacts.interface import Stored, StoreError
from trainer_node.artifacts.publisher import Submissions
from trainer_node.worker.crash import Failure
from trainer_node.worker.slot_lock import StuckError

JOB = cast(Job, SimpleNamespace(task="t", deadline_at=0.0))


class Stubborn:
    """A store that loses its first cancellations, as `wait_for` of Python 3.11 may."""

    def __init__(self, losses: int) -> None:
        self.losses = losses
        self.asked = asyncio.Event()
        self.ended = False

    async def find(self, job: Job) -> Stored | None:
        """Take a minute for each cancellation that is lost, and one more."""
        self.asked.set()
        try:
            for _ in range(self.losses):
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(60.0)
            await asyncio.sleep(60.0)
        finally:
            self.ended = True
        return None


class Known:
    """A store that has a submission, none, or does not answer."""

    def __init__(self, found: Stored | StoreError | None) -> None:
        self.found = found

    async def find(self, job: Job) -> Stored | None:
        """Return what there is."""
        if isinstance(self.found, StoreError):
            raise self.found
        return self.found


def submissions(folder: Path, remote: Stubborn | Known | None) -> Submissions:
    made = Submissions.__new__(Submissions)
    made.folder, made.remote, made.draining = folder, cast(Any, remote), asyncio.Event()
    made.settings = Settings()
    return made


@pytest.mark.parametrize("losses", [0, 1, 3])
async def test_a_store_that_loses_its_cancellation_does_not_hold_the_drain(
    losses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "AGAIN_S", 0.05)
    store = Stubborn(losses)
    made = submissions(tmp_path, store)
    asking = asyncio.create_task(made.is_there(JOB))
    await asyncio.wait_for(store.asked.wait(), 30)
    made.draining.set()
    began = time.monotonic()
    _, late = await asyncio.wait([asking], timeout=10.0)
    assert not late, "it waits for the store"
    with pytest.raises(StoreError, match="the node drains"):
        await asking
    assert store.ended
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize("asks", ["put", "lost"])
async def test_no_look_into_the_store_holds_the_drain(asks: str, tmp_path: Path) -> None:
    """A drain after all deadlines decides nothing: the next process asks again."""
    store = Stubborn(0)
    made = submissions(tmp_path, store)
    work = made.put(JOB, None) if asks == "put" else made.lost(JOB, StoreError("gone"))
    asking = asyncio.create_task(cast(Any, work))
    await asyncio.wait_for(store.asked.wait(), 30)
    made.draining.set()
    _, late = await asyncio.wait([asking], timeout=10.0)
    assert not late, "it waits for the store"
    if asks == "lost":
        assert await asking is None
    else:
        with pytest.raises(StoreError, match="the node drains"):
            await asking


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "this node's disk: [Errno 28]",
            ErrorCode.DISK_FULL,
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "this node's disk: [Errno 122]", ErrorCode.DISK_FULL),
        (
            OSError(errno.EIO, "Input/output error", "run"),
            "can't go on with it: [Errno 5]",
            ErrorCode.INTERNAL,
        ),
        (StuckError("slot.lock is held"), "can't go on with it: slot.lock is held", ErrorCode.INTERNAL),
    ],
)
async def test_a_task_that_is_lost_says_why(
    error: OSError, text: str, code: ErrorCode, tmp_path: Path
) -> None:
    failure = await submissions(tmp_path, None).lost(JOB, error)
    assert isinstance(failure, Failure)
    assert text in failure.text
    assert failure.code is code


DAMAGED = OSError(errno.EIO, "Input/output error", "run")


def put_on_disk(folder: Path) -> Path:
    path = folder / "t" / "submission"
    path.mkdir(parents=True)
    (path / "adapter.txt").write_text("stored")
    return path


async def test_a_disk_that_fails_is_not_asked_in_vain_for_a_submission(tmp_path: Path) -> None:
    path = put_on_disk(tmp_path)
    found = await submissions(tmp_path, None).lost(JOB, DAMAGED)
    assert found == Stored(folder_digest(path), str(path))


async def test_a_store_elsewhere_says_what_is_stored_whatever_is_on_the_disk(tmp_path: Path) -> None:
    path, there = put_on_disk(tmp_path), Stored("d", "hub")
    assert await submissions(tmp_path, Known(there)).lost(JOB, DAMAGED) == there
    failure = await submissions(tmp_path, Known(None)).lost(JOB, DAMAGED)
    assert isinstance(failure, Failure)
    assert failure.text.endswith(f"kept at {path}")


@pytest.mark.parametrize("store", ["elsewhere", "disk"])
@pytest.mark.parametrize("late", [False, True])
async def test_a_store_that_can_not_be_read_ends_no_task_before_it_would_expire(
    store: str, late: bool, tmp_path: Path
) -> None:
    if store == "disk":
        (tmp_path / "t").symlink_to("t")  # "too many levels", for root too
    made = submissions(tmp_path, Known(StoreError("gone")) if store == "elsewhere" else None)
    due_s = made.settings.expire_after_s if late else made.settings.deadline_margin_s
    job = cast(Job, SimpleNamespace(task="t", deadline_at=time.time() - due_s - 1))
    failure = await made.lost(job, DAMAGED)
    if late:
        assert isinstance(failure, Failure)
        assert "nobody knows whether the submission was stored: [Errno 5]" in failure.text
    else:
        assert failure is None
