"""Nodes that are killed, outages of the broker, and rivals for the lease: one job, one result."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time

import pytest

from shared.messages.jobs import ResultStatus, Submitting
from shared.processes import start_time
from tests.integration.lost_disk import remove_store
from tests.integration.node.conftest import World, claims


@pytest.mark.fault("F3")
async def test_the_broker_dies_mid_job_and_training_goes_on(world: World) -> None:
    node = world.node().start()
    await world.give(steps=80)
    await world.trained(node, 5)
    pid = node.worker().pid
    await world.broker.stop(kill=True)
    await asyncio.sleep(2.5)  # longer than the lease lives
    await world.trained(node, 31)
    await world.broker.start()
    result = await world.result()
    assert node.worker().pid == pid
    assert world.steps(node) == list(range(1, 81))
    assert result.digest == world.submitted()
    assert {claim.attempt for claim in claims(await world.chain())} == {1}


@pytest.mark.fault("F3")
async def test_an_outcome_waits_for_the_broker(world: World) -> None:
    node = world.node().start()
    await world.give(steps=20)
    await world.trained(node, 5)
    await world.broker.stop(kill=True)
    await world.exists(node.folder / "runs/job1/outcome.json")
    await asyncio.sleep(2.5)
    await world.broker.start()
    started = time.monotonic()
    result = await world.result()
    assert result.status is ResultStatus.SUBMITTED
    assert time.monotonic() - started < 20
    assert result.digest == world.submitted()


@pytest.mark.fault("F3")
async def test_the_broker_dies_again_and_again_around_the_submit(world: World) -> None:
    world.node().start()
    for number in range(4):
        task = f"t{number}"
        await world.give(task, steps=4, step_s=0.02)
        await asyncio.sleep(0.35 + 0.15 * number)
        await world.broker.stop(kill=True)
        await asyncio.sleep(0.2)
        await world.broker.start()
        result = await world.result(task)
        assert result.status is ResultStatus.SUBMITTED
        assert result.digest == world.submitted(task)


@pytest.mark.fault("F19")
async def test_a_node_killed_again_and_again_submits_once(world: World) -> None:
    node = world.node().start()
    await world.give(steps=30, step_s=0.03)
    chain = []
    for number in range(12):
        await asyncio.sleep(0.45 + 0.07 * number)
        await node.kill()
        node.start()
    result = await world.result()
    chain = await world.chain()
    assert result.digest == world.submitted()
    assert {claim.attempt for claim in claims(chain)} == {1}
    assert world.steps(node) == list(range(1, 31))


@pytest.mark.fault("F15")
async def test_only_the_lease_holder_works(world: World) -> None:
    first = world.node("one").start()
    await world.until(world.lease, 60, "no lease")
    second = world.node("two").start()
    for number in range(3):
        await world.give(f"t{number}", steps=5, step_s=0.02)
        result = await world.result(f"t{number}")
        assert result.node == first.node_id
    assert not (second.folder / "worker.json").exists()
    first.signal(signal.SIGTERM)
    await first.wait()
    await world.give("t3", steps=5, step_s=0.02)
    assert (await world.result("t3")).node == second.node_id


@pytest.mark.fault("F5")
async def test_a_stale_node_is_fenced(world: World) -> None:
    stale = world.node("stale").start()
    await world.give(steps=100)
    await world.trained(stale, 5)
    heir = world.node("heir").start()
    stale.signal(signal.SIGSTOP)
    await world.trained(heir, 5)  # it got the lease when the stale one's had lapsed
    assert start_time(stale.worker().pid) is None  # one machine: two workers would share its devices
    stale.signal(signal.SIGCONT)
    result = await world.result()
    assert result.node == heir.node_id
    assert result.digest == world.submitted()
    nodes = [record.node for record in await world.chain()]
    assert nodes == sorted(nodes, key=[stale.node_id, heir.node_id].index)  # nothing of the stale one after
    await world.until(
        lambda: asyncio.to_thread(lambda: len(stale.slot_log()) == 2), 60, "the stale worker runs on"
    )
    assert "lease lost" in stale.log


@pytest.mark.fault("F5")
async def test_a_stale_node_with_a_finished_run_does_not_submit(world: World) -> None:
    stale = world.node("stale").start()
    await world.give(steps=10)
    await world.trained(stale, 3)
    heir = world.node("heir").start()
    stale.signal(signal.SIGSTOP)
    await world.trained(heir, 3)
    assert (stale.folder / "runs/job1/outcome.json").exists()
    stale.signal(signal.SIGCONT)
    result = await world.result()
    assert result.node == heir.node_id
    assert result.digest == world.submitted()
    submitting = [record for record in await world.chain() if isinstance(record, Submitting)]
    assert [record.node for record in submitting] == [heir.node_id]


async def test_a_drain_does_not_wait_for_a_broker_that_is_down(world: World) -> None:
    node = world.node().start()
    await world.give(steps=200)
    await world.trained(node, 5)
    await world.broker.stop(kill=True)
    await asyncio.sleep(0.5)
    node.signal(signal.SIGTERM)
    assert await node.wait(5) == 0
    stopped_at = world.steps(node)[-1]
    await world.broker.start()
    node.start()
    await world.trained(node, stopped_at + 1)
    assert world.steps(node).count(stopped_at) == 1


async def test_a_run_that_has_begun_goes_on_when_its_data_is_allowed_no_more(world: World) -> None:
    node = world.node().start()
    await world.give(steps=60)
    await world.trained(node, 5)
    await node.kill()
    os.killpg(node.worker().pid, signal.SIGKILL)
    world.node(dataset_roots="/nowhere").start()
    assert (await world.result()).status is ResultStatus.SUBMITTED


async def test_a_folder_that_cannot_be_cleaned_does_not_hold_the_slot(world: World) -> None:
    node = world.node().start()
    await world.give(steps=20)
    await world.trained(node, 5)
    (node.folder / "runs/job1/data").mkdir()  # where a file is expected
    await world.result()
    await world.give("job2", steps=5)
    assert (await world.result("job2")).status is ResultStatus.SUBMITTED
    assert "run folder not cleaned" in node.log


async def test_the_run_of_an_older_job_of_the_same_name_is_not_taken_for_this_one(world: World) -> None:
    node = world.node().start()
    await world.give(steps=5)
    first = await world.result()
    node.signal(signal.SIGTERM)
    await node.wait()
    await world.broker.stop(kill=True)
    await asyncio.to_thread(remove_store, world.broker)  # a fleet that restarts with old folders
    await asyncio.to_thread(shutil.rmtree, world.settings.artifacts)
    await world.broker.start()
    await world.until(world.streams, 60, "no streams")
    node.start()
    await world.give(steps=8)
    second = await world.result()
    assert second.metrics is not None
    assert second.metrics.steps == 8
    assert second.digest != first.digest
