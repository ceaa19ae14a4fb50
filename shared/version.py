"""Which Podium this is."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """The installed package's version; `source` for a tree that was never installed."""
    try:
        return metadata.version("podium")
    except metadata.PackageNotFoundError:
        return "source"
