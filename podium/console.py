"""The console on which commands print tables."""

from __future__ import annotations

from rich.console import Console

WIDE = 180  # columns of a table that goes to a file or a pipe, which have no width


def make_console() -> Console:
    """Return a console on standard output, as wide as the terminal, else WIDE."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)
