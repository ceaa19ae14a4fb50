"""The gateway process ends when one of its parts fails, instead of going on without it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.api.access import Guard
from gateway.connections import Connections
from gateway.server import listening_socket, running
from shared.settings import Settings


@pytest.mark.parametrize(("part", "method"), [(Connections, "watch"), (Guard, "follow")])
async def test_a_part_that_fails_ends_the_gateway(
    part: type, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(part, method, fail)
    settings = Settings(data_dir=str(tmp_path), gateway_port=0, nats_url="nats://127.0.0.1:1")
    with pytest.raises(RuntimeError, match="a fault"):
        async with running(settings, listening_socket(settings)) as (_, work), asyncio.timeout(20):
            await work
