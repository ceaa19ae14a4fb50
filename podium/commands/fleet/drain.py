"""`podium drain SLOT`: give a slot no new job; the job that it has is seen through.

The slot stays drained, also after restarts, until `podium resume SLOT`. With --wait the command returns when
the slot has no job left, so that its node can be stopped or its machine taken down.
"""

from __future__ import annotations

import argparse
import sys
import time

import msgspec

from gateway.views.schemas import SlotView
from podium.arguments import add_url, examples
from podium.client import Client, GatewayAwayError, find_gateway, stuck
from shared.errors import PodiumError

POLL_S = 1.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `drain` to the command line."""
    parser = subparsers.add_parser(
        "drain",
        help="give a slot no new job; its job is seen through",
        description=__doc__,
        epilog=examples("podium drain a", 'podium drain a --reason "new disk" --wait'),
    )
    add_slot(parser)
    parser.add_argument("--wait", action="store_true", help="return when the slot has no job left")
    parser.set_defaults(run=run)


def add_slot(parser: argparse.ArgumentParser) -> None:
    """Add what `drain` and `resume` take."""
    parser.add_argument("slot", metavar="SLOT", help="the slot's name")
    parser.add_argument("--reason", default="", help="stored with the operation, and shown")
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="print the gateway's answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Drain; exit code 1 and the reason if it is refused."""
    client = find_gateway(args.url)
    view = client.drain(slot_named(client, args.slot), args.reason)
    if args.wait:
        view = _until_empty(client, view)
    if args.json:
        print(msgspec.json.encode(view).decode())
    elif view.task is None:
        print(f"slot {view.slot} is drained and has no job; `podium resume {view.slot}` ends that")
    else:
        print(
            f"slot {view.slot} is drained: it gets no new job, and sees {view.task} ({view.state}) through; "
            f"`podium watch {view.task}` follows it"
        )
    return 0


def slot_named(client: Client, name: str) -> str:
    """Return the slot of this name, in whatever case it is given; the gateway refuses an unknown one."""
    slots = [view.slot for view in client.slots()]
    same = [slot for slot in slots if slot.lower() == name.lower()]
    return same[0] if name not in slots and len(same) == 1 else name


def _until_empty(client: Client, view: SlotView) -> SlotView:
    """Wait until the slot has neither a job nor a reservation; a gateway that restarts is waited for."""
    told = None
    while view.state != "free":
        if view.drain is None:
            raise PodiumError(f"slot {view.slot} was put to work again by someone else; nothing to wait for")
        if view.damaged is not None:
            raise PodiumError(stuck(str(view.task), view.state, view.damaged))
        if view.task != told:
            told = view.task
            print(f"waiting: slot {view.slot} has {view.task} ({view.state})", file=sys.stderr)
        time.sleep(POLL_S)
        try:
            slots = client.slots()
        except GatewayAwayError as error:
            print(f"waiting: {error}", file=sys.stderr)
            continue
        found = next((each for each in slots if each.slot == view.slot), None)
        if found is None:
            raise PodiumError(f"slot {view.slot} is not among the gateway's slots any more: see PODIUM_SLOTS")
        view = found
    return view
