"""A node is killed at each of eight labelled moments: the next one ends the task as if undisturbed.

Real processes, real SIGKILL: the node kills itself where `trainer_node/fault_injection.py` says.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.broker.bus import Bus
from shared.messages.hardware import Hardware
from shared.messages.jobs import Claimed, Job, ResultStatus, StateRecord
from shared.settings import Settings
from tests.integration.node.conftest import World
from trainer_node.context import NodeContext
from trainer_node.fault_injection import VARIABLE, FaultPoint
from trainer_node.job.actions import Done, Submit
from trainer_node.job.reconciler import JobReconciler
from trainer_node.lease import SlotLease
from trainer_node.worker import slot_lock
from trainer_node.worker.slot_lock import StuckError
from trainer_node.worker.supervisor import Supervisor

SOURCES = Path(__file__).parents[3] / "trainer_node"
WORKER = Path(__file__).parents[3] / "bench" / "harness" / "scripted_worker.py"
CPU = Hardware(device="cpu", count=1, memory_bytes=2**30)
STEPS = 8
# A loaded machine must not lose it, or there are more claims; a restarted node takes it over at once.
LONG_LEASE: dict[str, Any] = {"lease_ttl_s": 30, "lease_trust_s": 25}

# What the chain must hold in the end: (claims, submittings).
CHAINS = {
    FaultPoint.FOUND: (1, 1),
    FaultPoint.CLAIMED: (2, 1),
    FaultPoint.SPAWNED: (2, 1),
    FaultPoint.TRAINING: (2, 1),
    FaultPoint.READY: (2, 1),
    FaultPoint.ANNOUNCED: (1, 2),
    FaultPoint.STORED: (1, 1),
    FaultPoint.ENDED: (1, 1),
}


@pytest.mark.fault("F2")
@pytest.mark.parametrize("point", FaultPoint, ids=lambda point: f"{point}-{point.name.lower()}")
async def test_killed_at(world: World, point: FaultPoint) -> None:
    # In the middle of training means: at a look at progress that shows a step, twice a second.
    job = await world.give(steps=STEPS, step_s=0.4 if point is FaultPoint.TRAINING else 0.05)
    node = world.node(**LONG_LEASE)
    node.environment[VARIABLE] = point
    node.start()
    assert await node.wait(60) == -signal.SIGKILL
    died_with = await world.chain()
    del node.environment[VARIABLE]
    node.start()
    result = await world.result(timeout_s=60)
    assert result.status is ResultStatus.SUBMITTED
    assert result.digest == world.submitted()
    chain = await world.chain()
    assert chain[: len(died_with)] == died_with
    names = [type(record).__name__ for record in chain]
    assert (names.count("Claimed"), names.count("Submitting"), names.count("Result")) == (*CHAINS[point], 1)
    assert {record.attempt for record in chain if isinstance(record, Claimed)} == {1}
    assert world.steps(node) == list(range(1, STEPS + 1))  # not one step was trained twice
    assert result.task_id == job.task_id


def test_each_moment_is_labelled_once_where_it_is() -> None:
    text = "".join(path.read_text() for path in sorted(SOURCES.rglob("*.py")))
    assert [text.count(f"fault_point(FaultPoint.{point.name})") for point in FaultPoint] == [1] * len(
        FaultPoint
    )
    assert [point.value for point in FaultPoint] == [f"F2.{number}" for number in range(1, 9)]


class KilledError(Exception):
    """Stands for kill -9: nothing after it runs."""


async def new_life(bus: Bus, settings: Settings, job: Job, node: str = "one") -> JobReconciler:
    """A node that has just come up: new lease, adopted worker, empty memory."""
    lease = SlotLease(bus, settings, node, CPU)
    await lease.turn()
    supervisor = Supervisor(settings, 1, worker_command=(sys.executable, str(WORKER)))
    await supervisor.adopt()
    context = NodeContext(
        settings, bus, lease, supervisor, node, CPU, wake=asyncio.Event(), draining=asyncio.Event()
    )
    return JobReconciler(context, job)


async def live_until(reconciler: JobReconciler, last: type[Any]) -> None:
    """Take turns until one of the wanted kind is done."""
    async with asyncio.timeout(60):
        while not isinstance(await reconciler.act(), last):
            await reconciler.context.lease.turn()
            await asyncio.sleep(0.02)


async def prepared(world: World, **knobs: Any) -> tuple[Settings, Job]:
    job = await world.give(**({"steps": 5, "step_s": 0.02} | knobs))
    settings = node_settings(world, "one")
    settings.node.mkdir(parents=True)
    return settings, job


def node_settings(world: World, name: str) -> Settings:
    folder = str(world.folder / "nodes" / name)
    return world.make_settings(
        node_dir=folder,
        dataset_roots=(str(world.knobs),),
        lease_ttl_s=2,
        lease_trust_s=1.5,
        lease_renew_s=0.5,
        poll_s=0.5,
    )


async def finished(world: World, settings: Settings, job: Job) -> list[StateRecord]:
    """A restarted node ends the task: one result, which names what is stored."""
    await live_until(await new_life(world.bus, settings, job), Done)
    result = await world.result()
    assert result.status is ResultStatus.SUBMITTED
    assert result.digest == world.submitted()
    return await world.chain()


async def test_another_node_after_the_store_names_what_is_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own folder knows nothing of the run, and it trains nothing."""
    settings, job = await prepared(world)
    life = await new_life(world.bus, settings, job)
    await live_until(life, Submit)

    async def killed(*_: object, **__: object) -> None:
        raise KilledError

    monkeypatch.setattr(life.chain, "end", killed)
    with pytest.raises(KilledError):
        await life.act()
    stored = world.submitted()
    other = node_settings(world, "two")
    other.node.mkdir()
    await asyncio.sleep(2.5)  # the dead node's lease
    heir = await new_life(world.bus, other, job, node="two")
    await live_until(heir, Done)
    result = await world.result()
    assert (result.node, result.digest, result.metrics) == ("two", stored, None)
    assert heir.context.supervisor.worker is None


