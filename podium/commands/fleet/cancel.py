"""`podium cancel`: short for `podium jobs cancel`."""

from __future__ import annotations

import argparse

from podium.commands.fleet.jobs import add_operation


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `cancel` to the command line."""
    add_operation(subparsers, "cancel", "podium cancel")
