"""Routes: a line of the route table, its aiohttp route, and parsing of the handler's input."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web
from msgspec import Struct

from gateway.api.access import Access, Guard
from gateway.api.problems import (
    FOREIGN,
    INTERNAL,
    MALFORMED_BODY,
    MALFORMED_QUERY,
    SLOW_BODY,
    TOO_LARGE,
    UNAUTHORIZED,
    WRONG_MEDIA_TYPE,
    Fault,
    MalformedRequestError,
)
from gateway.api.throttle import LoopThrottle
from gateway.errors import UnknownTaskError
from gateway.http_request import read_body
from gateway.service import Service
from gateway.state.ledger import Task
from shared.messages.encoding import decode
from shared.subjects import task_key

JSON: Final = "application/json"

# Shared by the handlers of one gateway.
SERVICE = web.AppKey("service", Service)
GUARD = web.AppKey("guard", Guard)
THROTTLE = web.AppKey("throttle", LoopThrottle)  # of requests that anyone may send
# The routes of offers and of upstream. Anyone may send other requests, such as thousands to /healthz or to
# unknown paths at once: of those one is served per iteration of the event loop, so that offers wait little.
URGENT = web.AppKey("urgent", set[web.AbstractRoute])
RUNNING = web.AppKey("running", set[asyncio.Future[None]])  # one future per unanswered request

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
S = TypeVar("S", bound=Struct)

_encode = msgspec.json.Encoder().encode


class Route(Struct, frozen=True):
    """One method of one path, its handler, input and output; the handler's docstring is the summary."""

    method: str
    path: str  # in OpenAPI's form: /v1/tasks/{task_id}
    handler: Handler
    answer: Any  # the type of a 200's body; None = not JSON
    body: type[Struct] | None = None
    query: type[Struct] | None = None  # one field per parameter
    faults: tuple[Fault, ...] = ()  # in addition to those that follow from the other fields
    access: Access = Access.TOKEN
    media_type: str = JSON
    tag: str = "tasks"
    body_or_list: bool = False  # whether a list of such bodies is also accepted
    urgent: bool = False  # not throttled with the other requests

    def all_faults(self) -> tuple[Fault, ...]:
        """Return every kind of problem that it can respond with."""
        found = list(self.faults)
        if self.body is not None:
            malformed = () if any(fault.status == 400 for fault in self.faults) else (MALFORMED_BODY,)
            found += [*malformed, SLOW_BODY, TOO_LARGE, WRONG_MEDIA_TYPE]
        if self.query is not None:
            found.append(MALFORMED_QUERY)
        if self.access is not Access.OPEN:
            found += [UNAUTHORIZED, FOREIGN]
        return (*found, INTERNAL)


def add_routes(app: web.Application, routes: Iterable[Route], guard: Guard) -> None:
    """Add each path with and without a trailing slash: a redirected POST would lose its body."""
    for route in routes:
        path, handler = route.path.replace("}", ":[^/]+}"), _guarded(route, guard)
        added = [app.router.add_route(route.method, each, handler) for each in (path, path + "/")]
        if route.urgent:
            app[URGENT].update(added)


def _guarded(route: Route, guard: Guard) -> Handler:
    handler, access, takes_body = route.handler, route.access, route.body is not None
    if access is Access.OPEN:
        return handler

    async def guarded(request: web.Request) -> web.StreamResponse:
        guard.admit(access, request.headers)
        if takes_body:
            _must_be_json(request)
        return await handler(request)

    return guarded


def _must_be_json(request: web.Request) -> None:
    """Require JSON: for it a browser sends a CORS preflight before a cross-site POST."""
    if request.headers.get("Content-Type") != JSON and request.content_type != JSON:
        raise MalformedRequestError(WRONG_MEDIA_TYPE, f"send Content-Type: {JSON}")


def read_query(request: web.Request, kind: type[S]) -> S:
    """Parse the query as a struct. Raises MalformedRequestError that names the parameter."""
    query = request.query
    for name in query:
        if len(query.getall(name)) > 1:
            raise MalformedRequestError(
                MALFORMED_QUERY, f"query parameter {name[:50]!r} is given more than once", field=name
            )
    try:
        return msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(kind.__struct_fields__)
        raise MalformedRequestError(MALFORMED_QUERY, f"{error}; known parameters are {known}") from error


async def read_message(request: web.Request, kind: type[S], limit: int, example: str) -> S:
    """Parse the body as a struct; an empty body gives the defaults. Raises MalformedRequestError."""
    body = await read_body(request, limit)
    try:
        return decode(body, kind) if body.strip() else kind()
    except (ValueError, TypeError) as error:
        raise MalformedRequestError(
            MALFORMED_BODY, f"{error}; send no body, or one like {example}"
        ) from error


async def started(request: web.Request) -> Service:
    """Return the service once it has read its logs. Raises BusUnavailableError if that takes too long."""
    service = request.app[SERVICE]
    await service.started()
    return service


async def task_of(request: web.Request) -> tuple[Service, Task]:
    """Return the task that the path names. Raises UnknownTaskError."""
    service, task_id = await started(request), request.match_info["task_id"]
    task = service.ledger.task(task_key(task_id))
    if task is None:
        raise UnknownTaskError(f"unknown task {task_id[:100]!r}; rejected offers are not stored")
    return service, task


def json_response(value: Any) -> web.Response:
    """Return a 200 with a value as JSON."""
    return web.Response(body=_encode(value), content_type=JSON)
