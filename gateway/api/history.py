"""What happened before now: a run's course, past decisions, the days' results; and what needs an operator."""

from __future__ import annotations

import asyncio
from typing import Annotated

from aiohttp import web
from msgspec import Meta, Struct

from gateway.api.routing import SERVICE, json_response, read_query, started, task_of
from gateway.views.alerts import AlertPage
from gateway.views.days import DayPage
from gateway.views.run import LONGEST_CURVE, run_view

LARGEST_FILE = (1 << 63) - 1


class RunQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """How much of a curve is wanted."""

    points: Annotated[
        int, Meta(ge=1, le=LONGEST_CURVE, description="points of the curve; more are thinned")
    ] = 2000
    after: Annotated[
        float, Meta(ge=0, description="only what came later than this time; without it all of the run")
    ] = 0.0


class DecisionQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Paging of decisions."""

    limit: Annotated[int, Meta(ge=1, le=200, description="decisions per page")] = 50
    before: Annotated[
        Annotated[int, Meta(ge=1, le=LARGEST_FILE)] | None, Meta(description="`next` of the previous page")
    ] = None


class DayQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """How far to look back."""

    days: Annotated[int, Meta(ge=1, le=3650, description="how many days to look back")] = 30


async def get_progress(request: web.Request) -> web.Response:
    """Get the course of a task's run; what this gateway received of it, also before its last restart."""
    service, task = await task_of(request)
    query = read_query(request, RunQuery)
    key = task.record.task
    view = await asyncio.to_thread(lambda: run_view(key, service.runs.read(key), query.points, query.after))
    return json_response(view)


async def get_decisions(request: web.Request) -> web.Response:
    """List this gateway's decisions, newest first, in pages; also rejected offers, which leave no task."""
    query = read_query(request, DecisionQuery)
    decisions = request.app[SERVICE].decisions
    return json_response(await asyncio.to_thread(decisions.read_page, query.limit, query.before))


async def get_days(request: web.Request) -> web.Response:
    """Count the ends of jobs by day (UTC); late and first places too."""
    days = read_query(request, DayQuery).days
    return json_response(DayPage((await started(request)).days(days)))


async def get_alerts(request: web.Request) -> web.Response:
    """List what needs an operator now, errors first, each with what to do."""
    return json_response(AlertPage(request.app[SERVICE].alerts()))
