"""Detect from outside that a broker no longer works although its process is alive.

After a failed write (disk full, I/O error) a nats-server freezes that stream: connections stay open, core
messages still pass, appends time out, /healthz reports "write error". Free disk space doesn't unfreeze it, a
restart does, and loses nothing that was acknowledged. A stopped or hung server doesn't answer at all.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from shared.messages.encoding import decode
from shared.net import LOOPBACK

POLL_S: Final = 1.0
ANSWER_S: Final = 5.0  # on loopback; a loaded machine may answer slowly
WRITE_ERROR: Final = "write error"


async def until_broken(monitor_port: int, patience_s: float) -> str:
    """Return why the broker must be restarted, once that has lasted for `patience_s`."""
    since: float | None = None
    while True:
        asked = time.monotonic()
        trouble = await trouble_of(monitor_port)
        since = (asked if since is None else since) if trouble else None
        if since is not None and time.monotonic() - since >= patience_s:
            return f"{trouble} for {time.monotonic() - since:.0f} s"
        await asyncio.sleep(min(POLL_S, patience_s / 4))


async def trouble_of(monitor_port: int) -> str | None:
    """Return a fault that a restart would cure, or None. A closed port is none: it starts or stops."""
    try:
        async with asyncio.timeout(ANSWER_S):
            body = await _get(monitor_port, "/healthz")
    except TimeoutError:
        return "doesn't answer"
    except OSError:
        return None
    try:
        error = decode(body, dict[str, Any]).get("error", "")
    except ValueError:  # truncated: the broker is stopping
        return None
    return f"can't store ({error})" if WRITE_ERROR in error else None


async def _get(port: int, path: str) -> bytes:
    """Return the body of an HTTP response, whatever its status."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return body
    finally:
        writer.close()
