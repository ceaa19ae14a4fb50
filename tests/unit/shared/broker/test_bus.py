from __future__ import annotations

from typing import Any

import pytest

from shared.broker.bus import REQUEST_TIMEOUT_S, Bus, Record
from shared.errors import BusTimeoutError


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
