"""The `/v1` HTTP interface: offers, tasks, scores, slots, events, metrics and health."""

from __future__ import annotations

import asyncio
import time
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Final

from aiohttp import web
from msgspec import Meta, Struct
from msgspec.structs import replace

from gateway.api.access import Access, Guard
from gateway.api.docs_page import CONTENT_SECURITY_POLICY, page
from gateway.api.history import (
    DayQuery,
    DecisionQuery,
    RunQuery,
    get_alerts,
    get_days,
    get_decisions,
    get_progress,
)
from gateway.api.middleware import serve
from gateway.api.openapi import document
from gateway.api.problems import (
    BUSY,
    MALFORMED_OFFER,
    MALFORMED_QUERY,
    MALFORMED_SCORE,
    MISMATCHED,
    NODE_SILENT,
    NOT_POSSIBLE,
    NOT_READY,
    UNKNOWN_SLOT,
    UNKNOWN_TASK,
    MalformedRequestError,
    unavailable,
)
from gateway.api.routing import (
    GUARD,
    RUNNING,
    SERVICE,
    THROTTLE,
    URGENT,
    Route,
    add_routes,
    json_response,
    read_query,
    started,
    task_of,
)
from gateway.api.slots import OperationRequest, get_slots, post_drain, post_resume, read_operation
from gateway.api.sse import MEDIA_TYPE as EVENTS
from gateway.api.sse import EventQuery, get_events
from gateway.api.throttle import LoopThrottle
from gateway.errors import UnknownTaskError
from gateway.http_request import read_body
from gateway.learning.score_form import ScoreForm, parse_scores
from gateway.offers import parse_offer
from gateway.service import Service
from gateway.state.ledger import TaskState
from gateway.views.alerts import AlertPage
from gateway.views.build import TaskFilter, task_page, task_records, task_view
from gateway.views.days import DayPage
from gateway.views.run import RunView
from gateway.views.schemas import (
    LONGEST_PAGE,
    DecisionPage,
    GatewayInfo,
    ScoresTaken,
    SlotPage,
    SlotView,
    Status,
    TablesView,
    TaskPage,
    TaskRecords,
    TaskView,
)
from shared import subjects
from shared.messages.offers import Decision, Offer
from shared.version import version

PAGE: Final = 50
LARGEST_CURSOR: Final = (1 << 63) - 1


class TaskQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Filter and paging of the task list."""

    limit: Annotated[int, Meta(ge=1, le=LONGEST_PAGE, description="tasks per page")] = PAGE
    after: Annotated[
        Annotated[int, Meta(ge=1, le=LARGEST_CURSOR)] | None, Meta(description="`next` of the previous page")
    ] = None
    state: Annotated[str, Meta(description="only tasks in these states, comma-separated")] = ""
    slot: Annotated[str | None, Meta(description="only tasks of this slot")] = None


def make_app(service: Service, guard: Guard) -> web.Application:
    """Make the HTTP application of one gateway."""
    # aiohttp refuses a larger body before it has read all of it
    app = web.Application(middlewares=[serve], client_max_size=service.settings.max_body_bytes)
    app[SERVICE] = service
    app[GUARD] = guard
    app[RUNNING] = set()
    app[THROTTLE] = LoopThrottle(most=1)
    app[URGENT] = set()
    add_routes(app, ROUTES, guard)
    return app


async def post_offer(request: web.Request) -> web.Response:
    """Decide on an offer; an acceptance is final, because the job is already stored."""
    received_at, service = time.time(), request.app[SERVICE]
    offer = parse_offer(await read_body(request, service.settings.max_body_bytes))
    return json_response(await service.decide(offer, received_at))


async def get_tasks(request: web.Request) -> web.Response:
    """List accepted tasks, newest first, in pages."""
    query = read_query(request, TaskQuery)
    wanted = TaskFilter(_states(query.state), query.slot)
    service = await started(request)
    page = task_page(
        service.ledger, service.presence, time.time(), limit=query.limit, after=query.after, wanted=wanted
    )
    return json_response(TaskPage([_scored(service, view) for view in page.tasks], page.next))


async def get_task(request: web.Request) -> web.Response:
    """Get one task, by its upstream id (URL-encoded) or its task key."""
    service, task = await task_of(request)
    return json_response(_scored(service, task_view(task, service.ledger, service.presence, time.time())))


async def get_records(request: web.Request) -> web.Response:
    """Get everything that is stored about one task."""
    service, task = await task_of(request)
    records = task_records(task, service.ledger, service.presence, time.time())
    return json_response(replace(records, now=_scored(service, records.now)))


async def post_cancel(request: web.Request) -> web.Response:
    """Cancel a task; 409 once it has a result or its submission is being stored."""
    service, key, operation = await _operation(request)
    task = await service.operations().cancel(key, operation.reason)
    return json_response(task_view(task, service.ledger, service.presence, time.time()))


async def post_requeue(request: web.Request) -> web.Response:
    """Restart a job on its slot's node; 409 as for cancel, 503 if no node confirms."""
    service, key, operation = await _operation(request)
    task = await service.operations().requeue(key, operation.reason)
    return json_response(task_view(task, service.ledger, service.presence, time.time()))


