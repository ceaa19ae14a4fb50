"""A TCP link to a broker that loses what the broker says, or breaks; the broker stays well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from shared.net import LOOPBACK


class LossyLink:
    """What goes between clients and the broker."""

    def __init__(self, url: str) -> None:
        self.deaf = False  # what the broker says is lost
        self.url = ""
        self._port = urlsplit(url).port
        self._ends: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Reset all connections; new ones are well."""
        self.deaf = False
        for end in self._ends:
            end.transport.abort()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect a client to the broker until either ends."""
        from_broker, to_broker = await asyncio.open_connection(LOOPBACK, self._port)
        ends = {writer, to_broker}
        self._ends |= ends
        try:
            await asyncio.gather(self._pass(reader, to_broker), self._pass(from_broker, writer, hears=True))
        finally:
            self._ends -= ends

    async def _pass(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, hears: bool = False
    ) -> None:
        try:
            while data := await source.read(1 << 16):
                if not (hears and self.deaf):
                    target.write(data)
        except OSError:
            pass
        target.close()


@asynccontextmanager
async def lossy_link(url: str) -> AsyncIterator[LossyLink]:
    """Put a link in front of the broker at `url`."""
    link = LossyLink(url)
    server = await asyncio.start_server(link.accept, LOOPBACK, 0)
    link.url = f"nats://{LOOPBACK}:{server.sockets[0].getsockname()[1]}"
    try:
        yield link
    finally:
        server.close()
        link.cut()
