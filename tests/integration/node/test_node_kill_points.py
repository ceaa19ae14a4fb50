"""A life that ends exactly between two steps: the next one finds what is stored and ends the task once."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.bus import Bus
from shared.messages import Claimed, Hardware, Job, ResultStatus, StateRecord, Submitting
from shared.settings import Settings
from trainer_node.assignment import Assignment
from trainer_node.lease import SlotLease
from trainer_node.post import Post
from trainer_node.steps import Deliver, Done, Start, Submit, Watch
from trainer_node.supervisor import Supervisor

WORKER = Path(__file__).parents[1] / "scripted_worker.py"
CPU = Hardware(device="cpu", count=1, memory_bytes=2**30)


class KilledError(Exception):
    """Stands for kill -9: nothing after it runs."""


async def new_life(bus: Bus, settings: Settings, job: Job, node: str = "one") -> Assignment:
    """A node that has just come up: new lease, adopted worker, empty memory."""
    lease = SlotLease(bus, settings, node, CPU)
    await lease.turn()
    supervisor = Supervisor(settings, 1, worker_command=(sys.executable, str(WORKER)))
    await supervisor.adopt()
    post = Post(settings, bus, lease, supervisor, node, CPU, wake=asyncio.Event(), draining=asyncio.Event())
    return Assignment(post, job)


async def live_until(assignment: Assignment, last: type[Any]) -> None:
    """Take turns until one of the wanted kind is done."""
    async with asyncio.timeout(20):
        while not isinstance(await assignment._turn(), last):
            await assignment.post.lease.turn()
            await asyncio.sleep(0.02)


async def prepared(world, **knobs: Any) -> tuple[Settings, Job]:
    job = await world.give(**({"steps": 5, "step_s": 0.02} | knobs))
    settings = node_settings(world, "one")
    settings.node.mkdir(parents=True)
    return settings, job


def node_settings(world, name: str) -> Settings:
    folder = str(world.folder / "nodes" / name)
    return world.make_settings(
        node_dir=folder,
        dataset_roots=(str(world.knobs),),
        lease_ttl_s=2,
        lease_trust_s=1.5,
        lease_renew_s=0.5,
        poll_s=0.5,
    )


async def finished(world, settings: Settings, job: Job) -> list[StateRecord]:
    """The next life sees the task through; one result, naming what is stored."""
    await live_until(await new_life(world.bus, settings, job), Done)
    result = await world.result()
    assert result.status is ResultStatus.SUBMITTED
    assert result.digest == world.submitted()
    return await world.chain()


@pytest.mark.parametrize(
    ("point", "claims", "submittings"),
    [(Start, 2, 1), (Watch, 2, 1), (Submit, 1, 2), (Deliver, 1, 1), (Done, 1, 1)],
    ids=["after start", "while training", "after submitting", "after the result", "after cleaning up"],
)
async def test_killed_after(world, point: type[Any], claims: int, submittings: int) -> None:
    settings, job = await prepared(world)
    await live_until(await new_life(world.bus, settings, job), point)
    chain = await finished(world, settings, job)
    assert sum(isinstance(record, Claimed) for record in chain) == claims
    assert sum(isinstance(record, Submitting) for record in chain) == submittings
    assert sum(isinstance(record, Claimed) and record.attempt != 1 for record in chain) == 0


async def test_killed_after_the_claim(world, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, job = await prepared(world)
    life = await new_life(world.bus, settings, job)

    async def killed(*_: object) -> None:
        raise KilledError

    monkeypatch.setattr(life.post.supervisor, "start", killed)
    with pytest.raises(KilledError):
        await life._turn()
    first, second, *_ = await finished(world, settings, job)
    assert isinstance(first, Claimed)
    assert isinstance(second, Claimed)
    assert (second.attempt, second.epoch > first.epoch) == (1, True)


async def killed_after_the_store(world, monkeypatch: pytest.MonkeyPatch) -> tuple[Settings, Job]:
    settings, job = await prepared(world)
    life = await new_life(world.bus, settings, job)
    await live_until(life, Submit)

    async def killed(*_: object, **__: object) -> None:
        raise KilledError

    monkeypatch.setattr(life, "_end", killed)
    with pytest.raises(KilledError):
        await life._turn()
    return settings, job


async def test_killed_after_the_store(world, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, job = await killed_after_the_store(world, monkeypatch)
    stored = world.submitted()
    chain = await finished(world, settings, job)
    assert [type(record).__name__ for record in chain] == ["Claimed", "Submitting", "Result"]
    assert chain[-1].digest == stored
    assert chain[-1].metrics is not None


async def test_another_node_after_the_store_names_what_is_there(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own folder knows nothing of the run, and it trains nothing."""
    _, job = await killed_after_the_store(world, monkeypatch)
    stored = world.submitted()
    other = node_settings(world, "two")
    other.node.mkdir()
    await asyncio.sleep(2.5)  # the dead node's lease
    life = await new_life(world.bus, other, job, node="two")
    await live_until(life, Done)
    result = await world.result()
    assert (result.node, result.digest, result.metrics) == ("two", stored, None)
    assert life.post.supervisor.worker is None


async def test_an_export_damaged_before_the_store_is_made_again(world) -> None:
    settings, job = await prepared(world)
    life = await new_life(world.bus, settings, job)
    await live_until(life, Submit)
    (life.run.path / "export" / "adapter.txt").write_text("damaged")
    chain = await finished(world, settings, job)
    assert [record.attempt for record in chain if isinstance(record, Claimed)] == [1, 2]
