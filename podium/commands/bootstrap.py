"""`podium bootstrap`: make the broker's streams with the admin's key; what is there is only checked."""

from __future__ import annotations

import argparse
import asyncio

from shared.broker.bus import connect
from shared.broker.credentials import ADMIN
from shared.broker.streams import bootstrap as make
from shared.broker.streams import when_usable
from shared.settings import Settings, load_settings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bootstrap` to the command line."""
    parser = subparsers.add_parser("bootstrap", help="make the broker's streams", description=__doc__)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make what is absent; 0 if everything is there and as it must be."""
    made = asyncio.run(bootstrap(load_settings()))
    print(f"made {', '.join(made)}" if made else "every stream is there")
    return 0


async def bootstrap(settings: Settings) -> list[str]:
    """Make every absent stream as the admin, once JetStream answers; returns the names of those made."""
    bus = await connect(settings, name="bootstrap", user=ADMIN)
    try:
        return await when_usable(bus, settings, lambda: make(bus, settings))
    finally:
        await bus.close()
