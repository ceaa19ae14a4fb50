"""Send many requests at one moment; record each response's status, body and time."""

from __future__ import annotations

import json
import select
import time
from collections import deque
from typing import Any

from msgspec import Struct

from bench.harness.http_load_client import Lane

PATIENCE_S = 15.0
NO_ANSWER = 0  # the status of a request whose connection ended, or that nobody answered


class Shot(Struct, frozen=True):
    """One request and where it goes."""

    task: str
    port: int
    request: bytes


class Answer(Struct, frozen=True):
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


class Volley:
    """All shots, over so many connections that are open before the first is sent."""

    def __init__(self, shots: list[Shot], connections: int) -> None:
        self.answers: list[Answer] = []
        self._waiting = {port: deque[Shot]() for port in sorted({shot.port for shot in shots})}
        for shot in shots:
            self._waiting[shot.port].append(shot)
        self._count = len(shots)
        self._poll = select.epoll()
        self._lanes: dict[int, tuple[Lane, int]] = {}  # by descriptor: connection and port
        self._flying: dict[int, Shot] = {}
        ports = list(self._waiting)
        for number in range(connections):
            self._open(ports[number % len(ports)])
        self._began = 0.0

    def fire(self) -> list[Answer]:
        """Send everything, wait for everything."""
        self._began = time.perf_counter()
        for descriptor in list(self._lanes):
            self._next(descriptor)
        while len(self.answers) < self._count:
            ready = self._poll.poll(PATIENCE_S)
            if not ready:
                break
            for descriptor, _ in ready:
                if descriptor in self._lanes:
                    self._receive(descriptor)
        for shot in self._flying.values():
            self._note(shot, NO_ANSWER, "no answer", self._began)
        for lane, _ in self._lanes.values():
            lane.socket.close()
        self._poll.close()
        return self.answers

    def _open(self, port: int) -> int:
        lane = Lane(port)
        descriptor = lane.socket.fileno()
        self._lanes[descriptor] = lane, port
        self._poll.register(descriptor, select.EPOLLIN)
        return descriptor

    def _next(self, descriptor: int) -> None:
        lane, port = self._lanes[descriptor]
        if self._waiting[port]:
            shot = self._flying[descriptor] = self._waiting[port].popleft()
            try:
                lane.send(shot.request)
            except OSError as error:
                self._broken(descriptor, error)

    def _receive(self, descriptor: int) -> None:
        lane, _ = self._lanes[descriptor]
        try:
            data = lane.receive()
        except OSError as error:
            self._broken(descriptor, error)
            return
        if data is None:
            return
        head, _, body = data.partition(b"\r\n\r\n")
        self._note(self._flying.pop(descriptor), int(head[9:12]), body, lane.sent_at)
        self._next(descriptor)

    def _broken(self, descriptor: int, error: OSError) -> None:
        """A connection ended: its request has no answer, and the next goes over a new one."""
        lane, port = self._lanes.pop(descriptor)
        self._poll.unregister(descriptor)
        lane.socket.close()
        if shot := self._flying.pop(descriptor, None):
            self._note(shot, NO_ANSWER, repr(error), lane.sent_at)
        if self._waiting[port]:
            try:
                self._next(self._open(port))
            except OSError as refused:
                self._note(self._waiting[port].popleft(), NO_ANSWER, repr(refused), time.perf_counter())

    def _note(self, shot: Shot, status: int, body: bytes | str, sent_at: float) -> None:
        try:
            value = json.loads(body)
        except ValueError:
            value = str(body)
        now = time.perf_counter()
        self.answers.append(Answer(shot.task, status, value, now - self._began, now - sent_at))
