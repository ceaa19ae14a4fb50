"""Errors that cross module borders; each is raised narrowly, with a text that explains what to do."""

from __future__ import annotations

from shared.messages.runs import ErrorCode


class PodiumError(Exception):
    """Base of all errors that Podium raises on purpose; the text is for people."""


class SettingsError(PodiumError):
    """A setting is unknown or has a value that can't be used."""


class BusError(PodiumError):
    """Base of all errors of the broker."""


class BusUnavailableError(BusError):
    """The broker can't be reached now; nothing was sent."""


class NobodyAnswersError(BusUnavailableError):
    """Connected, but nothing answers on the subject: the stream does not exist, or JetStream is starting."""


class DeniedError(BusError):
    """The broker knows this service's user but does not permit an operation that it needs."""


class RefusedError(PodiumError):
    """The broker refuses this process: wrong key, no TLS, wrong CA. Retrying can't help."""


class BusTimeoutError(BusError):
    """No answer came: what was sent may or may not be stored. Read before retrying."""


class ConflictError(BusError):
    """A compare-and-set found another last sequence than expected: someone else was faster."""


class IncompatibleStreamError(BusError):
    """A stream exists with a configuration that would break a promise."""


class StoreFullError(BusError):
    """The broker refused an append because the stream is full."""


class EngineError(PodiumError):
    """A run can't continue; `code` is the reason that the node must know."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class DataError(EngineError):
    """The data can't be used; the text names file, row and column as far as they are known."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.BAD_DATA, message)


class DataUnavailableError(DataError):
    """The data can't be had here and now; others may have it: the cause may be a network, a token, a disk."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = ErrorCode.DATA_UNAVAILABLE


class PlanError(EngineError):
    """No plan fits the hardware and the deadline."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.DOES_NOT_FIT, message)


def is_failure(error: BaseException) -> bool:
    """Return whether an error says that a library failed, and not that memory or this process is at its end.

    A panic of a library in Rust is no `Exception`, and its class can't be imported.
    """
    return (isinstance(error, Exception) and not isinstance(error, MemoryError)) or (
        type(error).__name__ == "PanicException"
    )


def in_a_line(error: BaseException, length: int = 200) -> str:
    """Return an error's type and text in one line."""
    text = " ".join(str(error).split())[:length].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
