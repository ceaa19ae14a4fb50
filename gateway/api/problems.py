"""Error responses of /v1: RFC 9457 problems, each with a slug for programs and a sentence for people."""

from __future__ import annotations

import re
from typing import Final

from aiohttp import web
from msgspec import Struct

from gateway.errors import (
    BusyError,
    ForeignRequestError,
    MalformedOfferError,
    MalformedScoreError,
    MismatchedStartError,
    NodeSilentError,
    NotPossibleError,
    UnauthorizedError,
    UnknownSlotError,
    UnknownTaskError,
)
from gateway.problem_details import problem
from shared.errors import BusError, PodiumError
from shared.logs import get_logger
from shared.subjects import task_key

RETRY_AFTER_S: Final = 1
_FIELD = re.compile(r"- at `(?:key in )?\$\.?([^`]*)`|(?:required|unknown) field `([^`]+)`")

log = get_logger()


class Fault(Struct, frozen=True):
    """A kind of problem that a route can respond with."""

    status: int
    slug: str
    meaning: str


class MalformedRequestError(PodiumError):
    """An invalid body or query."""

    def __init__(self, fault: Fault, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.field = field or field_in(message)


MALFORMED_OFFER: Final = Fault(
    400, "malformed-offer", "the body is not a valid offer; `field` names the invalid field"
)
MALFORMED_BODY: Final = Fault(400, "malformed-body", "the body is invalid; `field` names the invalid field")
MALFORMED_QUERY: Final = Fault(400, "malformed-query", "a parameter is invalid; `field` names it")
MALFORMED_SCORE: Final = Fault(
    400, "malformed-score", "the body is not a valid score; `field` names the invalid field"
)
UNAUTHORIZED: Final = Fault(401, "unauthorized", "the token is missing or unknown")
FOREIGN: Final = Fault(
    403, "foreign-request", "no API tokens are configured, so only requests from this host are accepted"
)
UNKNOWN_TASK: Final = Fault(404, "unknown-task", "no such task was accepted")
UNKNOWN_SLOT: Final = Fault(404, "unknown-slot", "the fleet has no such slot")
NOT_POSSIBLE: Final = Fault(
    409, "not-possible", "the task is past the point where this is possible; nothing was changed"
)
MISMATCHED: Final = Fault(
    409, "start-differs", "the data is not for the task that was accepted; nothing was stored"
)
TOO_LARGE: Final = Fault(413, "body-too-large", "the body is larger than `max_body_bytes`")
SLOW_BODY: Final = Fault(408, "slow-body", "the body took longer than ten seconds")
WRONG_MEDIA_TYPE: Final = Fault(415, "wrong-media-type", "the body must be sent as application/json")
INTERNAL: Final = Fault(500, "internal", "the gateway failed; its log has the details")
NOT_READY: Final = Fault(503, "not-ready", "the broker is unavailable; retry")
NODE_SILENT: Final = Fault(503, "node-silent", "the slot's node did not confirm")
BUSY: Final = Fault(503, "busy", "too many concurrent requests")
_REFUSED: Final = {
    ForeignRequestError: FOREIGN,
    UnknownTaskError: UNKNOWN_TASK,
    UnknownSlotError: UNKNOWN_SLOT,
    NotPossibleError: NOT_POSSIBLE,
    MismatchedStartError: MISMATCHED,
}


def unavailable(why: str) -> web.Response:
    """Return a 503 for a request that can't be decided or done now."""
    detail = f"{why}; no outcome is confirmed: retry"
    return problem(503, NOT_READY.slug, detail, {"Retry-After": str(RETRY_AFTER_S)})


def problem_of(request: web.Request, error: Exception, max_body_bytes: int) -> web.Response:
    """Return the response to a request that raised `error`."""
    match error:
        case MalformedOfferError():
            return _problem(MALFORMED_OFFER, error, field=field_in(str(error)))
        case MalformedScoreError():
            return _problem(MALFORMED_SCORE, error, field=field_in(str(error)))
        case MalformedRequestError():
            return _problem(error.fault, error, field=error.field)
        case UnauthorizedError():
            return problem(401, UNAUTHORIZED.slug, str(error), {"WWW-Authenticate": 'Bearer realm="podium"'})
        case NodeSilentError():
            return problem(503, NODE_SILENT.slug, str(error), {"Retry-After": str(RETRY_AFTER_S)})
        case BusyError():
            return problem(503, BUSY.slug, str(error), {"Retry-After": str(RETRY_AFTER_S)})
        case BusError():
            return unavailable(str(error))
        case web.HTTPException():
            return _http_problem(request, error, max_body_bytes)
    for kind, fault in _REFUSED.items():
        if isinstance(error, kind):
            return _problem(fault, error)
    _log_failure(request)
    return problem(500, INTERNAL.slug, "the gateway failed on this request; its log has the details")


def field_in(message: str) -> str | None:
    """Return the field that a msgspec error names."""
    match = _FIELD.search(message)
    return None if match is None else match[1] or match[2] or None


def _problem(fault: Fault, error: Exception, *, field: str | None = None) -> web.Response:
    return problem(fault.status, fault.slug, str(error), field=field)


def _http_problem(request: web.Request, error: web.HTTPException, max_body_bytes: int) -> web.Response:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        response = problem(
            413,
            TOO_LARGE.slug,
            f"the body is larger than {max_body_bytes} bytes; send the data as a reference, "
            "or raise PODIUM_MAX_BODY_BYTES",
        )
        response.force_close()
        return response
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        detail = f"{request.path[:200]} supports {allowed}, not {request.method[:20]}"
        return problem(405, "wrong-method", detail, {"Allow": allowed})
    if isinstance(error, web.HTTPNotFound):
        detail = f"no such path {request.path[:200]!r}; /v1/docs lists all paths"
        return problem(404, "unknown-path", detail)
    if isinstance(error, web.HTTPRequestTimeout | web.HTTPBadRequest):  # of read_body
        fault = SLOW_BODY if error.status == SLOW_BODY.status else MALFORMED_BODY
        response = problem(fault.status, fault.slug, str(error.text))
        response.force_close()
        return response
    return problem(error.status, "http", error.text or error.reason)


def _log_failure(request: web.Request) -> None:
    """Log with the task, if the path names one, so that a search for the task finds it."""
    task_id = request.match_info.get("task_id")
    task = {"task": task_key(task_id)} if task_id else {}
    log.exception("a request failed", method=request.method, path=request.path, **task)
