"""Requests that come together are spread over the loop's turns, in their order."""

from __future__ import annotations

import asyncio
from collections import Counter

from gateway.api.throttle import LoopThrottle


async def passed(count: int, most: int) -> list[tuple[int, int]]:
    """Which request passed in which turn of the loop."""
    throttle, now, order = LoopThrottle(most), 0, list[tuple[int, int]]()

    async def ask(number: int) -> None:
        await throttle.take()
        order.append((number, now))

    asked = [asyncio.create_task(ask(number)) for number in range(count)]
    while not all(task.done() for task in asked):
        now += 1
        await asyncio.sleep(0)
    return order


async def test_so_many_pass_in_a_turn_first_come_first_served() -> None:
    order = await passed(100, most=3)
    assert [number for number, _ in order] == list(range(100))
    assert (
        max(Counter(turn for _, turn in order).values()) <= 2 * 3
    )  # one's own turn, and who was let in before it
    assert order[-1][1] >= 100 // 6


async def test_what_comes_alone_passes_at_once() -> None:
    throttle = LoopThrottle(1)
    for _ in range(5):
        async with asyncio.timeout(0.0):  # would end at the first turn that is waited for
            await throttle.take()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_who_gives_up_takes_nobody_s_turn() -> None:
    throttle = LoopThrottle(1)
    await throttle.take()
    tasks = [asyncio.create_task(throttle.take()) for _ in range(4)]
    await asyncio.sleep(0)
    assert not tasks[2].done()
    tasks[2].cancel()
    async with asyncio.timeout(1):
        await asyncio.gather(tasks[0], tasks[1], tasks[3])
    assert tasks[2].cancelled()
