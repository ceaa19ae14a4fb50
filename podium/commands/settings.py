"""`podium settings`: list every setting with its type, default and meaning."""

from __future__ import annotations

import argparse

from rich.table import Table

from podium.console import make_console
from shared.settings_sources import CONFIG_VARIABLE, describe_settings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `settings` to the command line."""
    parser = subparsers.add_parser("settings", help="list every setting", description=__doc__)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    table = Table(
        title=f"Environment variables; they override the TOML file that {CONFIG_VARIABLE} names", box=None
    )
    for column in ("variable", "type", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "variable")
    for row in describe_settings():
        table.add_row(*row)
    make_console().print(table, markup=False)
    return 0
