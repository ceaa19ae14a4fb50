"""`podium keys`: every user's secret, the broker's certificate and list of who may do what, /v1's token.

    DIR/<user>/<user>.nk, ca.crt    one folder for each user: all that its process needs, and nobody else's
    DIR/broker/users.conf, server.crt, server.key    all that the broker needs
    DIR/gateway/api.token           what /v1 asks for; further lines, such as `name: token`, are kept
    DIR/ca/ca.crt, ca.key           only for making certificates: keep it where no service runs

What is there is kept, so that the command can run before every start; --rotate replaces one thing.
A folder whose seed was taken to another machine keeps its .pub, and that user stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from podium.security.key_files import API, BROKER, CA, make_api_token, make_certificates, make_users
from podium.security.permissions import users
from shared.settings import load_settings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `keys` to the command line."""
    parser = subparsers.add_parser(
        "keys",
        help="make the broker's users, keys and certificates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where they are, or will be")
    parser.add_argument(
        "--host", action="append", default=[], help="a further name or address of the broker (repeatable)"
    )
    parser.add_argument(
        "--rotate",
        action="append",
        default=[],
        metavar="WHAT",
        help=f"replace a user's key, or {BROKER}: its certificate, or {CA}: that and the CA, or {API}: the "
        "token (repeatable)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make what is missing, say what was made; never a secret."""
    folder: Path = args.folder.expanduser().absolute()
    slots = load_settings().slots
    made = make_users(folder, slots, rotate=args.rotate)
    made += make_api_token(folder, rotate=args.rotate)
    made += make_certificates(folder, args.host, [user.name for user in users(slots)], rotate=args.rotate)
    for path in made:
        print(f"made     {path}")
    if not made:
        print(f"nothing to make: everything is in {folder}")
    elif args.rotate:
        print("next     reload the broker (SIGHUP), then start what uses the new files; see docs/security.md")
    return 0
