"""Endpoints for validators of Gradients (Bittensor subnet 56), as of July to October 2025.

Upstream sends a request once and doesn't retry; any status but 200 counts as a rejection, and its body is not
read. So each path works with and without a trailing slash, and `detail` explains every error for people who
read logs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec
from aiohttp import web
from msgspec import Struct

from gateway.errors import MismatchedStartError, NoSlotError, NoSubmissionError, NotAcceptedError
from gateway.http_request import read_body
from gateway.problem_details import problem
from gateway.service import Service
from gateway.state.ledger import Ledger
from gateway.upstream import repositories
from gateway.upstream.auth import VALIDATOR, AuthRefusal, Caller, Gate
from gateway.upstream.contract import (
    MinerSubmission,
    MinerTaskOffer,
    MinerTaskResponse,
    TrainingRepo,
    TrainRequestImage,
    TrainRequestText,
    TrainResponse,
    parse,
)
from gateway.upstream.repositories import KINDS, NotEnteredError
from shared import subjects
from shared.errors import BusError
from shared.logs import get_logger
from shared.messages.encoding import decoder
from shared.messages.jobs import ResultStatus

OFFER: Final = decoder(MinerTaskOffer)
START_TEXT: Final = decoder(TrainRequestText)
START_IMAGE: Final = decoder(TrainRequestImage)
SETTLE_S: Final = 1.0  # how long an idempotent request waits for the shared replay check
NO_SLOT: Final = "no-slot"  # slugs of problems
START_DIFFERS: Final = "start-differs"
HUB: Final = "hf://"
JSON: Final = {"Content-Type": "application/json"}


class Entrance(Struct, frozen=True):
    """Admit requests, a few per event-loop iteration."""

    gate: Gate
    throttle: Callable[[], Awaitable[None]]  # waits for an iteration that has room

    async def admit(self, headers: Mapping[str, str], body: bytes | None) -> Caller:
        """Return the caller; `body` is None for a GET. Raises AuthRefusal."""
        await self.throttle()
        # authenticate after the body has arrived: a replay could delay it until its nonce is forgotten
        return self.gate.admit(headers, body, time.time())


class Asked(Struct, frozen=True):
    """One admitted request."""

    request: web.Request
    body: bytes
    received_at: float
    caller: Caller


Endpoint = Callable[[Service, Asked], Awaitable[Struct]]
Handler = Callable[[web.Request], Awaitable[web.Response]]

log = get_logger()
_encode = msgspec.json.Encoder().encode


def add_endpoints(app: web.Application, service: Service, entrance: Entrance) -> list[web.AbstractRoute]:
    """Add upstream's endpoints to the gateway's HTTP application; return their routes."""
    added: list[web.AbstractRoute] = []
    posts: tuple[tuple[str, Endpoint], ...] = (
        ("/task_offer", offer),
        ("/task_offer_image", offer),
        ("/start_training", start),
        ("/start_training_grpo", start),
        ("/start_training_image", start_image),
    )
    for path, endpoint in posts:
        added += _add(app, "POST", path, partial(_post, service, entrance, endpoint))
    for path, endpoint in (
        ("/get_latest_model_submission/{task_id:[^/]+}", submission),
        ("/training_repo/{kind:[^/]+}", training_repo),
    ):
        added += _add(app, "GET", path, partial(_get, service, entrance, endpoint))
    return added


def _add(
    app: web.Application, method: str, path: str, handler: Callable[[web.Request], Awaitable[web.Response]]
) -> list[web.AbstractRoute]:
    return [app.router.add_route(method, each, handler) for each in (path, path + "/")]


async def offer(service: Service, asked: Asked) -> MinerTaskResponse:
    """Decide on an offer. An accepted one reserves a slot until upstream sends its data."""
    bare = parse(asked.body, OFFER).offer()
    caller = asked.caller
    decision = await service.decide(bare, asked.received_at, before=caller.settle, validator=caller.validator)
    return MinerTaskResponse(decision.reason, decision.accepted)


async def start(service: Service, asked: Asked) -> TrainResponse:
    """Start an accepted text task; a repeated request gets the same response."""
    request = parse(asked.body, START_TEXT)
    await asked.caller.settle(SETTLE_S)  # a repeated start is idempotent
    job = await service.start(request.task_id, request.offer, asked.received_at, asked.caller.validator)
    return TrainResponse(f"Training on slot {job.slot}", job.task_id)


async def start_image(_: Service, asked: Asked) -> TrainResponse:
    """Refuse a start: offers of image tasks are always rejected."""
    request = parse(asked.body, START_IMAGE)
    await asked.caller.settle(SETTLE_S)
    raise NotAcceptedError(
        f"task {request.task_id[:100]!r} was not accepted: the engine does not train image models"
    )


async def submission(service: Service, asked: Asked) -> MinerSubmission:
    """Return the location of a task's submission."""
    await asked.caller.settle(SETTLE_S)
    if not service.knows_the_logs:
        await service.started()
    task_id = asked.request.match_info["task_id"]
    found = submission_of(service.ledger, subjects.task_key(task_id))
    return found if service.settings.upstream_model_hash else MinerSubmission(found.repo)


