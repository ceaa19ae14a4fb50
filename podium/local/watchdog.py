"""See from outside that a broker no longer works though its process lives.

A nats-server that could not write (disk full, I/O error) freezes that stream: connections stay, core messages
flow, appends time out, /healthz says "write error". Room on the disk doesn't thaw it, a new start does;
nothing that was acknowledged is lost by it. A stopped or stuck server doesn't answer at all.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Final

POLL_S: Final = 1.0
ANSWER_S: Final = 5.0  # on loopback; a machine under load may take long to answer
WRITE_ERROR: Final = "write error"


async def until_broken(monitor_port: int, patience_s: float) -> str:
    """Return why the broker must be started again, once that has been so for `patience_s`."""
    since: float | None = None
    while True:
        asked = time.monotonic()
        trouble = await trouble_of(monitor_port)
        since = (asked if since is None else since) if trouble else None
        if since is not None and time.monotonic() - since >= patience_s:
            return f"{trouble} for {time.monotonic() - since:.0f} s"
        await asyncio.sleep(min(POLL_S, patience_s / 4))


async def trouble_of(monitor_port: int) -> str | None:
    """What a new start would cure, or None. A port that nobody listens on is a broker that starts or ends."""
    try:
        async with asyncio.timeout(ANSWER_S):
            body = await _get(monitor_port, "/healthz")
    except TimeoutError:
        return "doesn't answer"
    except OSError:
        return None
    try:
        error = json.loads(body).get("error", "")
    except ValueError:  # broken off: it ends
        return None
    return f"can't store ({error})" if WRITE_ERROR in error else None


async def _get(port: int, path: str) -> bytes:
    """The body of an HTTP answer, whatever its status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return body
    finally:
        writer.close()
