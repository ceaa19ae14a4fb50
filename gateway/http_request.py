"""Read a request's body, up to a size, and judge whether a request comes from this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from aiohttp import web

from shared.net import is_loopback

FORWARDED: Final = ("X-Forwarded-For", "Forwarded")
BODY_S: Final = 10.0  # as long as upstream waits for an answer


async def read_body(request: web.Request, limit: int) -> bytes:
    """Return the whole body.

    Raises HTTPRequestEntityTooLarge as soon as it is known to be larger than `limit`, HTTPRequestTimeout if
    it doesn't arrive in time (anybody may connect, and a held body holds memory), and HTTPBadRequest.
    """
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=request.content_length)
    try:
        if request.content.is_eof():  # it came with the head, as most do: a timer costs 3% of an offer
            return await request.read()
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(text=f"the body took more than {BODY_S:g} s") from error
    except (web.RequestPayloadError, ConnectionError) as error:  # malformed, or cut off
        raise web.HTTPBadRequest(text=f"the body could not be read: {error}") from error


def why_foreign(headers: Mapping[str, str]) -> str | None:
    """Return why a request to a loopback socket is not this machine's own; None if it seems to be.

    A page whose name resolves to 127.0.0.1 (DNS rebinding) sends that name as Host.
    """
    host = headers.get("Host", "")
    if host and not is_own_host(host):
        return f"the request is for {host[:100]!r}, not for a loopback address"
    for name in FORWARDED:
        if name in headers:
            return f"the request came through a proxy ({name})"
    return None


@lru_cache(maxsize=64)
def is_own_host(host: str) -> bool:
    """Return whether a Host header names a loopback address."""
    name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower() == "localhost" or is_loopback(name)