async def test_an_export_damaged_before_the_store_is_made_again(world: World) -> None:
    settings, job = await prepared(world)
    life = await new_life(world.bus, settings, job)
    await live_until(life, Submit)
    (life.run.path / "export" / "adapter.txt").write_text("damaged")
    chain = await finished(world, settings, job)
    assert [record.attempt for record in chain if isinstance(record, Claimed)] == [1, 2]


async def test_a_slot_that_stays_taken_costs_one_claim(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the kernel can't end may hold the slot for days, and the log forgets nothing."""
    monkeypatch.setattr(slot_lock, "STUCK_S", 0.1)
    settings, job = await prepared(world)
    life = await new_life(world.bus, settings, job)
    held = life.context.supervisor.lock.take()
    for _ in range(4):
        with pytest.raises(StuckError):
            await life.act()
        await life.context.lease.turn()
    assert [type(record) for record in await world.chain()] == [Claimed]
    os.close(held)
    await live_until(life, Done)
    assert len([record for record in await world.chain() if isinstance(record, Claimed)]) == 1
    assert (await world.result()).status is ResultStatus.SUBMITTED


async def test_a_claim_of_an_earlier_node_is_followed_by_ones_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_lock, "STUCK_S", 0.1)
    settings, job = await prepared(world)
    for _ in range(2):
        life = await new_life(world.bus, settings, job)
        held = life.context.supervisor.lock.take()
        for _ in range(2):
            with pytest.raises(StuckError):
                await life.act()
        os.close(held)
        await life.context.lease.release()
    chain = [record for record in await world.chain() if isinstance(record, Claimed)]
    assert len({record.epoch for record in chain}) == len(chain) == 2
