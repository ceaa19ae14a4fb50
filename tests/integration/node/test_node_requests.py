"""What operators ask of a real node: its worker ends, nothing is counted, a finished task stays finished."""

from __future__ import annotations

from typing import Any

import pytest

from shared import subjects
from shared.broker.bus import Bus
from shared.errors import NobodyAnswersError
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, Result, ResultStatus
from shared.messages.slots import Control, ControlAnswer, ControlKind, decode_control_answer


async def ask(bus: Bus, kind: ControlKind, task: str = "job1", timeout_s: float = 60) -> ControlAnswer:
    request = encode(Control(kind=kind, task=task, gateway="test"))
    return decode_control_answer(
        (await bus.request(subjects.control("a"), request, timeout_s=timeout_s)).data
    )


async def until_claimed(world: Any, attempt: int, times: int = 1) -> None:
    async def there() -> bool:
        claims = [record for record in await world.chain() if isinstance(record, Claimed)]
        return sum(claim.attempt == attempt for claim in claims) >= times

    await world.until(there, 60, f"no claim of attempt {attempt}")


async def test_a_cancelled_jobs_worker_ends_and_the_next_job_has_the_slot(world: Any) -> None:
    node = world.node().start()
    await world.give(steps=1000)
    await world.trained(node, 3)
    last = await world.bus.last(subjects.state_stream("a"), subjects.state("a", "job1"))
    result = Result(record_id="r", task="job1", task_id="job1", slot="a", status=ResultStatus.CANCELLED)
    await world.bus.append(
        subjects.state_stream("a"), subjects.state("a", "job1"), encode(result), last_on_subject=last.sequence
    )
    assert (await ask(world.bus, ControlKind.LOOK)).done
    await world.give("job2", steps=2)
    assert (await world.result("job2")).status is ResultStatus.SUBMITTED
    assert [type(record) for record in await world.chain()] == [Claimed, Result]
    released = [line["task"] for line in node.slot_log() if line["event"] == "released"]
    assert released == ["job1", "job2"]
    assert not (world.settings.artifacts / "job1").exists()


async def test_a_requeued_job_goes_on_from_its_checkpoint_with_attempts_from_1(world: Any) -> None:
    node = world.node(max_attempts=1000).start()
    # dies at step 8 again and again, before there is a newer checkpoint than that of step 5
    await world.give(steps=60, die_at=8, checkpoint_every=5, seconds=600)
    await until_claimed(world, 2)
    assert await ask(world.bus, ControlKind.REQUEUE) == ControlAnswer(True)
    claims = [record for record in await world.chain() if isinstance(record, Claimed)]
    again = [number for number, claim in enumerate(claims) if claim.attempt == 1][-1]
    assert claims[again - 1].attempt >= 2
    assert claims[again].step >= 5
    assert node.worker().attempt <= 1 + len(claims) - again


async def test_a_requeue_survives_a_kill_of_the_node_and_finished_tasks_are_refused(world: Any) -> None:
    node = world.node(stop_grace_s=1).start()
    await world.give(steps=20, hang_at=12, checkpoint_every=5, seconds=600)
    await world.trained(node, 11)
    first = node.worker().pid
    assert (await ask(world.bus, ControlKind.REQUEUE)).done
    await node.kill()
    assert node.worker().pid != first
    node.start()
    result = await world.result(timeout_s=60)
    assert result.status is ResultStatus.SUBMITTED
    claims = [record for record in await world.chain() if isinstance(record, Claimed)]
    assert {claim.attempt for claim in claims} == {1}
    assert not (await ask(world.bus, ControlKind.REQUEUE)).done
    assert (await world.chain())[-1] == result


async def test_only_the_node_that_holds_the_slot_answers(world: Any) -> None:
    with pytest.raises(NobodyAnswersError):
        await ask(world.bus, ControlKind.LOOK)
    first, second = world.node("one").start(), world.node("two")
    await world.give(steps=1000)
    await world.trained(first, 1)
    second.start()
    await world.until(lambda: _says(second, "waiting as standby"), 60, "no standby")
    assert (await ask(world.bus, ControlKind.REQUEUE)).done
    assert "asked to requeue" in first.log
    assert "asked to requeue" not in second.log


async def _says(node: Any, text: str) -> bool:
    return node.log_file.exists() and text in node.log
