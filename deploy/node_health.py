"""Health check of a trainer container: exit 0 if a heartbeat of this container's node arrives in time.

The broker must deliver it, so a node that hangs or has lost the broker is not healthy.
"""

from __future__ import annotations

import asyncio
import sys

from shared import subjects
from shared.broker.connection import connect
from shared.broker.credentials import trainer
from shared.errors import PodiumError
from shared.messages.slots import decode_heartbeat
from shared.settings import Settings
from shared.settings_sources import load_settings

PATIENCE_S = 4.0  # shorter than the health check's own timeout


async def is_alive(settings: Settings, node: str) -> bool:
    """Return whether a heartbeat of `node` arrives in time."""
    beat = asyncio.Event()

    async def receive(message: object) -> None:
        data: bytes = getattr(message, "data", b"")
        if decode_heartbeat(data).node == node:
            beat.set()

    bus = await connect(settings, name="health check", user=trainer(settings.slot))
    try:
        await bus.subscribe(subjects.heartbeat(settings.slot), receive)
        await asyncio.wait_for(beat.wait(), PATIENCE_S)
    except TimeoutError:
        return False
    finally:
        await bus.close()
    return True


def main() -> int:
    """Return 0 if healthy; else print the reason and return 1."""
    try:
        settings = load_settings()
        node = (settings.node / "node_id").read_text().strip()
        if asyncio.run(is_alive(settings, node)):
            return 0
        print(f"no heartbeat of node {node} on slot {settings.slot}")
    except (PodiumError, OSError) as error:
        print(error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
