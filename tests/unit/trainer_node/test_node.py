"""When a node looks for work."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.broker.bus import Bus
from shared.messages import Hardware, Job
from shared.settings_sources import load_settings
from trainer_node.node import Node


@pytest.fixture
async def node(tmp_path: Path) -> Node:
    """One that holds its lease, on a bus that nobody connected."""
    settings = load_settings({}, data_dir=str(tmp_path), slot="a", node_dir=str(tmp_path / "node"))
    node = Node(settings, Bus(Client()), "n", Hardware(device="cpu", count=1, memory_bytes=2**30))
    node.lease.epoch, node.lease._confirmed_at = 1, time.monotonic()
    return node


async def _looks(node: Node, monkeypatch: pytest.MonkeyPatch, *, event: str = "") -> int:
    """How often the node looks for work in .4 s in which there is none."""
    looks = 0

    async def nothing_yet() -> Job | None:
        nonlocal looks
        looks += 1
        return None

    monkeypatch.setattr(node, "_newest_job", nothing_yet)
    if event == "job":
        await node._heard(Msg(node.bus.client))
    elif event == "reconnect":
        node._alert()
    work = asyncio.create_task(node._work())
    await asyncio.sleep(0.4)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return looks


async def test_without_a_word_it_waits_for_its_next_poll(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await _looks(node, monkeypatch) == 1


@pytest.mark.parametrize("event", ["job", "reconnect"])
async def test_a_job_that_can_not_be_read_yet_is_looked_for_again(
    event: str, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await _looks(node, monkeypatch, event=event) > 1
