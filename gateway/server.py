"""Wiring and lifespan of the gateway process: its socket, its HTTP side, its service."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gateway.api.access import guard_of
from gateway.api.routing import RUNNING, URGENT
from gateway.api.throttle import LoopThrottle
from gateway.api.v1 import make_app
from gateway.dashboard.pages import add_pages
from gateway.parts import Background
from gateway.service import Service
from gateway.upstream.auth import gate_of, remarks
from gateway.upstream.endpoints import Entrance, add_endpoints
from gateway.upstream.nonces import Nonces
from gateway.upstream.validators import validators_of
from shared.aio import cancel_all, run_until_one_ends
from shared.errors import PodiumError, SettingsError
from shared.logs import get_logger
from shared.net import BACKLOG, is_loopback
from shared.settings import Settings

FIRST_PASSED_DESCRIPTOR = 3  # systemd's protocol, see sd_listen_fds(3)
FINISH_S = 10.0  # how long running requests may take at shutdown; an offer is answered within 2.5 s
STOP_S = 5.0  # the service flushes its file and drains its connection, each bounded by 2 s
YOUNG_OBJECTS = 20_000  # between two collections; requests leave no cycles, a scan of 700 objects finds none
LINGER_S = 1.0  # how long a client that is still sending a refused body may take to read the answer

log = get_logger()


def listening_socket(settings: Settings, environ: Mapping[str, str] = os.environ) -> socket.socket:
    """Return the socket the parent passed (LISTEN_FDS, and LISTEN_PID if set), else bind the set address.

    If the parent keeps the socket, clients of a restarting gateway wait instead of being refused.
    Raises PodiumError if the address can't be bound.
    """
    meant_for = environ.get("LISTEN_PID") or str(os.getpid())
    if environ.get("LISTEN_FDS", "0") not in ("", "0") and meant_for == str(os.getpid()):
        try:
            return socket.socket(fileno=FIRST_PASSED_DESCRIPTOR)
        except OSError as error:
            raise PodiumError(f"LISTEN_FDS is set, but no socket was passed: {error.strerror}") from error
    address = (settings.gateway_host, settings.gateway_port)
    family = socket.AF_INET6 if ":" in settings.gateway_host else socket.AF_INET
    try:
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        raise PodiumError(
            f"can't listen on {address[0]}:{address[1]}: {error.strerror}; set PODIUM_GATEWAY_HOST and _PORT"
        ) from error


Running = tuple[Service, asyncio.Task[None]]


@asynccontextmanager
async def running(settings: Settings, listening: socket.socket) -> AsyncIterator[Running]:
    """Serve on `listening`; yield the service and its task, which ends only on a fatal error.

    On exit: no new connections, running requests finish, then the service disconnects from NATS.
    """
    service = Service(settings)
    validators, nonces = validators_of(settings), Nonces(settings.gateway_name)
    entrance = Entrance(gate_of(settings, validators, nonces), LoopThrottle().take)
    guard = await asyncio.to_thread(guard_of, settings, listening)
    if settings.upstream_auth == "off" and not is_loopback(str(listening.getsockname()[0])):
        raise SettingsError("upstream_auth = off is for loopback only, but the socket that was passed is not")
    app = make_app(service, guard)
    app[URGENT].update(add_endpoints(app, service, entrance))
    add_pages(app)
    logging.getLogger("aiohttp.server").addFilter(_is_about_us)
    runner = _runner_of(app)
    await runner.setup()
    await validators.refresh()  # before the first request is read: upstream asks once
    site = web.SockSite(runner, listening, backlog=BACKLOG)
    await site.start()
    background: Background = {"nonces": nonces.run, "validators": lambda _: validators.follow()}
    server = runner.server
    assert server is not None  # `setup` has made it
    parts = {
        "service": service.run(background),
        "API tokens": guard.follow(),
        "connections": service.connections.watch(lambda: server.connections),
    }
    work = asyncio.create_task(run_until_one_ends(parts, again_s=STOP_S), name="gateway")
    try:
        yield service, work
    finally:
        await site.stop()
        service.events.close()  # its streams would never end by themselves
        if unanswered := app[RUNNING].copy():  # aiohttp's own shutdown stops reading bodies at once
            await asyncio.wait(unanswered, timeout=FINISH_S)
        await runner.cleanup()
        await cancel_all([work], again_s=2 * STOP_S)
        if not work.cancelled():
            work.result()  # raise why it ended


def _runner_of(app: web.Application) -> web.AppRunner:
    return web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=STOP_S,
        lingering_time=LINGER_S,
        auto_decompress=False,  # signatures cover the raw bytes; and a small body stays small
    )


def _is_about_us(record: logging.LogRecord) -> bool:
    """Return whether to log a line of aiohttp's; malformed HTTP is only answered with 400."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises PodiumError on a fatal error."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    listening = listening_socket(settings)
    host, port = listening.getsockname()[:2]
    async with running(settings, listening) as (_, work):
        gc.freeze()  # what exists now stays: no collection needs to scan it
        gc.set_threshold(YOUNG_OBJECTS)
        log.info("gateway listening", url=f"http://{host}:{port}", gateway=settings.gateway_name)
        for remark in remarks(settings):
            log.warning(remark)
        stopping = asyncio.create_task(stop.wait(), name="signal")
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        log.info("gateway stopping")
