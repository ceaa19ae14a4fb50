"""What the handlers of one gateway share."""

from __future__ import annotations

import asyncio

from aiohttp import web

from gateway.api.access import Guard
from gateway.service import Service

SERVICE = web.AppKey("service", Service)
GUARD = web.AppKey("guard", Guard)
# One future for each request that is not answered yet.
RUNNING = web.AppKey("running", set[asyncio.Future[None]])
