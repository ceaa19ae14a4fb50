"""A broker that has lost its disk."""

from __future__ import annotations

import shutil

from podium.local.nats_server import Broker


def remove_store(broker: Broker) -> None:
    """Delete the broker's store; it must be stopped."""
    shutil.rmtree(broker.folder / "jetstream")
