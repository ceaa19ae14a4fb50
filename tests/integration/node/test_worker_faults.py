"""Workers that die, hang, can't start, or outlive their node: the job is resumed, and counted right."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
from pathlib import Path

from shared.messages.jobs import ResultStatus
from tests.integration.node.conftest import QUICK, SCRIPTED_WORKER, World, claims
from trainer_node.job.reconciler import RESTART_PAUSE_S


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
    """One death is counted once, and claimed once, however often the start after it fails."""
    program = tmp_path / "worker"
    real = shlex.join([sys.executable, str(SCRIPTED_WORKER)])

    def install(body: str) -> None:
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)

    install('rm "$0"; exit 1')  # then the program is gone
    node = world.node(worker_command=json.dumps([str(program)])).start()
    await world.give(steps=3)

    async def claimed_again() -> bool:
        return len(claims(await world.chain())) == 2

    await world.until(claimed_again, 60, "the death was not counted")
    await asyncio.sleep(4 * (RESTART_PAUSE_S + QUICK["poll_s"]))  # four starts that fail
    install(f'exec {real} "$@"')
    assert (await world.result()).status is ResultStatus.SUBMITTED
    assert [claim.attempt for claim in claims(await world.chain())] == [1, 2]
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


async def test_a_finished_run_whose_progress_can_not_be_read_is_submitted(world: World) -> None:
    node = world.node().start()
    await world.give(steps=20)
    await world.trained(node, 5)
    await node.kill()
    run = node.folder / "runs" / "job1"
    await world.exists(run / "outcome.json")
    (run / "progress.jsonl").unlink()
    (run / "progress.jsonl").symlink_to("progress.jsonl")  # "too many levels", for root too
    node.start()
    assert (await world.result(timeout_s=30)).status is ResultStatus.SUBMITTED
    assert node.log.count("the worker's progress can't be read") == 1
