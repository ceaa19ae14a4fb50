"""Clients that hold connections without using them: each kind of attack, in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Final

from bench.fake_validator.validator import OFFER

DRIP_S: Final = 1.0  # between the bytes of one slow client
REOPEN_S: Final = 0.5  # before a client whose connection was closed comes back
PIPELINED: Final = 200  # requests of one client at once
HEAD: Final = f"POST {OFFER} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
BODY_HEAD: Final = HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
SMALL: Final = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
LARGE: Final = b"GET /v1/openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Connect and send nothing."""
    await reader.read()


async def silent_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Connect, send nothing, and don't come back when the connection is closed."""
    await reader.read()
    await asyncio.Event().wait()


async def slow_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send a head that never ends (slowloris)."""
    writer.write(HEAD)
    await _drip(reader, writer, b"X-More: x\r\n")


async def slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send a head, and then a body byte by byte."""
    writer.write(BODY_HEAD)
    await _drip(reader, writer, b" ")


async def half_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close the sending side amid a head, and keep the other one open."""
    writer.write(HEAD)
    writer.write_eof()
    await reader.read()


async def pipelined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send many requests at once, again and again, and read every response."""
    while True:
        writer.write(SMALL * PIPELINED)
        for _ in range(PIPELINED):
            if not await reader.readuntil(b"\r\n\r\n"):
                return
            await reader.readuntil(b"}")


async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ask for large responses and read none of them."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(LARGE * PIPELINED)
    while not writer.transport.is_closing():
        await asyncio.sleep(DRIP_S)
        writer.write(LARGE)


async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Connect, send a small request and leave without its response."""
    writer.write(SMALL)


SLOW: Final = (silent, slow_head, slow_body, half_closed)
FLOODS: Final = (pipelined, deaf, hasty)  # these keep the gateway busy: a tenth as many clients
KINDS: Final = tuple(client.__name__ for client in (*SLOW, *FLOODS))
CLIENTS: Final[dict[str, Client]] = {client.__name__: client for client in (*SLOW, *FLOODS, silent_once)}


@contextmanager
def attack(kind: str, port: int, clients: int) -> Iterator[None]:
    """Let so many clients attack while the context lasts; it begins once each of them has connected."""
    context = multiprocessing.get_context("spawn")
    begun, ended = context.Event(), context.Event()
    process = context.Process(target=_attack, args=(kind, port, clients, begun, ended), daemon=True)
    process.start()
    try:
        if not begun.wait(60):
            raise TimeoutError(f"{kind}: not all of {clients} clients could connect within a minute")
        yield
    finally:
        ended.set()
        process.join(30)
        process.kill()


def _attack(kind: str, port: int, clients: int, begun: Event, ended: Event) -> None:
    asyncio.run(_all_clients(CLIENTS[kind], port, clients, begun, ended))


async def _all_clients(client: Client, port: int, clients: int, begun: Event, ended: Event) -> None:
    connected: set[int] = set()
    tasks = [asyncio.create_task(_for_ever(client, port, number, connected)) for number in range(clients)]
    while not ended.is_set():
        await asyncio.sleep(0.1)
        if len(connected) == clients:
            begun.set()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _for_ever(client: Client, port: int, number: int, connected: set[int]) -> None:
    """Connect again whenever the gateway has closed the connection."""
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, family=socket.AF_INET)
            connected.add(number)
            try:
                await client(reader, writer)
            finally:
                writer.transport.abort()
        await asyncio.sleep(REOPEN_S)


async def _drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, drop: bytes) -> None:
    while not reader.at_eof() and not writer.transport.is_closing():
        writer.write(drop)
        await asyncio.sleep(DRIP_S)
