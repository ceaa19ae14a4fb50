"""Send many requests at one moment; record each response's status, body and time."""

from __future__ import annotations

import json
import select
import time
from collections import deque
from typing import Any

from msgspec import Struct

from bench.harness.http_load_client import Connection

PATIENCE_S = 15.0
NO_RESPONSE = 0  # the status of a request whose connection ended, or that got no response in time


class BurstRequest(Struct, frozen=True):
    """One request and where it goes."""

    task: str
    port: int
    request: bytes


class Response(Struct, frozen=True):
    """A response, with the seconds since the burst began and since its own request was sent."""

    task: str
    status: int
    body: Any
    after_s: float
    took_s: float

    @property
    def accepted(self) -> bool:
        """Return whether it accepts an offer."""
        return self.status == 200 and isinstance(self.body, dict) and self.body.get("accepted") is True


class BurstClient:
    """Sends requests over connections that are all open before the first is sent."""

    def __init__(self, requests: list[BurstRequest], connections: int) -> None:
        self.responses: list[Response] = []
        self._waiting = {port: deque[BurstRequest]() for port in sorted({each.port for each in requests})}
        for request in requests:
            self._waiting[request.port].append(request)
        self._count = len(requests)
        self._poll = select.epoll()
        self._connections: dict[int, tuple[Connection, int]] = {}  # by descriptor: connection and port
        self._pending: dict[int, BurstRequest] = {}
        ports = list(self._waiting)
        for number in range(connections):
            self._open(ports[number % len(ports)])
        self._began = 0.0

    def send(self) -> list[Response]:
        """Send everything and wait for every response."""
        self._began = time.perf_counter()
        for descriptor in list(self._connections):
            self._next(descriptor)
        while len(self.responses) < self._count:
            ready = self._poll.poll(PATIENCE_S)
            if not ready:
                break
            for descriptor, _ in ready:
                if descriptor in self._connections:
                    self._receive(descriptor)
        for request in self._pending.values():
            self._note(request, NO_RESPONSE, "no response", self._began)
        for connection, _ in self._connections.values():
            connection.socket.close()
        self._poll.close()
        return self.responses

    def _open(self, port: int) -> int:
        connection = Connection(port)
        descriptor = connection.socket.fileno()
        self._connections[descriptor] = connection, port
        self._poll.register(descriptor, select.EPOLLIN)
        return descriptor

    def _next(self, descriptor: int) -> None:
        connection, port = self._connections[descriptor]
        if self._waiting[port]:
            request = self._pending[descriptor] = self._waiting[port].popleft()
            try:
                connection.send(request.request)
            except OSError as error:
                self._reconnect(descriptor, error)

    def _receive(self, descriptor: int) -> None:
        connection, _ = self._connections[descriptor]
        try:
            data = connection.receive()
        except OSError as error:
            self._reconnect(descriptor, error)
            return
        if data is None:
            return
        head, _, body = data.partition(b"\r\n\r\n")
        self._note(self._pending.pop(descriptor), int(head[9:12]), body, connection.sent_at)
        self._next(descriptor)

    def _reconnect(self, descriptor: int, error: OSError) -> None:
        """Record that a request got no response, and send the next over a new connection."""
        connection, port = self._connections.pop(descriptor)
        self._poll.unregister(descriptor)
        connection.socket.close()
        if request := self._pending.pop(descriptor, None):
            self._note(request, NO_RESPONSE, repr(error), connection.sent_at)
        if self._waiting[port]:
            try:
                self._next(self._open(port))
            except OSError as refused:
                self._note(self._waiting[port].popleft(), NO_RESPONSE, repr(refused), time.perf_counter())

    def _note(self, request: BurstRequest, status: int, body: bytes | str, sent_at: float) -> None:
        try:
            value = json.loads(body)
        except ValueError:
            value = str(body)
        now = time.perf_counter()
        self.responses.append(Response(request.task, status, value, now - self._began, now - sent_at))
