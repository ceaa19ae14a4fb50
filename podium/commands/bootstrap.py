"""`podium bootstrap`: make the broker's streams with the admin's key; what is there is only checked."""

from __future__ import annotations

import argparse
import asyncio

from podium.local.nats_server import bootstrap
from shared.settings import load_settings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bootstrap` to the command line."""
    parser = subparsers.add_parser("bootstrap", help="make the broker's streams", description=__doc__)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make what is absent; 0 if everything is there and as it must be."""
    made = asyncio.run(bootstrap(load_settings()))
    print(f"made {', '.join(made)}" if made else "every stream is there")
    return 0
