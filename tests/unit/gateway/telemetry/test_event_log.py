"""The event log: numbers, bounds, and where a reader goes on."""

from __future__ import annotations

import pytest

from gateway.telemetry.event_log import Choice, EventLog, EventType, UnknownIdError, frame


def filled(count: int, **bounds: int) -> EventLog:
    log = EventLog(**bounds)
    for number in range(1, count + 1):
        log.add(EventType.PROGRESS, b"%d" % number, task=f"t{number % 2}", slot="a")
    return log


def numbers(log: EventLog, after: int, most: int = 100) -> tuple[int, list[int]]:
    lost, events = log.read(after, most)
    return lost, [event.number for event in events]


def test_a_reader_gets_what_came_after_and_what_it_lost() -> None:
    log = filled(10, most_events=4)
    assert numbers(log, 10) == (0, [])
    assert numbers(log, 8) == (0, [9, 10])
    assert numbers(log, 6) == (0, [7, 8, 9, 10])
    assert numbers(log, 6, most=3) == (0, [7, 8, 9])
    assert numbers(log, 5) == (1, [7, 8, 9, 10])
    assert numbers(log, 0, most=2) == (6, [7, 8])
    assert numbers(EventLog(), 0) == (0, [])


def test_bytes_are_bounded_too() -> None:
    log = EventLog(most_bytes=1000)
    for _ in range(10):
        log.add(EventType.DECISION, b"x" * 300)
    assert log.last - log.first + 1 == 2
    log.add(EventType.DECISION, b"x" * 3000)  # larger than all that may be kept: it is lost at once
    assert (log.first, log.last) == (12, 11)
    assert numbers(log, 9) == (2, [])


def test_ids_are_of_one_life() -> None:
    log, other = filled(10, most_events=4), filled(10)
    assert log.number_of(log.id_of(3)) == 3  # too old, which `read` reports
    assert log.number_of(log.id_of(11)) is None  # this life did not say that
    assert log.number_of(other.id_of(3)) is None
    assert log.number_of("0") == 6
    for strange in ("", "7", f"{log.boot}-", f"{log.boot}-\u0663", "x" * 9, f"{log.boot}-1 "):
        with pytest.raises(UnknownIdError, match="not an event id"):
            log.number_of(strange)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(), [1, 2, 3, 4]),
        (Choice(types={EventType.PROGRESS}), [1, 2, 4]),
        (Choice(task="t0"), [2, 4]),
        (Choice(slot="b"), [3, 4]),
        (Choice(types={EventType.DECISION}, slot="b"), [3, 4]),
    ],
)
def test_choices_and_gaps_that_all_are_told(choice: Choice, expected: list[int]) -> None:
    log = filled(2)
    log.add(EventType.DECISION, b"{}", task="t9", slot="b")
    log.add_gap("cut off")
    assert [event.number for event in log.read(0, 10)[1] if choice.holds(event)] == expected
    assert log.counts == {"progress": 2, "decision": 1, "lost": 1}


def test_a_frame_is_one_event_whatever_is_in_it() -> None:
    assert frame("x", b'{\n"a": 1\r\n}', "i-1") == b'id: i-1\nevent: x\ndata: { "a": 1  }\n\n'


def test_readers_are_woken_until_they_leave() -> None:
    log, woken = EventLog(), list[int]()

    def wake() -> None:
        woken.append(log.last)

    with log.reader(wake):
        log.add(EventType.TASK, b"{}")
        log.close()
        assert log.readers == 1
    log.add(EventType.TASK, b"{}")
    assert log.readers == 0
    assert woken == [1, 1]
    assert log.closing.is_set()
