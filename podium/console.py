"""Where commands print tables."""

from __future__ import annotations

from rich.console import Console

WIDE = 180  # columns of a table that goes into a file or a pipe, where nothing says how wide it may be


def make_console() -> Console:
    """Standard output: as wide as the terminal, else WIDE."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)
