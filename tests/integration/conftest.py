"""A stand-in for a Hugging Face hub, for every integration test that needs one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.harness.fake_hub import FakeHub, Hold


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    for faults in hub.faults.values():
        for fault in faults:
            if isinstance(fault, Hold):
                fault.released.set()
    hub.close()
