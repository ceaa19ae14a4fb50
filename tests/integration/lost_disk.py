"""A broker that has lost its disk, or died while it wrote to it."""

from __future__ import annotations

import shutil

from podium.local.nats_server import Broker


def remove_store(broker: Broker) -> None:
    """Delete the broker's store; it must be stopped."""
    shutil.rmtree(broker.folder / "jetstream")


def break_config_file(broker: Broker, stream: str) -> None:
    """Leave a stream's configuration as a broker does that dies between its two files; it must be stopped."""
    (checksum,) = broker.folder.glob(f"jetstream/jetstream/*/streams/{stream}/meta.sum")
    checksum.write_text("0123456789abcdef")
