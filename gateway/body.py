"""A request's body, up to a size."""

from __future__ import annotations

from aiohttp import web


async def read_body(request: web.Request, limit: int) -> bytes:
    """The whole body; raises HTTPRequestEntityTooLarge as soon as it is known to be larger than `limit`."""
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=request.content_length)
    try:
        return await request.read()
    except (web.RequestPayloadError, ConnectionError) as error:  # of no form that HTTP has, or cut off
        raise web.HTTPBadRequest(text=f"the body could not be read: {error}") from error
