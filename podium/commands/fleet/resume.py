"""`podium resume SLOT`: let a drained slot get jobs again."""

from __future__ import annotations

import argparse

import msgspec

from podium.arguments import examples
from podium.client import find_gateway
from podium.commands.fleet.drain import add_slot, slot_named


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `resume` to the command line."""
    parser = subparsers.add_parser(
        "resume",
        help="let a drained slot get jobs again",
        description=__doc__,
        epilog=examples("podium resume a"),
    )
    add_slot(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """End a drain; exit code 1 and the reason if it is refused."""
    client = find_gateway(args.url)
    view = client.resume(slot_named(client, args.slot), args.reason)
    if args.json:
        print(msgspec.json.encode(view).decode())
    else:
        now = "may get jobs" if view.live else "may get jobs as soon as its node is up"
        print(f"slot {view.slot} {now}")
    return 0
