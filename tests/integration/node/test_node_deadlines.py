"""Jobs that are late: what is on disk is submitted, without it the job expires."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

from shared.messages.jobs import ResultStatus
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
