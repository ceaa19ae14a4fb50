"""What surrounds every handler: tracking, the throttle, errors as problems, the time it took."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from gateway.api.problems import problem_of
from gateway.api.routing import RUNNING, SERVICE, THROTTLE, URGENT, Handler
from gateway.errors import MalformedOfferError


@web.middleware
async def serve(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Handle every request: track it while it runs, turn errors into problems, measure it."""
    began, app = time.perf_counter(), request.app
    answered = asyncio.get_running_loop().create_future()
    app[RUNNING].add(answered)
    service, connection = app[SERVICE], request.protocol
    service.connections.begin(connection, request.content)
    try:
        if request.match_info.route not in app[URGENT]:
            await app[THROTTLE].take()
        response = await handler(request)
    except Exception as error:
        if isinstance(error, MalformedOfferError):
            service.measures.malformed_offers += 1
        response = problem_of(request, error, service.settings.max_body_bytes)
    finally:
        app[RUNNING].discard(answered)
        service.connections.end(connection)
        answered.set_result(None)
    if isinstance(response, web.Response):  # not for a stream, whose duration means nothing
        seconds = time.perf_counter() - began
        service.measures.answered(request.match_info.route, response.status, seconds)
    return response
