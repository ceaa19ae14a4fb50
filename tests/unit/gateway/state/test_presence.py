"""Live slots by heartbeats on a clock that the test moves."""

from __future__ import annotations

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from gateway.state.presence import PROGRESS_KEPT, Presence, progress_in
from shared import subjects
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.runs import Phase, Progress
from shared.messages.slots import Heartbeat

CPU = Hardware(device="cpu", count=8, memory_bytes=64 << 30)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def presence(clock: Clock) -> Presence:
    return Presence(5.0, clock)


def heartbeat(node: str = "n", epoch: int = 3, slot: str = "a") -> Heartbeat:
    return Heartbeat(slot=slot, node=node, epoch=epoch, hardware=CPU)


def test_a_slot_is_live_until_it_was_silent_for_too_long(presence: Presence, clock: Clock) -> None:
    assert (presence.live("a"), presence.age("a"), presence.sign("a")) == (False, None, None)
    presence.note_heartbeat(heartbeat())
    clock.now += 4.9
    assert presence.live("a")
    assert not presence.live("b")
    clock.now += 0.1
    assert not presence.live("a")
    assert presence.age("a") == pytest.approx(5.0)
    presence.note_heartbeat(heartbeat())
    assert presence.live("a")


def test_a_node_without_the_lease_is_heard_but_not_live(presence: Presence) -> None:
    presence.note_heartbeat(heartbeat(epoch=0))
    assert presence.sign("a") is not None
    assert not presence.live("a")


def test_a_standby_does_not_hide_the_holder(presence: Presence, clock: Clock) -> None:
    presence.note_heartbeat(heartbeat("holder", epoch=3))
    presence.note_heartbeat(heartbeat("standby", epoch=0))
    presence.note_heartbeat(heartbeat("stale", epoch=2))
    sign = presence.sign("a")
    assert sign is not None
    assert sign.node == "holder"
    clock.now += 6
    presence.note_heartbeat(heartbeat("standby", epoch=0))
    sign = presence.sign("a")
    assert sign is not None
    assert sign.node == "standby"


def test_a_new_epoch_takes_over_at_once_and_a_drain_shows_at_once(presence: Presence) -> None:
    presence.note_heartbeat(heartbeat("one", epoch=3))
    presence.note_heartbeat(heartbeat("two", epoch=4))
    sign = presence.sign("a")
    assert sign is not None
    assert sign.node == "two"
    presence.note_heartbeat(heartbeat("two", epoch=0))
    assert not presence.live("a")


def test_the_newest_progress_is_kept_of_a_bounded_number_of_tasks(presence: Presence) -> None:
    for number in range(PROGRESS_KEPT + 1):
        presence.note_progress(Progress(task=f"t{number}", slot="a", phase=Phase.TRAIN, step=number))
    assert presence.progress("t0") is None
    newest = presence.progress(f"t{PROGRESS_KEPT}")
    assert newest is not None
    assert newest.step == PROGRESS_KEPT


@pytest.mark.parametrize(
    ("on", "says", "counts"),
    [
        (("a", "t1"), ("a", "t1"), True),
        (("b", "t1"), ("a", "t1"), False),  # of another slot, on one's own subject
        (("b", "t1"), ("b", "t1"), False),  # the job isn't there
        (("a", "t2"), ("a", "t1"), False),
        (("a", "t2"), ("a", "t2"), None),  # no job of this name
    ],
)
def test_progress_counts_for_a_job_of_its_own_slot_only(
    on: tuple[str, str], says: tuple[str, str], counts: bool | None
) -> None:
    subject, said = subjects.progress(*on), Progress(slot=says[0], task=says[1], phase=Phase.TRAIN)
    slots = {"t1": "a"}
    if counts is False:
        with pytest.raises(ValueError, match="slot a"):
            progress_in(subject, encode(said), slots.get)
    else:
        assert progress_in(subject, encode(said), slots.get) == (said if counts else None)


@pytest.mark.parametrize("data", [b"{", b"[" * 100_000, b'{"more": ' + b"[" * 100_000])
async def test_messages_that_are_nested_too_deeply_are_counted_and_skipped(
    presence: Presence, data: bytes
) -> None:
    await presence._on_heartbeat(Msg(Client(), subject=subjects.heartbeat("a"), data=data))
    await presence._on_progress(Msg(Client(), subject=subjects.progress("a", "t"), data=data))
    assert presence.malformed == 2
    assert presence.sign("a") is None
