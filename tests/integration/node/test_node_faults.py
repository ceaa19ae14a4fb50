"""A trainer node under kills, hangs, outages and rivals: one job, one result, whatever happens."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from shared.messages import Claimed, ResultStatus, StateRecord, Submitting
from tests.integration.node.conftest import World
from trainer_node.worker.slot_lock import start_time

SCRIPTED_WORKER = Path(__file__).parents[3] / "bench" / "harness" / "scripted_worker.py"


def claims(chain: list[StateRecord]) -> list[Claimed]:
    return [record for record in chain if isinstance(record, Claimed)]


async def test_a_killed_node_adopts_its_worker(world: World) -> None:
    node = world.node().start()
    await world.give(steps=200)  # longer than a node takes to start on a busy machine
    await world.trained(node, 5)
    pid = node.worker().pid
    await node.kill()
    await world.trained(node, 12)  # training goes on without a node
    node.start()
    result = await world.result()
    assert node.worker().pid == pid
    assert world.steps(node) == list(range(1, 201))
    assert result.digest == world.submitted()
    first, second = claims(await world.chain())
    assert second.epoch > first.epoch
    assert second.attempt == 1
    assert [line["event"] for line in node.slot_log()] == ["acquired", "adopted", "released"]


async def test_a_worker_without_its_file_is_adopted_by_its_lock(world: World) -> None:
    """The node was killed between the spawn and the writing of worker.json."""
    node = world.node().start()
    await world.give(steps=200)  # longer than a node takes to start on a busy machine
    await world.trained(node, 5)
    pid = node.worker().pid
    await node.kill()
    (node.folder / "worker.json").unlink()
    node.start()
    await world.result()
    assert node.worker().pid == pid
    assert world.steps(node) == list(range(1, 201))


async def test_a_worker_that_finished_while_no_node_was_there_is_submitted(world: World) -> None:
    node = world.node().start()
    await world.give(steps=20)
    await world.trained(node, 5)
    await node.kill()
    await world.exists(node.folder / "runs/job1/outcome.json")
    node.start()
    result = await world.result()
    assert result.status is ResultStatus.SUBMITTED
    assert [line["event"] for line in node.slot_log()] == ["acquired", "released"]


async def test_a_killed_worker_resumes_and_does_not_count_after_progress(world: World) -> None:
    node = world.node().start()
    await world.give(steps=34, checkpoint_every=3)
    for reached in (8, 15, 22, 29):  # four kills, one more than the limit
        await world.trained(node, reached)
        os.kill(node.worker().pid, signal.SIGKILL)
    result = await world.result()
    assert result.status is ResultStatus.SUBMITTED
    made = claims(await world.chain())
    assert [claim.attempt for claim in made] == [1] * 5
    assert [claim.step for claim in made] == sorted({claim.step for claim in made})
    assert result.digest == world.submitted()


async def test_three_deaths_without_progress_fail_the_job_with_its_error(world: World) -> None:
    node = world.node().start()
    await world.give(die_at=3, checkpoint_every=1000, last_line="RuntimeError: the reason")
    result = await world.result()
    assert result.status is ResultStatus.FAILED
    assert "SIGKILL" in result.reason
    assert "RuntimeError: the reason" in result.reason
    assert [claim.attempt for claim in claims(await world.chain())] == [1, 2, 3]
    await world.give("job2", steps=3)
    assert (await world.result("job2")).status is ResultStatus.SUBMITTED
    assert node.running


async def test_a_worker_that_can_not_be_started_uses_up_no_attempt(world: World, tmp_path: Path) -> None:
    """One death is counted once, however often the start after it fails (the program is gone)."""
    program = tmp_path / "worker"
    real = shlex.join([sys.executable, str(SCRIPTED_WORKER)])

    def install(body: str) -> None:
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)

    install('rm "$0"; exit 1')
    node = world.node(worker_command=json.dumps([str(program)])).start()
    await world.give(steps=3)

    async def failed_four_times() -> bool:
        return len(claims(await world.chain())) >= 5

    await world.until(failed_four_times, 60, "the start never failed four times")
    install(f'exec {real} "$@"')
    assert (await world.result()).status is ResultStatus.SUBMITTED
    attempts = [claim.attempt for claim in claims(await world.chain())]
    assert attempts == [1] + [2] * (len(attempts) - 1)
    assert node.running


async def test_a_failure_that_may_pass_counts_like_a_death(world: World) -> None:
    world.node().start()
    await world.give(fail="out_of_memory")
    result = await world.result()
    assert (result.status, result.code) == (ResultStatus.FAILED, "out_of_memory")
    assert [claim.attempt for claim in claims(await world.chain())] == [1, 2, 3]


async def test_a_hanging_worker_is_killed_and_resumed_without_counting(world: World) -> None:
    node = world.node(hang_s=1.5, stop_grace_s=1).start()
    await world.give(steps=20, hang_at=8)
    result = await world.result()
    assert result.status is ResultStatus.SUBMITTED
    assert [(claim.attempt, claim.step) for claim in claims(await world.chain())] == [(1, 0), (1, 5)]
    assert "no progress for" in node.log


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
    await asyncio.to_thread(world.broker.remove_store)  # a fleet that restarts with old folders
    await asyncio.to_thread(shutil.rmtree, world.settings.artifacts)
    await world.broker.start()
    await world.until(world.streams, 60, "no streams")
    node.start()
    await world.give(steps=8)
    second = await world.result()
    assert second.metrics is not None
    assert second.metrics.steps == 8
    assert second.digest != first.digest
