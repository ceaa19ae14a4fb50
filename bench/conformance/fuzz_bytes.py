"""Malformed HTTP: garbage, wrong lengths, huge headers, pipelines, slow bodies."""

from __future__ import annotations

import random
import re
import select
import socket
import time
from collections.abc import Callable

from msgspec import Struct

OPEN = b"POST /task_offer/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
LISTEN_S = 0.3  # after the last byte; who has not answered then is left
LAST_S = 5.0  # for a request that is whole and must be answered


class Case(Struct, frozen=True):
    """Pieces to send, pauses between them, and how many answers a server must give."""

    name: str
    pieces: list[bytes]
    pause_s: float = 0.0
    answers: int | None = None  # None: that is the server's to decide
    half_close: bool = False


Maker = Callable[[random.Random], Case]


def garbage(chance: random.Random) -> Case:
    """Bytes."""
    return Case("garbage", [chance.randbytes(chance.choice((1, 10, 1000, 100_000)))])


def almost(chance: random.Random) -> Case:
    """Return a request with some bytes replaced."""
    data = bytearray(OPEN + b"Content-Length: 2\r\n\r\n{}")
    for _ in range(chance.randint(1, 5)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return Case("bytes replaced", [bytes(data)], half_close=True)


def cut_off(chance: random.Random) -> Case:
    """Close the connection in the middle of a request."""
    data = OPEN + b"Content-Length: 500\r\n\r\n" + b"{" * 400
    return Case("cut off", [data[: chance.randrange(1, len(data))]], half_close=chance.random() < 0.5)


def lying_length(chance: random.Random) -> Case:
    """Send a Content-Length that is malformed or not this body's."""
    length = chance.choice(
        (b"-1", b"1e3", b"99999999999999999999", b"0x10", b"", b"1, 1", b"\xd9\xa1", b"+5", b"1")
    )
    return Case(
        "Content-Length " + length.decode("latin-1"), [OPEN + b"Content-Length: " + length + b"\r\n\r\n{}[]"]
    )


def two_lengths(chance: random.Random) -> Case:
    """Return a request with contradictory lengths, as in request smuggling."""
    headers = chance.choice(
        (
            b"Content-Length: 2\r\nContent-Length: 3\r\n",
            b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
            b"Transfer-Encoding: xchunked\r\n",
            b"Transfer-Encoding : chunked\r\n",
        )
    )
    return Case("two lengths", [OPEN + headers + b"\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"])


def chunks(chance: random.Random) -> Case:
    """Chunks with sizes that are none."""
    size = chance.choice((b"zz", b"-1", b"ffffffffffffffffff", b"5;" + b"x" * 5000, b"", b"5\n"))
    return Case(
        "bad chunks", [OPEN + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\nhello\r\n0\r\n\r\n"]
    )


def good_chunks(chance: random.Random) -> Case:
    """Send a body in pieces, as HTTP allows; it is refused, as it is not signed."""
    pieces = [b"1\r\n" + bytes([byte]) + b"\r\n" for byte in b'{"a": 1}'] + [b"0\r\n\r\n"]
    return Case("good chunks", [OPEN + b"Transfer-Encoding: chunked\r\n\r\n", *pieces], answers=1)


def huge_headers(chance: random.Random) -> Case:
    """Too long, or too many."""
    if chance.random() < 0.5:
        return Case(
            "a huge header",
            [GET + b"X-Large: " + b"x" * chance.choice((9_000, 100_000, 2_000_000)) + b"\r\n\r\n"],
        )
    return Case("many headers", [GET + b"X-One: 1\r\n" * chance.choice((200, 20_000)) + b"\r\n"])


def long_path(chance: random.Random) -> Case:
    """Send a path that is too long, or has bytes that no path has."""
    path = chance.choice(
        (
            b"/" + b"a" * 70_000,
            b"/\x00",
            b"/\xff\xfe",
            b"//",
            b"*",
            b"http://x/healthz",
            b"/%",
            b"/?" + b"&" * 5000,
        )
    )
    return Case("odd path", [b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"])


def odd_protocol(chance: random.Random) -> Case:
    """Other protocols, other versions, other methods."""
    line = chance.choice(
        (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET /\r\n",
            b"GET /healthz HTTP/1.0\r\n\r\n",
            b"GET /healthz HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
            b"G@T /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /healthz HTTP/1.1\nHost: x\n\n",
            GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
            OPEN + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
            OPEN + b"Expect: miracles\r\nContent-Length: 2\r\n\r\n{}",
        )
    )
    return Case("odd protocol", [line])


def pipeline(chance: random.Random) -> Case:
    """Many requests in one packet: every one is answered."""
    count = chance.choice((2, 10, 50))
    return Case("pipeline", [(GET + b"\r\n") * count], answers=count)


def slow_body(chance: random.Random) -> Case:
    """Send a whole body byte by byte."""
    body = b'{"task_id": "x"}'
    head = OPEN + b"Content-Length: %d\r\n\r\n" % len(body)
    return Case("slow body", [head, *(bytes([byte]) for byte in body)], pause_s=0.005, answers=1)


def events(chance: random.Random) -> Case:
    """Ask for the stream of events with odd parameters, and leave."""
    query = chance.choice(
        (b"", b"?after=0", b"?after=x", b"?types=,", b"?types=nonsense", b"?task=%00", b"?no=1")
    )
    last = chance.choice((b"", b"Last-Event-ID: 0\r\n", b"Last-Event-ID: \xff\r\n"))
    return Case("events", [b"GET /v1/events" + query + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" + last + b"\r\n"])


def never_whole(chance: random.Random) -> Case:
    """Promise a body that never comes."""
    return Case("never whole", [OPEN + b"Content-Length: 5000\r\n\r\n", b"{"])


MAKERS: tuple[Maker, ...] = (
    garbage,
    almost,
    cut_off,
    lying_length,
    two_lengths,
    chunks,
    good_chunks,
    huge_headers,
    long_path,
    odd_protocol,
    pipeline,
    slow_body,
    events,
    never_whole,
)


def make(chance: random.Random) -> Case:
    """Return a random case."""
    return chance.choice(MAKERS)(chance)


def attempt(port: int, case: Case) -> list[int]:
    """Send a case over its own connection; return the received statuses."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=LAST_S) as connection:
        try:
            for piece in case.pieces:
                connection.sendall(piece)
                if case.pause_s:
                    time.sleep(case.pause_s)
            if case.half_close:
                connection.shutdown(socket.SHUT_WR)
            listen(connection, case, received)
        except OSError:
            pass  # the server hung up: on such requests it may
    return [int(status) for status in STATUS.findall(bytes(received))]


def listen(connection: socket.socket, case: Case, received: bytearray) -> None:
    """Read until all responses are complete, the server hangs up, or the time is over."""
    until = time.monotonic() + (LISTEN_S if case.answers is None else LAST_S)
    while (left := until - time.monotonic()) > 0:
        if not select.select([connection], [], [], left)[0]:
            return
        data = connection.recv(1 << 16)
        received += data
        if not data or (case.answers and len(STATUS.findall(bytes(received))) >= case.answers):
            return