async def post_scores(request: web.Request) -> web.Response:
    """Store upstream's scores, one or a list; a score that is already stored changes nothing, 404 for an
    unknown task."""
    service = await started(request)
    body = await read_body(request, service.settings.max_body_bytes)
    taken = await service.take_scores(parse_scores(body, time.time()))
    if taken.refused and not body.lstrip().startswith(b"["):
        raise UnknownTaskError(taken.refused[0].why)
    return json_response(taken)


async def get_tables(request: web.Request) -> web.Response:
    """Get the learned rates, with counts, prior and half-life."""
    return json_response((await started(request)).tables())


async def get_gateway(request: web.Request) -> web.Response:
    """Get this gateway's version, settings and state."""
    return json_response(request.app[SERVICE].info())


async def get_metrics(request: web.Request) -> web.Response:
    """Get the metrics in Prometheus' text format."""
    # the client library takes 50 ms to import, a tenth of the gateway's start: imported on the first scrape
    await asyncio.to_thread(import_module, "gateway.api.metrics")
    from gateway.api.metrics import CONTENT_TYPE, exposition

    return web.Response(body=exposition(request.app[SERVICE]), headers={"Content-Type": CONTENT_TYPE})


async def get_openapi(request: web.Request) -> web.Response:
    """Get this document as JSON."""
    return json_response(_document())


async def get_docs(request: web.Request) -> web.Response:
    """Get this document as an HTML page."""
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return web.Response(text=page(_document()), content_type="text/html", headers=headers)


async def get_health(request: web.Request) -> web.Response:
    """Check liveness; 200 while the process can respond."""
    return json_response(Status("ok"))


async def get_ready(request: web.Request) -> web.Response:
    """Check readiness; 200 while offers can be decided, else 503 with what is missing."""
    why = request.app[SERVICE].why_not_ready()
    return json_response(Status("ready")) if why is None else unavailable(why)


def _scored(service: Service, view: TaskView) -> TaskView:
    """Return a task with upstream's score of it."""
    score = service.score_of(view.task)
    return view if score is None else replace(view, score=score)


async def _operation(request: web.Request) -> tuple[Service, str, OperationRequest]:
    """Read a request to cancel or requeue."""
    service = await started(request)
    return service, subjects.task_key(request.match_info["task_id"]), await read_operation(request)


def _states(text: str) -> frozenset[TaskState] | None:
    """Parse the states of the query."""
    if not text:
        return None
    try:
        return frozenset(TaskState(name.strip()) for name in text.split(","))
    except ValueError as error:
        detail = f"{error}; known states are {', '.join(TaskState)}"
        raise MalformedRequestError(MALFORMED_QUERY, detail, field="state") from error


_OPEN: Final = Access.OPEN
_Request: Final = OperationRequest
_DECIDING: Final = (MALFORMED_OFFER, MISMATCHED, NOT_READY)
_UNKNOWN: Final = (UNKNOWN_TASK, NOT_READY)
_CANCEL: Final = (UNKNOWN_TASK, NOT_POSSIBLE, NOT_READY)
_SCORING: Final = (MALFORMED_SCORE, UNKNOWN_TASK, NOT_READY)
_REQUEUE: Final = (*_CANCEL, NODE_SILENT)
_SLOT: Final = (UNKNOWN_SLOT, NOT_READY)

# fmt: off
ROUTES: Final = [
    Route("POST", "/v1/offers", post_offer, Decision, Offer, faults=_DECIDING, tag="offers", urgent=True),
    Route("GET", "/v1/tasks", get_tasks, TaskPage, query=TaskQuery, faults=(NOT_READY,)),
    Route("GET", "/v1/tasks/{task_id}", get_task, TaskView, faults=(UNKNOWN_TASK, NOT_READY)),
    Route("GET", "/v1/tasks/{task_id}/story", get_records, TaskRecords, faults=(UNKNOWN_TASK, NOT_READY)),
    Route("GET", "/v1/tasks/{task_id}/progress", get_progress, RunView, query=RunQuery, faults=_UNKNOWN),
    Route("POST", "/v1/tasks/{task_id}/cancel", post_cancel, TaskView, _Request, faults=_CANCEL),
    Route("POST", "/v1/tasks/{task_id}/requeue", post_requeue, TaskView, _Request, faults=_REQUEUE),
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
    Route("GET", "/v1/decisions", get_decisions, DecisionPage, query=DecisionQuery, tag="offers"),
    Route("GET", "/v1/days", get_days, DayPage, query=DayQuery, faults=(NOT_READY,)),
    Route("GET", "/v1/alerts", get_alerts, AlertPage, tag="fleet"),
    Route("GET", "/v1/slots", get_slots, SlotPage, faults=(NOT_READY,), tag="fleet"),
    Route("POST", "/v1/slots/{slot}/drain", post_drain, SlotView, _Request, None, _SLOT, tag="fleet"),
    Route("POST", "/v1/slots/{slot}/resume", post_resume, SlotView, _Request, None, _SLOT, tag="fleet"),
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
