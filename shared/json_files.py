"""Read the JSON files that Podium keeps for itself: a damaged one counts as absent, and is logged."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from shared.logs import get_logger

# What msgspec raises on damaged bytes: its own errors, UnicodeDecodeError inside a string (both are
# ValueErrors), and RecursionError on a thousand brackets in a row.
UNREADABLE: Final = (ValueError, RecursionError)

T = TypeVar("T")

log = get_logger()


class DamagedFileError(ValueError):
    """A file is there, and its content isn't what was written."""


def load_json(path: Path, kind: type[T]) -> T:
    """Return what a file holds. Raises DamagedFileError and OSError, which both name the path."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except UNREADABLE as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def read_json(path: Path, kind: type[T]) -> T | None:
    """Return what a file holds; None if it is absent, or damaged, which is logged once. Raises OSError."""
    try:
        return load_json(path, kind)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedFileError as error:
        _warn(str(error))
        return None


def read_json_if_possible(path: Path, kind: type[T]) -> T | None:
    """Do as `read_json`, for a file without which all goes on: one that can't be read counts as absent."""
    try:
        return read_json(path, kind)
    except OSError as error:
        _warn(f"{path} can't be read: {error.strerror}")
        return None


@lru_cache(maxsize=64)  # a node looks at some files several times a second
def _warn(reason: str) -> None:
    log.warning("a file counts as absent", reason=reason)
