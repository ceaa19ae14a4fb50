"""The `/v1` HTTP interface: offers in, decisions out; tasks, slots and health to look at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from gateway.offers import MalformedOfferError, parse_offer
from gateway.service import Service
from gateway.views import slot_view, task_page, task_view
from shared import subjects
from shared.errors import BusError
from shared.logs import get_logger

SERVICE = web.AppKey("service", Service)
# One future for each request that is not answered yet.
RUNNING = web.AppKey("running", set[asyncio.Future[None]])
RETRY_AFTER_S = 1
PAGE, LONGEST_PAGE = 50, 500
LARGEST_CURSOR = 1 << 63

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = get_logger()


class Problem(Struct, frozen=True):
    """An error answer, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str


def make_app(service: Service) -> web.Application:
    """The HTTP side of one gateway. Each path answers with and without a slash at its end."""
    # web.Application reads a body up to this size; a larger one is refused before it is read whole
    limit = service.settings.max_body_bytes
    app = web.Application(middlewares=[_track, _errors_as_problems], client_max_size=limit)
    app[SERVICE] = service
    app[RUNNING] = set()
    for method, path, handler in (
        ("POST", "/v1/offers", post_offer),
        ("GET", "/v1/tasks", get_tasks),
        ("GET", "/v1/tasks/{task_id:[^/]+}", get_task),
        ("GET", "/v1/slots", get_slots),
        ("GET", "/healthz", get_health),
        ("GET", "/readyz", get_ready),
    ):
        app.router.add_route(method, path, handler)
        app.router.add_route(method, path + "/", handler)
    return app


async def post_offer(request: web.Request) -> web.Response:
    """Offer -> decision, accepted or not; 400 for what is no offer, 503 while nothing can be decided."""
    received_at = time.time()
    offer = parse_offer(await _body(request))
    return _json(await request.app[SERVICE].decide(offer, received_at))


async def get_tasks(request: web.Request) -> web.Response:
    """Accepted tasks, newest first, in pages."""
    service = await _started(request)
    limit = _number(request, "limit", 1, LONGEST_PAGE)
    after = _number(request, "after", 1, LARGEST_CURSOR)
    return _json(
        task_page(service.ledger, service.presence, time.time(), limit=limit or PAGE, after=after),
    )


async def get_task(request: web.Request) -> web.Response:
    """One task by its upstream id (URL-encoded) or by its token."""
    service, task_id = await _started(request), request.match_info["task_id"]
    task = service.ledger.task(subjects.task_token(task_id))
    if task is None:
        return problem(
            404, "unknown-task", f"no task {task_id[:100]!r} was accepted; rejected offers are not kept"
        )
    return _json(task_view(task, service.ledger, service.presence, time.time()))


async def get_slots(request: web.Request) -> web.Response:
    """All slots of the fleet."""
    service, now = await _started(request), time.time()
    slots = [slot_view(slot, service.ledger, service.presence, now) for slot in service.settings.slots]
    return _json({"slots": slots})


async def get_health(request: web.Request) -> web.Response:
    """200 while the process is able to answer."""
    return _json({"status": "ok"})


async def get_ready(request: web.Request) -> web.Response:
    """200 while offers can be decided, else 503 with what is missing."""
    why = request.app[SERVICE].why_not_ready()
    return _json({"status": "ready"}) if why is None else _unavailable(why)


def problem(status: int, slug: str, detail: str, headers: dict[str, str] | None = None) -> web.Response:
    """One error answer. `slug` names the kind of problem for programs, `detail` says what to do."""
    message = Problem(f"urn:podium:problem:{slug}", HTTPStatus(status).phrase, status, detail)
    body = msgspec.json.encode(message)
    return web.Response(body=body, status=status, headers=headers, content_type="application/problem+json")


@web.middleware
async def _track(request: web.Request, handler: Handler) -> web.StreamResponse:
    answered = asyncio.get_running_loop().create_future()
    running = request.app[RUNNING]
    running.add(answered)
    try:
        return await handler(request)
    finally:
        running.discard(answered)
        answered.set_result(None)


@web.middleware
async def _errors_as_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except MalformedOfferError as error:
        return problem(400, "malformed-offer", str(error))
    except BusError as error:
        return _unavailable(str(error))
    except web.HTTPRequestEntityTooLarge:
        return _too_large(request)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        detail = f"{request.path} answers {allowed}, not {request.method[:20]}"
        return problem(405, "wrong-method", detail, {"Allow": allowed})
    except web.HTTPNotFound:
        return problem(
            404, "unknown-path", f"nothing is at {request.path[:200]!r}; the interface is below /v1"
        )
    except web.HTTPException as error:
        return problem(error.status, "http", error.text or error.reason)
    except Exception:
        log.exception("a request failed", method=request.method, path=request.path)
        return problem(500, "internal", "the gateway failed on this request; its log has the details")


async def _started(request: web.Request) -> Service:
    service = request.app[SERVICE]
    await service.started()
    return service


async def _body(request: web.Request) -> bytes:
    """The whole body, up to `max_body_bytes`; raises 413 as soon as it is known to be larger."""
    limit = request.app[SERVICE].settings.max_body_bytes
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=request.content_length)
    return await request.read()


def _too_large(request: web.Request) -> web.Response:
    limit = request.app[SERVICE].settings.max_body_bytes
    detail = f"a body may have {limit} bytes; send the data as a reference, or raise PODIUM_MAX_BODY_BYTES"
    response = problem(413, "body-too-large", detail)
    response.force_close()
    return response


def _unavailable(why: str) -> web.Response:
    detail = f"{why}; nothing is known to be accepted, offer again"
    return problem(503, "not-ready", detail, {"Retry-After": str(RETRY_AFTER_S)})


def _number(request: web.Request, name: str, least: int, most: int) -> int | None:
    """A whole number from the query; 400 if it is anything else."""
    text = request.query.get(name)
    if text is None:
        return None
    if text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most:
        return int(text)
    raise web.HTTPBadRequest(text=f"{name} must be a whole number from {least} to {most}")


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
