from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shared.broker.bus import REQUEST_TIMEOUT_S, Bus, Record
from shared.broker.credentials import NOBODY
from shared.broker.stream_requests import delete_stream, find_stream, subjects_in
from shared.errors import BusTimeoutError, BusUnavailableError


class FakeBus(Bus):
    """A stream of so many records, of which one read returns two; a read after `broken` fails."""

    def __init__(self, records: int, broken: int | None = None) -> None:
        self._records, self._broken = records, broken
        self.reads: list[tuple[Any, ...]] = []

    async def read(
        self, stream: str, after: int, *, subject: str = ">", timeout_s: float = REQUEST_TIMEOUT_S
    ) -> list[Record]:
        self.reads.append((stream, after, subject, timeout_s))
        if after == self._broken:
            raise BusTimeoutError("no answer")
        last = min(after + 2, self._records)
        return [Record(number, "subject", b"") for number in range(after + 1, last + 1)]


async def test_read_all_reads_to_the_end_of_the_stream() -> None:
    bus = FakeBus(5)
    found = [[each.sequence for each in records] async for records in bus.read_all("S", subject="a.>")]
    assert found == [[1, 2], [3, 4], [5]]
    assert bus.reads == [("S", after, "a.>", REQUEST_TIMEOUT_S) for after in (0, 2, 4, 5)]


async def test_read_all_yields_what_was_read_before_it_fails() -> None:
    batches = FakeBus(5, broken=3).read_all("S", 1, timeout_s=0.5)
    assert [each.sequence for each in await anext(batches)] == [2, 3]
    with pytest.raises(BusTimeoutError):
        await anext(batches)


DEEP = b'{"more": ' + b"[" * 100_000


class AnsweringBus(Bus):
    """A broker that answers every request with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self._answer_data = answer
        self.user = NOBODY

    async def request(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(data=self._answer_data)


@pytest.mark.parametrize("answer", [b"", b"{", DEEP, b'{"stream": "\xff"}', b"[]", b"{}"])
async def test_an_append_with_an_answer_that_can_not_be_read_may_be_stored(answer: bytes) -> None:
    with pytest.raises(BusTimeoutError, match="no answer that can be read"):
        await AnsweringBus(answer).append("S", "subject", b"")


@pytest.mark.parametrize("answer", [b"", b"{", DEEP, b"[]"])
async def test_an_answer_about_a_stream_that_can_not_be_read_says_nothing_of_it(answer: bytes) -> None:
    bus = AnsweringBus(answer)
    for asked in (find_stream(bus, "S"), subjects_in(bus, "S"), delete_stream(bus, "S")):
        with pytest.raises(BusUnavailableError, match="the answer can't be read"):
            await asked


async def test_a_refused_append_is_not_a_lost_one() -> None:
    refusal = b'{"error": {"code": 503, "description": "no storage"}}'
    with pytest.raises(BusUnavailableError, match="can't store now"):
        await AnsweringBus(refusal).append("S", "subject", b"")
