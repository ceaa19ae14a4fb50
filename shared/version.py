"""The version of Podium."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """Return the installed package's version; `source` for a tree that was never installed."""
    try:
        return metadata.version("podium")
    except metadata.PackageNotFoundError:
        return "source"
