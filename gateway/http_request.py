"""A request's body, up to a size."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

BODY_S: Final = 10.0  # as long as upstream waits for an answer


async def read_body(request: web.Request, limit: int) -> bytes:
    """The whole body.

    Raises HTTPRequestEntityTooLarge as soon as it is known to be larger than `limit`, HTTPRequestTimeout if
    it isn't here in time (anybody may open connections; a held body holds memory), and HTTPBadRequest.
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
    except (web.RequestPayloadError, ConnectionError) as error:  # of no form that HTTP has, or cut off
        raise web.HTTPBadRequest(text=f"the body could not be read: {error}") from error
