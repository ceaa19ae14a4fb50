"""Fixtures for every test: a real nats-server of its own, a connected bus, settings in a temporary folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from podium.local.nats_server import Broker
from shared import net
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.streams import bootstrap
from shared.settings import Settings
from shared.settings_sources import load_settings

# The machine may be busy: a test that needs longer than 200 ms for one example is not wrong.
hypothesis.settings.register_profile("podium", deadline=None)
hypothesis.settings.load_profile("podium")

# Each process of a parallel run takes ports from a part of its own: a broker that is down for a moment must
# find its port free again (2 of 800 tests that restart a broker failed without it).
WORKER, WORKERS = (os.environ.get(f"PYTEST_XDIST_WORKER{name}", "") for name in ("", "_COUNT"))
if WORKER:
    net._turn = itertools.count(int(WORKER.lstrip("gw")) * (net.HIGHEST - net.LOWEST) // int(WORKERS))

DATA = Path(__file__).parent / "data"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    broker = Broker(tmp_path / "nats")
    await broker.start()
    yield broker
    await broker.stop(kill=True)


@pytest.fixture
def make_settings(broker: Broker, tmp_path: Path) -> Callable[..., Settings]:
    def make(**overrides: Any) -> Settings:
        values: dict[str, Any] = {
            "nats_url": broker.url,
            "data_dir": str(tmp_path / "data"),
            "log_max_bytes": 64 << 20,
            "gateway_port": 0,
            "expected_hardware": "cpu",
            "hardware": "cpu",
            "hub_look_s": 0.0,
        }
        return load_settings({}, **(values | overrides))

    return make


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


@pytest.fixture
async def bus(settings: Settings) -> AsyncIterator[Bus]:
    """Connected, with every stream in place."""
    bus = await connect(settings, name="test")
    await bootstrap(bus, settings)
    yield bus
    await bus.close()