def submission_of(ledger: Ledger, key: str) -> MinerSubmission:
    """Return a task's submission, which stays available for good. Raises NoSubmissionError."""
    task = ledger.task(key)
    if task is None:
        raise NoSubmissionError("no such task was accepted")
    result = ledger.chain_of(task.record).result
    if result is None:
        raise NoSubmissionError(f"no submission yet: the task is {ledger.state(task, time.time())}")
    if result.status is not ResultStatus.SUBMITTED or result.artifact is None:
        raise NoSubmissionError(f"no submission: the task ended as {result.status}: {result.reason}")
    return MinerSubmission(repository(result.artifact), result.model_hash)


def repository(artifact: str) -> str:
    """Return the repository's name on the hub; an artifact stored elsewhere keeps its full name."""
    if not artifact.startswith(HUB):
        return artifact
    return artifact.removeprefix(HUB).partition("@")[0]


async def training_repo(service: Service, asked: Asked) -> TrainingRepo:
    """Return the repository that this miner enters for a kind of task; the answer costs an entry fee."""
    await asked.caller.settle(SETTLE_S)
    kind = asked.request.match_info["kind"]
    if kind not in KINDS:
        raise AuthRefusal(422, f"the task type must be one of {', '.join(KINDS)}")
    try:
        return await asyncio.to_thread(repositories.training_repo, service.settings, kind)
    except NotEnteredError as error:
        log.warning("upstream asked for a training repository and got none", kind=kind, reason=str(error))
        raise AuthRefusal(404, str(error)) from error


async def _post(
    service: Service, entrance: Entrance, endpoint: Endpoint, request: web.Request
) -> web.Response:
    received_at, limit = time.time(), service.settings.max_body_bytes
    try:
        body = await read_body(request, limit)
    except web.HTTPRequestEntityTooLarge:
        return _unread(413, f"the body is larger than {limit} bytes")
    except (web.HTTPRequestTimeout, web.HTTPBadRequest) as error:
        return _unread(error.status, str(error.text))
    return await _answer(service, entrance, endpoint, request, body, received_at)


async def _get(
    service: Service, entrance: Entrance, endpoint: Endpoint, request: web.Request
) -> web.Response:
    return await _answer(service, entrance, endpoint, request, None, time.time())


async def _answer(
    service: Service,
    entrance: Entrance,
    endpoint: Endpoint,
    request: web.Request,
    body: bytes | None,
    received_at: float,
) -> web.Response:
    """Authenticate the request, run its endpoint, and convert errors into upstream's form."""
    try:
        caller = await entrance.admit(request.headers, body)
        return _json(await endpoint(service, Asked(request, body or b"", received_at, caller)))
    except AuthRefusal as refusal:
        if refusal.reason is not None:
            claimed = request.headers.get(VALIDATOR, "")
            service.refusals.refused(claimed, refusal.reason, refusal.detail, received_at)
        return _detail(refusal.status, refusal.detail)
    except (NoSubmissionError, NotAcceptedError) as error:
        return _detail(404, str(error))
    except NoSlotError as error:
        return problem(409, NO_SLOT, str(error))
    except MismatchedStartError as error:
        return problem(409, START_DIFFERS, str(error))
    except BusError as error:
        return _detail(503, f"{error}; no outcome is confirmed: retry")


def _json(answer: Struct) -> web.Response:
    return web.Response(body=_encode(answer), headers=JSON)


def _unread(status: int, detail: str) -> web.Response:
    """Respond to a request whose body was not fully read, and close its connection."""
    response = _detail(status, detail)
    response.force_close()
    return response


def _detail(status: int, detail: str) -> web.Response:
    body: dict[str, Any] = {"detail": detail}
    return web.Response(body=_encode(body), status=status, headers=JSON)
