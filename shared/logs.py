"""Structured logs for every service: JSON or console, with the task and slot bound where there is one."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any, TextIO, cast

import structlog


class Outlet:
    """Where log lines go; what a full disk refuses is counted, told of later, and ends nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = 0

    def write(self, text: str) -> None:
        """Write a line, if it can be written."""
        try:
            if self._lost:
                self._stream.write(f"\n[{self._lost} log lines could not be written before this one]\n")
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._lost += text.count("\n")
        else:
            self._lost = 0

    def flush(self) -> None:
        """Nothing to do: every line is flushed."""


def set_up_logs(log_format: str, log_level: str, **bound: Any) -> None:
    """Configure structlog for this process; `bound` (such as service and slot) is in every line.

    Lines go to standard error: standard output belongs to a command's results.
    """
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, pad_level=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, Outlet(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)
    # nats-py and aiohttp use the standard library's logging; nothing below a warning is for operators
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")


def log_context(**values: Any) -> AbstractContextManager[None]:
    """Have `values`, such as a task, in every line of what is done inside, also by tasks that start there."""
    context: AbstractContextManager[None] = structlog.contextvars.bound_contextvars(**values)
    return context


def get_logger() -> Any:
    """A logger; bind `task` and `slot` on it where they are known."""
    return structlog.get_logger()
