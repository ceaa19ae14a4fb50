"""Build the OpenAPI 3.1 document from the route table and the messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec

from gateway.api.access import Access
from gateway.api.problems import Fault
from gateway.api.routing import JSON, Route
from gateway.problem_details import MEDIA_TYPE, Problem
from gateway.telemetry.event_log import EventType, Hello, Lost, Reset
from gateway.views.schemas import SlotView, TaskView
from shared.messages.offers import Decision
from shared.messages.runs import Progress
from shared.messages.slots import Heartbeat

REF: Final = "#/components/schemas/{name}"
TAGS: Final = {
    "offers": "Send an offer, get a decision.",
    "tasks": "State of accepted offers.",
    "learning": "Upstream's scores of submissions, and the rates learned from them.",
    "fleet": "The slots and the gateway.",
    "events": "Live events.",
    "health": "For monitoring.",
    "document": "This document.",
}
# The type of each event's data.
EVENTS: Final[dict[str, type]] = {
    "hello": Hello,
    "reset": Reset,
    "lost": Lost,
    EventType.DECISION: Decision,
    EventType.TASK: TaskView,
    EventType.SLOT: SlotView,
    EventType.PROGRESS: Progress,
    EventType.HEARTBEAT: Heartbeat,
}
DESCRIPTION: Final = (
    "Decides on offers of fine-tuning jobs. An accepted offer is a stored job. Times are Unix seconds, sizes "
    "are bytes. Unknown fields in a request body are ignored; new fields may appear in any response. Every "
    "path also works with a trailing slash. Errors are RFC 9457 problem details."
)
PARAMETERS: Final = {
    "task_id": "the upstream task id, URL-encoded, or the task key",
    "slot": "the slot's name",
}

Json = dict[str, Any]


def document(routes: Sequence[Route], version: str) -> Json:
    """Return the whole document."""
    types = [Problem, *EVENTS.values()]
    types += [
        each for route in routes for each in (route.body, route.answer, route.query) if each is not None
    ]
    _, schemas = msgspec.json.schema_components(types, ref_template=REF)
    paths: dict[str, Json] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    for query in {route.query for route in routes if route.query is not None}:
        del schemas[query.__name__]  # they are parameters now
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Podium gateway",
            "version": version,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": meaning} for name, meaning in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, schemas: dict[str, Json]) -> Json:
    summary, _, more = " ".join((route.handler.__doc__ or "").split()).partition("; ")
    operation: Json = {
        "operationId": getattr(route.handler, "__name__", route.path),
        "tags": [route.tag],
        "summary": summary.rstrip("."),
    }
    if more:
        operation["description"] = more[:1].upper() + more[1:]
    if parameters := _parameters(route, schemas):
        operation["parameters"] = parameters
    if route.body is not None:
        required = bool(schemas[route.body.__name__].get("required"))
        schema = _ref(route.body)
        if route.body_or_list:
            schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
        operation["requestBody"] = {"required": required, "content": {JSON: {"schema": schema}}}
    operation["responses"] = _responses(route)
    operation["security"] = [] if route.access is Access.OPEN else [{"token": []}]
    return operation


def _parameters(route: Route, schemas: dict[str, Json]) -> list[Json]:
    found: list[Json] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": PARAMETERS[name],
            "schema": {"type": "string"},
        }
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    if route.query is None:
        return found
    query = schemas[route.query.__name__]
    for name, schema in query["properties"].items():
        plain = {key: value for key, value in schema.items() if key != "description"}
        found.append(
            {
                "name": name,
                "in": "query",
                "required": name in query.get("required", ()),
                "description": schema.get("description", ""),
                "schema": plain,
            }
        )
    return found


def _responses(route: Route) -> Json:
    responses: Json = {"200": {"description": "Done.", "content": _answer(route)}}
    for status, faults in _by_status(route.all_faults()).items():
        meaning = "; ".join(f"`{fault.slug}`: {fault.meaning}" for fault in faults)
        responses[str(status)] = {
            "description": f"{HTTPStatus(status).phrase}. {meaning}.",
            "content": {MEDIA_TYPE: {"schema": _ref(Problem)}},
        }
    return responses


def _answer(route: Route) -> Json:
    if route.answer is not None:
        return _content(route.answer)
    content: Json = {"schema": {"type": "string"} if route.media_type != JSON else {"type": "object"}}
    if route.tag == "events":
        content["x-events"] = {str(name): _ref(kind) for name, kind in EVENTS.items()}
    return {route.media_type: content}


def _by_status(faults: Iterable[Fault]) -> dict[int, list[Fault]]:
    found: dict[int, list[Fault]] = {}
    for fault in sorted(dict.fromkeys(faults), key=lambda fault: fault.status):
        found.setdefault(fault.status, []).append(fault)
    return found


def _content(kind: type) -> Json:
    return {JSON: {"schema": _ref(kind)}}


def _ref(kind: type) -> Json:
    return {"$ref": REF.format(name=kind.__name__)}
