"""The `/v1` HTTP interface: offers in, decisions out; tasks, slots and health to look at."""

from __future__ import annotations

import asyncio
import time
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Final

from aiohttp import web
from msgspec import Meta, Struct

from gateway.api.access import Access, Guard
from gateway.api.docs_page import CONTENT_SECURITY_POLICY, page
from gateway.api.openapi import document
from gateway.api.problems import (
    BUSY,
    MALFORMED_OFFER,
    MALFORMED_QUERY,
    MALFORMED_SCORE,
    NODE_SILENT,
    NOT_POSSIBLE,
    NOT_READY,
    UNKNOWN_TASK,
    MalformedRequestError,
    problem_of,
    unavailable,
)
from gateway.api.routing import (
    GUARD,
    RUNNING,
    SERVICE,
    Handler,
    Route,
    add_routes,
    json_response,
    read_message,
    read_query,
)
from gateway.api.sse import MEDIA_TYPE as EVENTS
from gateway.api.sse import EventQuery, get_events
from gateway.errors import MalformedOfferError, UnknownTaskError
from gateway.http_request import read_body
from gateway.learning.rates import TablesView
from gateway.learning.score_form import ScoreForm, parse_scores
from gateway.learning.score_stream import ScoresTaken
from gateway.offers import parse_offer
from gateway.service import Service
from gateway.state.ledger import Task, TaskState
from gateway.upstream.endpoints import add_endpoints
from gateway.views.build import (
    GatewayInfo,
    SlotPage,
    TaskFilter,
    TaskPage,
    TaskStory,
    TaskView,
    slot_view,
    task_page,
    task_story,
    task_view,
)
from shared import subjects
from shared.messages import Decision, Offer
from shared.version import version

PAGE: Final = 50
LONGEST_PAGE: Final = 500
LARGEST_CURSOR: Final = (1 << 63) - 1


class Wish(Struct, frozen=True):
    """The body of a request to cancel or requeue; may be left out."""

    reason: Annotated[str, Meta(max_length=500)] = "an operator asked for it"


class TaskQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which tasks are wanted, and how many of them."""

    limit: Annotated[int, Meta(ge=1, le=LONGEST_PAGE, description="tasks in one page")] = PAGE
    after: Annotated[
        Annotated[int, Meta(ge=1, le=LARGEST_CURSOR)] | None, Meta(description="`next` of the page before")
    ] = None
    state: Annotated[str, Meta(description="only tasks in this state; several with commas between")] = ""
    slot: Annotated[str | None, Meta(description="only tasks of this slot")] = None


class Status(Struct, frozen=True):
    """That it is so."""

    status: str


def make_app(service: Service, guard: Guard) -> web.Application:
    """The HTTP side of one gateway."""
    # web.Application reads a body up to this size; a larger one is refused before it is read whole
    app = web.Application(middlewares=[_serve], client_max_size=service.settings.max_body_bytes)
    app[SERVICE] = service
    app[GUARD] = guard
    app[RUNNING] = set()
    add_routes(app.router, ROUTES, guard)
    add_endpoints(app, service)
    return app


async def post_offer(request: web.Request) -> web.Response:
    """Offer -> decision, accepted or not; storing the job is the acceptance."""
    received_at, service = time.time(), request.app[SERVICE]
    offer = parse_offer(await read_body(request, service.settings.max_body_bytes))
    return json_response(await service.decide(offer, received_at))


async def get_tasks(request: web.Request) -> web.Response:
    """Accepted tasks, newest first, in pages."""
    query = read_query(request, TaskQuery)
    wanted = TaskFilter(_states(query.state), query.slot)
    service = await _started(request)
    return json_response(
        task_page(
            service.ledger, service.presence, time.time(), limit=query.limit, after=query.after, wanted=wanted
        )
    )


async def get_task(request: web.Request) -> web.Response:
    """One task, by its upstream id (URL-encoded) or by its token."""
    service, task = await _task(request)
    return json_response(task_view(task, service.ledger, service.presence, time.time()))


async def get_story(request: web.Request) -> web.Response:
    """Everything that is stored of one task."""
    service, task = await _task(request)
    return json_response(task_story(task, service.ledger, service.presence, time.time()))


async def post_cancel(request: web.Request) -> web.Response:
    """End a task as `cancelled`; 409 once it has a result or its submission is being stored."""
    service, token, wish = await _wish(request)
    task = await service.operations().cancel(token, wish.reason)
    return json_response(task_view(task, service.ledger, service.presence, time.time()))


async def post_requeue(request: web.Request) -> web.Response:
    """Have the slot's node restart a job; 409 as for cancel, 503 if no node confirms."""
    service, token, wish = await _wish(request)
    task = await service.operations().requeue(token, wish.reason)
    return json_response(task_view(task, service.ledger, service.presence, time.time()))


async def post_scores(request: web.Request) -> web.Response:
    """Upstream's scores, one or a list; what is stored already changes nothing, 404 for one of no task."""
    service = await _started(request)
    body = await read_body(request, service.settings.max_body_bytes)
    taken = await service.take_scores(parse_scores(body, time.time()))
    if taken.refused and not body.lstrip().startswith(b"["):
        raise UnknownTaskError(taken.refused[0].why)
    return json_response(taken)


async def get_tables(request: web.Request) -> web.Response:
    """The learned rates, with counts, prior and half-life."""
    return json_response((await _started(request)).tables())


async def get_slots(request: web.Request) -> web.Response:
    """All slots of the fleet."""
    service, now = await _started(request), time.time()
    slots = [slot_view(slot, service.ledger, service.presence, now) for slot in service.settings.slots]
    return json_response(SlotPage(slots))


