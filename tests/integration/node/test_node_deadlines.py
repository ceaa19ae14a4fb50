"""Jobs that are late: what is on disk is submitted, without it the job expires."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from typing import Any

import pytest

from shared import subjects
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, ResultStatus, Submitting
from shared.messages.runs import ErrorCode
from tests.integration.node.conftest import World


async def test_no_checkpoint_by_the_deadline_expires(world: World) -> None:
    node = world.node().start()
    await world.until(world.lease, 60, "no lease")
    await world.give(seconds=4, steps=1000, no_checkpoints=True)
    result = await world.result()
    assert (result.status, result.code) == (ResultStatus.EXPIRED, "too_late")
    assert [line["event"] for line in node.slot_log()] == ["acquired", "released"]


async def test_a_job_found_after_its_deadline_expires(world: World) -> None:
    await world.give(seconds=0.1)
    await asyncio.sleep(0.2)
    world.node().start()
    assert (await world.result()).status is ResultStatus.EXPIRED


async def test_a_deadline_missed_by_a_dead_node_still_submits_its_checkpoint(world: World) -> None:
    node = world.node().start()
    job = await world.give(seconds=10, steps=1000, checkpoint_every=5)
    await world.trained(node, 12)
    await node.kill()
    os.kill(node.worker().pid, signal.SIGKILL)
    await asyncio.sleep(job.deadline_at - time.time())
    node.start()
    result = await world.result()
    assert result.status is ResultStatus.SUBMITTED
    assert result.deadline_margin_s is not None
    assert result.deadline_margin_s < 0
    assert "after the deadline" in result.reason
    assert result.metrics is not None
    assert result.metrics.steps >= 10


async def test_a_stored_submission_is_named_whatever_else_is_lost(world: World) -> None:
    """The node died after storing, its run folder is gone, and the deadline has passed."""
    node = world.node()
    await world.give(seconds=0.1)
    stored = world.settings.artifacts / "job1" / "submission"
    stored.mkdir(parents=True)
    (stored / "adapter.txt").write_text("stored before the kill")
    await asyncio.sleep(0.2)
    node.start()
    result = await world.result()
    assert result.status is ResultStatus.SUBMITTED
    assert result.digest == world.submitted()
    assert json.loads(json.dumps(result.artifact)) == str(stored.absolute())


@pytest.mark.parametrize("dataset", ["", "/nowhere/train.json"])  # with the second its job is a refused one
@pytest.mark.parametrize("chain", ["empty", "submitting"])
async def test_a_run_folder_that_can_not_be_used_fails_its_job_after_the_deadline(
    chain: str, dataset: str, world: World
) -> None:
    """It is tried again until then. The gateway ends no job that is being submitted."""
    node = world.node(deadline_margin_s=1)
    run = node.folder / "runs" / "job1"
    run.parent.mkdir(parents=True)
    run.symlink_to(run)  # "too many levels", for root too
    await world.give(seconds=2, **({"dataset": dataset} if dataset else {}))
    if chain == "submitting":
        record = Submitting(record_id="s", node="other", epoch=1, at=0.0, task="job1", slot="a", digest="d")
        await world.bus.append(subjects.state_stream("a"), subjects.state("a", "job1"), encode(record))
    node.start()
    result = await world.result(timeout_s=30)
    assert (result.status, result.code) == (ResultStatus.FAILED, ErrorCode.INTERNAL)
    assert "Too many levels of symbolic links" in result.reason
    assert node.log.count("can't work, will retry") == 1
    assert node.running


@pytest.mark.parametrize("last", ["claimed", "submitting"])
async def test_what_is_stored_ends_its_job_though_its_run_folder_can_not_be_used(
    last: str, world: World
) -> None:
    """The node died after storing, and its run folder is damaged: the result names the submission."""
    node = world.node(deadline_margin_s=1)
    run = node.folder / "runs" / "job1"
    run.parent.mkdir(parents=True)
    run.symlink_to(run)  # "too many levels", for root too
    await world.give(seconds=2)
    stored = world.settings.artifacts / "job1" / "submission"
    stored.mkdir(parents=True)
    (stored / "adapter.txt").write_text("stored before the kill")
    stamp: dict[str, Any] = {"record_id": "s", "node": "other", "epoch": 1, "at": 0.0}
    stamp |= {"task": "job1", "slot": "a"}
    record = Claimed(**stamp, attempt=1) if last == "claimed" else Submitting(**stamp, digest="d")
    await world.bus.append(subjects.state_stream("a"), subjects.state("a", "job1"), encode(record))
    node.start()
    result = await world.result(timeout_s=30)
    assert (result.status, result.digest) == (ResultStatus.SUBMITTED, world.submitted())
    assert result.artifact == str(stored.absolute())
    assert "after the deadline" in result.reason
    assert node.running
