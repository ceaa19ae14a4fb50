"""`podium requeue`: short for `podium jobs requeue`."""

from __future__ import annotations

import argparse

from podium.commands.fleet.jobs import add_operation


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `requeue` to the command line."""
    add_operation(subparsers, "requeue", "podium requeue")
