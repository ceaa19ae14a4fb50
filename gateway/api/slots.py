"""The slots of the fleet: list them, drain one, put it to work again."""

from __future__ import annotations

import time
from typing import Annotated

from aiohttp import web
from msgspec import Meta, Struct

from gateway.api.routing import SERVICE, json_response, read_message, started
from gateway.service import Service
from gateway.views.build import slot_view
from gateway.views.schemas import SlotPage, SlotView


class OperationRequest(Struct, frozen=True):
    """The optional body of an operator's request."""

    reason: Annotated[str, Meta(max_length=500)] = "requested by an operator"


async def get_slots(request: web.Request) -> web.Response:
    """List all slots of the fleet."""
    service = await started(request)
    return json_response(SlotPage([_view(service, slot) for slot in service.settings.slots]))


async def post_drain(request: web.Request) -> web.Response:
    """Give a slot no new job, until it is resumed; the job that it has is seen through."""
    service, slot = await started(request), request.match_info["slot"]
    await service.operations().drain(slot, (await read_operation(request)).reason)
    return json_response(_view(service, slot))


async def post_resume(request: web.Request) -> web.Response:
    """Let a drained slot get jobs again."""
    service, slot = await started(request), request.match_info["slot"]
    await service.operations().resume(slot, (await read_operation(request)).reason)
    return json_response(_view(service, slot))


async def read_operation(request: web.Request) -> OperationRequest:
    """Read the body of an operator's request. Raises MalformedRequestError."""
    limit = request.app[SERVICE].settings.max_body_bytes
    return await read_message(request, OperationRequest, limit, '{"reason": "..."}')


def _view(service: Service, slot: str) -> SlotView:
    return slot_view(slot, service.ledger, service.presence, time.time())
