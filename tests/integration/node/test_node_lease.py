"""Lease and chain against a real broker: epochs, takeover, lost answers, fencing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError, BusTimeoutError
from shared.messages.hardware import Hardware
from shared.messages.jobs import Claimed
from shared.messages.slots import decode_lease
from shared.settings import Settings
from trainer_node.job.state_chain import Chain, FencedError
from trainer_node.lease import LeaseLostError, SlotLease

CPU = Hardware(device="cpu", count=1, memory_bytes=2**30)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def quick(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(lease_ttl_s=1, lease_trust_s=0.8, lease_renew_s=0.2)


def lose_next_answer(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next append is stored, but its answer never comes."""
    append = bus.append

    async def stored_unheard(*arguments: Any, **options: Any) -> int:
        monkeypatch.setattr(bus, "append", append)
        await append(*arguments, **options)
        raise BusTimeoutError("the answer was lost")

    monkeypatch.setattr(bus, "append", stored_unheard)


async def held(bus: Bus, settings: Settings, node: str = "one", **options: Any) -> SlotLease:
    lease = SlotLease(bus, settings, node, CPU, **options)
    await lease.turn()
    return lease


async def stored(bus: Bus) -> tuple[int, str, int]:
    """Revision, node and epoch in the bucket."""
    record = await bus.last(subjects.LEASES_STREAM, subjects.lease("a"))
    assert record is not None
    value = decode_lease(record.data)
    return record.sequence, value.node, value.epoch


async def test_the_epoch_is_the_creations_revision_and_stays(bus: Bus, settings: Settings) -> None:
    lease = await held(bus, settings)
    assert await stored(bus) == (lease.epoch, "one", 0)
    await lease.turn()
    await lease.turn()
    assert await stored(bus) == (lease.epoch + 2, "one", lease.epoch)
    assert lease.may_write()


async def test_another_node_waits_until_the_lease_lapses(bus: Bus, quick: Settings) -> None:
    first = await held(bus, quick)
    second = await held(bus, quick, "two")
    assert (second.epoch, second.holder, second.may_write()) == (0, "one", False)
    await asyncio.sleep(1.6)
    await second.turn()
    assert second.epoch > first.epoch
    assert second.holder is None
    await first.turn()  # its next renewal reports it
    assert (first.epoch, first.holder) == (0, "two")


async def test_a_node_takes_its_own_lease_over_at_once_as_a_new_epoch(bus: Bus, settings: Settings) -> None:
    before = await held(bus, settings)
    after = await held(bus, settings)
    assert after.epoch > before.epoch
    await before.turn()
    assert before.epoch == 0


async def test_a_released_lease_is_free_at_once(bus: Bus, settings: Settings) -> None:
    first = await held(bus, settings)
    await first.release()
    assert not first.may_write()
    record = await bus.last(subjects.LEASES_STREAM, subjects.lease("a"))
    assert record is not None
    assert record.data == b""
    second = await held(bus, settings, "two")
    assert second.may_write()


async def test_a_renewal_that_was_cut_off_does_not_keep_the_lease_from_being_released(
    bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = await held(bus, settings)
    lose_next_answer(bus, monkeypatch)
    with pytest.raises(BusTimeoutError):
        await lease.turn()
    await lease.release()
    record = await bus.last(subjects.LEASES_STREAM, subjects.lease("a"))
    assert record is not None
    assert record.data == b""


async def test_a_lost_lease_is_not_released_from_under_another(bus: Bus, quick: Settings) -> None:
    first = await held(bus, quick)
    await asyncio.sleep(1.6)
    await held(bus, quick, "two")
    await first.release()
    assert (await stored(bus))[1] == "two"


async def test_a_renewal_whose_answer_is_lost_is_recognised(
    bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = await held(bus, settings)
    epoch = lease.epoch
    lose_next_answer(bus, monkeypatch)
    with pytest.raises(BusTimeoutError):
        await lease.turn()
    await lease.turn()  # refused: adopts the revision
    await lease.turn()  # renews on it
    assert lease.epoch == epoch
    assert await stored(bus) == (epoch + 2, "one", epoch)


async def test_a_creation_whose_answer_is_lost_is_settled_by_a_new_epoch(
    bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = SlotLease(bus, settings, "one", CPU)
    lose_next_answer(bus, monkeypatch)
    with pytest.raises(BusTimeoutError):
        await lease.turn()
    assert not lease.may_write()
    await lease.turn()
    assert await stored(bus) == (lease.epoch, "one", 0)


async def test_trust_ends_before_the_lease_does(bus: Bus, settings: Settings) -> None:
    clock = Clock()
    lease = await held(bus, settings, clock=clock)
    clock.now = settings.lease_trust_s - 0.01
    assert lease.may_write()
    clock.now = settings.lease_trust_s
    assert not lease.may_write()
    with pytest.raises(LeaseLostError, match="slot a"):
        lease.must_hold()
    await lease.turn()
    assert lease.may_write()


async def test_of_many_nodes_one_holds(bus: Bus, settings: Settings) -> None:
    leases = await asyncio.gather(*(held(bus, settings, f"n{number}") for number in range(10)))
    assert sum(lease.may_write() for lease in leases) == 1


async def test_it_is_kept_over_a_restart_of_the_broker(bus: Bus, settings: Settings, broker: Broker) -> None:
    lease = await held(bus, settings)
    epoch = lease.epoch
    bus.on_reconnect(lease.wake.set)
    keeping = asyncio.create_task(lease.keep())
    await broker.stop(kill=True)
    await asyncio.sleep(0.3)
    with pytest.raises(BusError):
        await lease.turn()
    await broker.start()
    async with asyncio.timeout(60):
        while (await stored_or_none(bus)) in (None, epoch):
            await asyncio.sleep(0.05)
    assert (lease.epoch, lease.may_write()) == (epoch, True)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def stored_or_none(bus: Bus) -> int | None:
    try:
        return (await stored(bus))[0]
    except BusError:
        return None


def claim(record_id: str, epoch: int = 1) -> Claimed:
    return Claimed(record_id=record_id, task="t", slot="a", node="one", epoch=epoch, attempt=1)


async def test_the_chain_knows_its_own_record_when_the_answer_is_lost(
    bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(bus, await held(bus, settings), "t")
    assert await chain.read() is None
    lose_next_answer(bus, monkeypatch)
    await chain.append(claim("first"))
    await chain.append(claim("second"))
    assert await chain.read() == claim("second")
    assert len(await bus.read(subjects.state_stream("a"), after=0)) == 2


async def test_a_foreign_record_fences(bus: Bus, settings: Settings) -> None:
    lease = await held(bus, settings)
    stale, heir = Chain(bus, lease, "t"), Chain(bus, lease, "t")
    await stale.append(claim("stale"))
    await heir.read()
    await heir.append(claim("heir"))
    with pytest.raises(FencedError):
        await stale.append(claim("late"))
    assert await heir.read() == claim("heir")


async def test_nothing_is_written_without_a_confirmed_lease(bus: Bus, settings: Settings) -> None:
    clock = Clock()
    chain = Chain(bus, await held(bus, settings, clock=clock), "t")
    clock.now = settings.lease_trust_s
    with pytest.raises(LeaseLostError):
        await chain.append(claim("late"))
    assert await chain.read() is None
