"""The `/v1` HTTP interface: offers in, decisions out; tasks, slots and health to look at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from gateway.body import read_body
from gateway.ledger import Task, TaskState
from gateway.offers import MalformedOfferError, parse_offer
from gateway.operations import NodeSilentError, NotPossibleError, UnknownTaskError
from gateway.scores import MalformedScoreError, parse_scores
from gateway.service import Service
from gateway.upstream.gradients import add_endpoints
from gateway.views import TaskFilter, slot_view, task_page, task_story, task_view
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


class Wish(Struct, frozen=True):
    """The body of a request to cancel or requeue; may be left out."""

    reason: Annotated[str, Meta(max_length=500)] = "an operator asked for it"


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
        ("GET", "/v1/tasks/{task_id:[^/]+}/story", get_story),
        ("POST", "/v1/tasks/{task_id:[^/]+}/cancel", post_cancel),
        ("POST", "/v1/tasks/{task_id:[^/]+}/requeue", post_requeue),
        ("POST", "/v1/scores", post_scores),
        ("GET", "/v1/tables", get_tables),
        ("GET", "/v1/slots", get_slots),
        ("GET", "/v1/gateway", get_gateway),
        ("GET", "/healthz", get_health),
        ("GET", "/readyz", get_ready),
    ):
        app.router.add_route(method, path, handler)
        app.router.add_route(method, path + "/", handler)
    add_endpoints(app, service)
    return app


async def post_offer(request: web.Request) -> web.Response:
    """Offer -> decision, accepted or not; 400 for what is no offer, 503 while nothing can be decided."""
    received_at = time.time()
    offer = parse_offer(await _body(request))
    return _json(await request.app[SERVICE].decide(offer, received_at))


async def get_tasks(request: web.Request) -> web.Response:
    """Accepted tasks, newest first, in pages; `state` (several with commas) and `slot` choose among them."""
    service = await _started(request)
    limit = _number(request, "limit", 1, LONGEST_PAGE) or PAGE
    after = _number(request, "after", 1, LARGEST_CURSOR)
    wanted = TaskFilter(_states(request), request.query.get("slot"))
    return _json(
        task_page(service.ledger, service.presence, time.time(), limit=limit, after=after, wanted=wanted)
    )


async def get_task(request: web.Request) -> web.Response:
    """One task by its upstream id (URL-encoded) or by its token."""
    service, task = await _task(request)
    return _json(task_view(task, service.ledger, service.presence, time.time()))


async def get_story(request: web.Request) -> web.Response:
    """Everything that is stored of one task."""
    service, task = await _task(request)
    return _json(task_story(task, service.ledger, service.presence, time.time()))


async def post_cancel(request: web.Request) -> web.Response:
    """End a task as `cancelled`; 409 once it has a result or its submission is being stored."""
    service, token, wish = await _wish(request)
    task = await service.operations().cancel(token, wish.reason)
    return _json(task_view(task, service.ledger, service.presence, time.time()))


async def post_requeue(request: web.Request) -> web.Response:
    """Have the slot's node begin anew with a job; 409 as for cancel, 503 if no node confirms."""
    service, token, wish = await _wish(request)
    task = await service.operations().requeue(token, wish.reason)
    return _json(task_view(task, service.ledger, service.presence, time.time()))


async def post_scores(request: web.Request) -> web.Response:
    """Upstream's scores, one or a list; what is stored already changes nothing, 404 if no task is known."""
    _must_be_json(request)
    service = await _started(request)
    forms = parse_scores(await _body(request), time.time())
    return _json(await service.take_scores(forms))


async def get_tables(request: web.Request) -> web.Response:
    """The learned rates, with counts, prior and half-life."""
    return _json((await _started(request)).tables())


async def get_gateway(request: web.Request) -> web.Response:
    """What this gateway is, how it is set, and how it fares."""
    return _json(request.app[SERVICE].info())


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
    except MalformedScoreError as error:
        return problem(400, "malformed-score", str(error))
    except UnknownTaskError as error:
        return problem(404, "unknown-task", str(error))
    except NotPossibleError as error:
        return problem(409, "not-possible", str(error))
    except NodeSilentError as error:
        return problem(503, "node-silent", str(error))
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


async def _task(request: web.Request) -> tuple[Service, Task]:
    """The task that the path names; UnknownTaskError if there is none."""
    service, task_id = await _started(request), request.match_info["task_id"]
    task = service.ledger.task(subjects.task_token(task_id))
    if task is None:
        raise UnknownTaskError(f"no task {task_id[:100]!r} was accepted; rejected offers are not kept")
    return service, task


async def _wish(request: web.Request) -> tuple[Service, str, Wish]:
    """What an operator asks for."""
    _must_be_json(request)
    service, body = await _started(request), await _body(request)
    try:
        wish = msgspec.json.decode(body, type=Wish) if body.strip() else Wish()
    except ValueError as error:
        raise web.HTTPBadRequest(text=f'{error}; the body is empty or such as {{"reason": "..."}}') from error
    return service, subjects.task_token(request.match_info["task_id"]), wish


def _must_be_json(request: web.Request) -> None:
    """Only JSON is taken: a browser sends that to no foreign site unasked."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="send Content-Type: application/json")


def _states(request: web.Request) -> frozenset[TaskState] | None:
    """The states that the query names; 400 if one is none."""
    text = request.query.get("state")
    if not text:
        return None
    try:
        return frozenset(TaskState(name.strip()) for name in text.split(","))
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"{error}; states are {', '.join(TaskState)}") from error


async def _body(request: web.Request) -> bytes:
    return await read_body(request, request.app[SERVICE].settings.max_body_bytes)


def _too_large(request: web.Request) -> web.Response:
    limit = request.app[SERVICE].settings.max_body_bytes
    detail = f"a body may have {limit} bytes; send the data as a reference, or raise PODIUM_MAX_BODY_BYTES"
    response = problem(413, "body-too-large", detail)
    response.force_close()
    return response


def _unavailable(why: str) -> web.Response:
    detail = f"{why}; nothing is known to be done: offer again, or ask again"
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
