"""A trainer node without faults: lease, work, result, drain."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from shared import subjects
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, Moved, Result, ResultStatus, Submitting
from shared.messages.runs import ErrorCode, Progress, decode_progress
from shared.messages.slots import Heartbeat, decode_heartbeat
from tests.integration.node.conftest import World


async def test_a_job_becomes_one_submission(world: World) -> None:
    node = world.node().start()
    job = await world.give()
    result = await world.result()
    claimed, submitting, last = await world.chain()
    assert isinstance(claimed, Claimed)
    assert isinstance(submitting, Submitting)
    assert last == result
    assert (claimed.attempt, claimed.step, claimed.node) == (1, 0, node.node_id)
    assert claimed.epoch == submitting.epoch == result.epoch > 0
    assert result.status is ResultStatus.SUBMITTED
    assert result.digest == submitting.digest == world.submitted()
    assert result.artifact is not None
    assert result.metrics is not None
    assert result.deadline_margin_s is not None
    assert Path(result.artifact) == world.settings.artifacts.absolute() / "job1" / "submission"
    assert result.metrics.final_loss == 1.0
    assert 50 < result.deadline_margin_s < job.deadline_at - job.received_at
    events = [(line["event"], line["task"]) for line in node.slot_log()]
    assert events == [("acquired", "job1"), ("released", "job1")]


async def test_jobs_follow_each_other_and_old_runs_are_cleaned(world: World) -> None:
    node = world.node().start()
    for number in range(3):
        await world.give(f"t{number}", steps=5, step_s=0.01)
        assert (await world.result(f"t{number}")).status is ResultStatus.SUBMITTED
    assert not list((node.folder / "runs").glob("*/checkpoints"))
    assert len(list((node.folder / "runs").glob("*/export/adapter.txt"))) == 3


async def test_heartbeats_and_progress_are_heard(world: World) -> None:
    beats: list[Heartbeat] = []
    reported: list[Progress] = []

    async def hear_beat(message: Any) -> None:
        beats.append(decode_heartbeat(message.data))

    async def hear_progress(message: Any) -> None:
        reported.append(decode_progress(message.data))

    await world.bus.subscribe(subjects.heartbeat("a"), hear_beat)
    await world.bus.subscribe(subjects.progress("a", "job1"), hear_progress)
    node = world.node(heartbeat_s=0.2).start()
    await world.give(steps=30)
    result = await world.result()
    assert {beat.node for beat in beats} == {node.node_id}
    assert beats[-1].hardware.name == "cpu"
    assert 0 < beats[-1].memory_used < beats[-1].memory_total
    busy = [beat for beat in beats if beat.worker_alive]
    assert busy[-1].task == "job1"
    assert busy[-1].step > 0
    assert busy[-1].epoch == result.epoch
    assert [line.step for line in reported] == sorted(line.step for line in reported)
    assert 2 <= len(reported) <= 10  # about two a second, whatever the worker writes
    assert reported[-1].phase == "done"


@pytest.mark.fault("F18")
async def test_sigterm_drains_and_the_next_life_resumes(world: World) -> None:
    node = world.node().start()
    await world.give(steps=30, checkpoint_every=1000)
    await world.trained(node, 8)
    node.signal(signal.SIGTERM)
    assert await node.wait() == 0
    assert await world.lease() is None
    stopped_at = world.steps(node)[-1]
    node.start()
    result = await world.result()
    claims = [record for record in await world.chain() if isinstance(record, Claimed)]
    assert [(claim.attempt, claim.step) for claim in claims] == [(1, 0), (1, stopped_at)]
    assert claims[1].epoch > claims[0].epoch
    assert world.steps(node) == list(range(1, 31))  # not one step twice
    assert result.digest == world.submitted()


async def test_a_worker_that_ignores_sigterm_is_killed_at_drain(world: World) -> None:
    node = world.node(stop_grace_s=0.5).start()
    await world.give(steps=500, ignore_sigterm=True)
    await world.trained(node, 3)
    started = time.monotonic()
    node.signal(signal.SIGTERM)
    assert await node.wait() == 0
    assert time.monotonic() - started < 30
    assert [line["event"] for line in node.slot_log()] == ["acquired", "released"]


@pytest.mark.fault("F15")
async def test_two_nodes_in_one_folder_is_refused(world: World) -> None:
    first = world.node().start()
    await world.give(steps=5)
    await world.result()
    second = world.node().start()
    assert await second.wait() == 1
    assert "another trainer node works in" in first.log


async def test_no_broker_is_one_clear_line(world: World) -> None:
    await world.broker.stop(kill=True)
    node = world.node(nats_connect_timeout_s=0.5).start()
    assert await node.wait() == 1
    assert "no NATS server answers at" in node.log
    assert "Traceback" not in node.log


async def test_a_bad_setting_is_one_clear_line(world: World) -> None:
    node = world.node(lease_ttl_s=0.1).start()
    assert await node.wait() == 2
    assert "Traceback" not in node.log


async def test_data_outside_the_allowed_folders_fails_the_job_without_a_worker(world: World) -> None:
    node = world.node().start()
    await world.give(dataset="/etc/passwd")
    result = await world.result()
    assert (result.status, result.code) == (ResultStatus.FAILED, ErrorCode.BAD_DATA)
    assert "PODIUM_DATASET_ROOTS" in result.reason
    assert not (node.folder / "worker.json").exists()


async def test_a_failure_that_would_repeat_ends_the_job_at_once(world: World) -> None:
    world.node().start()
    await world.give(fail="bad_data")
    result = await world.result()
    assert (result.status, result.reason) == (ResultStatus.FAILED, "scripted bad_data")
    assert sum(isinstance(record, Claimed) for record in await world.chain()) == 1


async def test_a_cancelled_job_stops_its_worker_and_frees_the_slot(world: World) -> None:
    node = world.node().start()
    job = await world.give(steps=500)
    await world.trained(node, 3)
    record = await world.bus.last(subjects.state_stream("a"), subjects.state("a", "job1"))
    assert record is not None
    cancelled = Result(
        record_id="c", task=job.task, task_id=job.task_id, slot="a", status=ResultStatus.CANCELLED
    )
    await world.bus.append(
        subjects.state_stream("a"), record.subject, encode(cancelled), last_on_subject=record.sequence
    )
    await world.give("job2", steps=5)
    assert (await world.result("job2")).status is ResultStatus.SUBMITTED
    assert (await world.result("job1")).status is ResultStatus.CANCELLED
    assert not (world.settings.artifacts / "job1").exists()


async def test_a_node_leaves_a_job_that_was_moved_before_it_came(world: World) -> None:
    await world.give("gone")
    fence = Moved(record_id="m", task="gone", slot="a", gateway="g")
    subject = subjects.state("a", "gone")
    await world.bus.append(subjects.state_stream("a"), subject, encode(fence), last_on_subject=0)
    node = world.node().start()
    await world.until(world.lease, 60, "no lease")
    await world.give("next", steps=3, step_s=0.01)
    assert (await world.result("next")).status is ResultStatus.SUBMITTED
    assert await world.chain("gone") == [fence]
    assert not (node.folder / "runs" / "gone").exists()