async def get_gateway(request: web.Request) -> web.Response:
    """What this gateway is, how it is set, and how it fares."""
    return json_response(request.app[SERVICE].info())


async def get_metrics(request: web.Request) -> web.Response:
    """Metrics in Prometheus' text format."""
    # its client takes 50 ms to load, a tenth of the gateway's start: loaded on the first scrape, off the loop
    await asyncio.to_thread(import_module, "gateway.api.metrics")
    from gateway.api.metrics import CONTENT_TYPE, exposition

    return web.Response(body=exposition(request.app[SERVICE]), headers={"Content-Type": CONTENT_TYPE})


async def get_openapi(request: web.Request) -> web.Response:
    """This document, for programs."""
    return json_response(_document())


async def get_docs(request: web.Request) -> web.Response:
    """This document, for people."""
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return web.Response(text=page(_document()), content_type="text/html", headers=headers)


async def get_health(request: web.Request) -> web.Response:
    """200 while the process is able to answer."""
    return json_response(Status("ok"))


async def get_ready(request: web.Request) -> web.Response:
    """200 while offers can be decided, else 503 with what is missing."""
    why = request.app[SERVICE].why_not_ready()
    return json_response(Status("ready")) if why is None else unavailable(why)


@web.middleware
async def _serve(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every request: known to be running, answered whatever it raises, and counted."""
    began, app = time.perf_counter(), request.app
    answered = asyncio.get_running_loop().create_future()
    app[RUNNING].add(answered)
    service = app[SERVICE]
    try:
        response = await handler(request)
    except Exception as error:
        if isinstance(error, MalformedOfferError):
            service.measures.malformed_offers += 1
        response = problem_of(request, error, service.settings.max_body_bytes)
    finally:
        app[RUNNING].discard(answered)
        answered.set_result(None)
    if isinstance(response, web.Response):  # a stream's length says nothing
        seconds = time.perf_counter() - began
        service.measures.answered(request.match_info.route, response.status, seconds)
    return response


async def _started(request: web.Request) -> Service:
    service = request.app[SERVICE]
    await service.started()
    return service


async def _task(request: web.Request) -> tuple[Service, Task]:
    """The task that the path names; UnknownTaskError if there is none."""
    service, task_id = await _started(request), request.match_info["task_id"]
    task = service.ledger.task(subjects.task_key(task_id))
    if task is None:
        raise UnknownTaskError(f"no task {task_id[:100]!r} was accepted; rejected offers are not kept")
    return service, task


async def _wish(request: web.Request) -> tuple[Service, str, Wish]:
    """What an operator asks for."""
    service = await _started(request)
    limit = service.settings.max_body_bytes
    wish = await read_message(request, Wish, limit, '{"reason": "..."}')
    return service, subjects.task_key(request.match_info["task_id"]), wish


def _states(text: str) -> frozenset[TaskState] | None:
    """The states that the query names."""
    if not text:
        return None
    try:
        return frozenset(TaskState(name.strip()) for name in text.split(","))
    except ValueError as error:
        detail = f"{error}; states are {', '.join(TaskState)}"
        raise MalformedRequestError(MALFORMED_QUERY, detail, field="state") from error


_OPEN: Final = Access.OPEN
_DECIDING: Final = (MALFORMED_OFFER, NOT_READY)
_ENDING: Final = (UNKNOWN_TASK, NOT_POSSIBLE, NOT_READY)
_SCORING: Final = (MALFORMED_SCORE, UNKNOWN_TASK, NOT_READY)
_REQUEUEING: Final = (*_ENDING, NODE_SILENT)

# fmt: off
ROUTES: Final = [
    Route("POST", "/v1/offers", post_offer, Decision, Offer, faults=_DECIDING, tag="offers"),
    Route("GET", "/v1/tasks", get_tasks, TaskPage, query=TaskQuery, faults=(NOT_READY,)),
    Route("GET", "/v1/tasks/{task_id}", get_task, TaskView, faults=(UNKNOWN_TASK, NOT_READY)),
    Route("GET", "/v1/tasks/{task_id}/story", get_story, TaskStory, faults=(UNKNOWN_TASK, NOT_READY)),
    Route("POST", "/v1/tasks/{task_id}/cancel", post_cancel, TaskView, Wish, faults=_ENDING),
    Route("POST", "/v1/tasks/{task_id}/requeue", post_requeue, TaskView, Wish, faults=_REQUEUEING),
    Route(
        "POST",
        "/v1/scores",
        post_scores,
        ScoresTaken,
        ScoreForm,
        body_or_list=True,
        faults=_SCORING,
        tag="learning",
    ),
    Route("GET", "/v1/tables", get_tables, TablesView, faults=(NOT_READY,), tag="learning"),
    Route("GET", "/v1/slots", get_slots, SlotPage, faults=(NOT_READY,), tag="fleet"),
    Route("GET", "/v1/gateway", get_gateway, GatewayInfo, tag="fleet"),
    Route("GET", "/v1/events", get_events, None, None, EventQuery, (BUSY,), media_type=EVENTS, tag="events"),
    Route("GET", "/metrics", get_metrics, None, access=Access.METRICS, media_type="text/plain", tag="health"),
    Route("GET", "/healthz", get_health, Status, access=_OPEN, tag="health"),
    Route("GET", "/readyz", get_ready, Status, access=_OPEN, faults=(NOT_READY,), tag="health"),
    Route("GET", "/v1/openapi.json", get_openapi, None, access=_OPEN, tag="document"),
    Route("GET", "/v1/docs", get_docs, None, access=_OPEN, media_type="text/html", tag="document"),
]
# fmt: on


@cache
def _document() -> dict[str, Any]:
    return document(ROUTES, version())
