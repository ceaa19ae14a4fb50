"""`podium bootstrap`: create and upgrade the broker's streams with the admin's key.

Missing streams are created. Existing ones are checked, and get more room where the settings' limits have
grown. A log of all slots' states, as older versions had, is split into a log for each slot.
"""

from __future__ import annotations

import argparse
import asyncio

from podium.arguments import examples
from shared.settings_sources import load_settings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bootstrap` to the command line."""
    parser = subparsers.add_parser(
        "bootstrap",
        help="create and upgrade the broker's streams",
        description=__doc__,
        epilog=examples("podium bootstrap"),
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Create and upgrade the streams; exit code 0 if all exist and are configured correctly."""
    from podium.local.nats_server import bootstrap

    made = asyncio.run(bootstrap(load_settings()))
    print(f"created {', '.join(made)}" if made else "all streams exist")
    return 0
