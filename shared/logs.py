"""Structured logs for every service: JSON or console, with the task and slot bound where there is one."""

from __future__ import annotations

import asyncio
import atexit
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict


class Outlet:
    """The output of log lines; lines that a full disk refuses are counted and reported later.

    On an event loop, the lines of one turn are written together at the next: a write takes as long as
    deciding on an offer.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = 0
        self._waiting: list[str] = []
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        """Write a line, if it can be written."""
        with self._lock:  # threads log too
            self._waiting.append(text)
            first = len(self._waiting) == 1
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.put()
            return
        if first:
            loop.call_soon(self.put)

    def put(self) -> None:
        """Write what waits."""
        with self._lock:
            waiting, self._waiting = "".join(self._waiting), []
        if not waiting:
            return
        try:
            if self._lost:
                self._stream.write(f"\n[{self._lost} log lines could not be written before this one]\n")
            self._stream.write(waiting)
            self._stream.flush()
        except OSError:
            self._lost += waiting.count("\n")
        else:
            self._lost = 0

    def flush(self) -> None:
        """Do nothing: lines are written by themselves."""


class Stamp:
    """Put the time (RFC 3339, UTC, microseconds) into an event; its seconds are made once a second."""

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._second = -1
        self._text = ""

    def __call__(self, _: Any, __: str, event: EventDict) -> EventDict:
        """Stamp one event."""
        second, rest = divmod(self._clock(), 10**9)
        if second != self._second:
            self._second, self._text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        event["timestamp"] = f"{self._text}.{rest // 1000:06d}Z"
        return event


def set_up_logs(log_format: str, log_level: str, **bound: Any) -> None:
    """Configure structlog for this process; `bound` (such as service and slot) is in every line.

    Lines go to standard error: standard output belongs to a command's results.
    """
    renderer: Any = (
        structlog.processors.JSONRenderer(serializer=_json)
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, pad_level=False)
    )
    outlet = Outlet(sys.stderr)
    atexit.register(outlet.put)  # a loop that ends takes no more turns
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            partial(_bind, bound),
            structlog.processors.add_log_level,
            Stamp(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, log_level.upper())),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, outlet)),
        cache_logger_on_first_use=True,
    )
    # nats-py and aiohttp use the standard library's logging; nothing below a warning is for operators
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")


def _bind(bound: dict[str, Any], _: Any, __: str, event: EventDict) -> EventDict:
    """Add the values bound for the whole process; reading a context of its own would take longer."""
    return {**bound, **event}


def _json(event: Any, **_: Any) -> str:
    """Return one line, three times faster than the standard library; other types are written by `repr`."""
    return msgspec.json.encode(event, enc_hook=repr).decode()


def log_context(**values: Any) -> AbstractContextManager[None]:
    """Add `values`, such as a task, to every line logged inside, also by asyncio tasks that start there."""
    context: AbstractContextManager[None] = structlog.contextvars.bound_contextvars(**values)
    return context


def get_logger() -> Any:
    """Return a logger; bind `task` and `slot` on it where they are known."""
    return structlog.get_logger()


class TroubleLog:
    """Decide which errors of a retry loop to log: each once, not at every retry, until it is over."""

    def __init__(self) -> None:
        self._newest: str | None = None

    @property
    def lasts(self) -> bool:
        """Return whether the newest try failed."""
        return self._newest is not None

    def is_new(self, error: Exception) -> bool:
        """Note an error; return whether to log it: its text differs from the previous one's."""
        previous, self._newest = self._newest, str(error)
        return self._newest != previous

    def over(self) -> None:
        """Note a success: the same error is to be logged again."""
        self._newest = None
