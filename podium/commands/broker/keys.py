"""`podium keys`: make the users' keys, the broker's permissions and certificate, and the token of /v1.

    DIR/<user>/<user>.nk, ca.crt    one folder per user: all that its process needs, no other user's secret
    DIR/broker/users.conf, server.crt, server.key    all that the broker needs
    DIR/gateway/api.token           tokens for /v1; added lines, such as `name: token`, are kept
    DIR/metrics/podium.token        that file's first token alone, for Prometheus
    DIR/ca/ca.crt, ca.key           only for making certificates: keep it off the machines with services

Existing files are kept, so the command can run before every start; --rotate replaces one item.
If a seed was moved to another machine, the .pub that stays in its folder keeps the user.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from podium.arguments import examples
from podium.security.key_files import API, BROKER, CA, make_api_token, make_certificates, make_users
from podium.security.permissions import users
from shared.settings_sources import load_settings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `keys` to the command line."""
    parser = subparsers.add_parser(
        "keys",
        help="make the broker's users, keys and certificates",
        description=__doc__,
        epilog=examples("podium keys ~/.podium/keys", "podium keys ~/.podium/keys --rotate api"),
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the keys; made if missing")
    parser.add_argument(
        "--host", action="append", default=[], help="an additional name or address of the broker (repeatable)"
    )
    parser.add_argument(
        "--rotate",
        action="append",
        default=[],
        metavar="WHAT",
        help=f"replace a user's key; or {BROKER}: its certificate, {CA}: the CA and that certificate, "
        f"{API}: the token (repeatable)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make what is missing and print the paths, never a secret."""
    folder: Path = args.folder.expanduser().absolute()
    slots = load_settings().slots
    made = make_users(folder, slots, rotate=args.rotate)
    made += make_api_token(folder, rotate=args.rotate)
    made += make_certificates(folder, args.host, [user.name for user in users(slots)], rotate=args.rotate)
    for path in made:
        print(f"made     {path}")
    if not made:
        print(f"nothing to make: {folder} is complete")
    elif args.rotate:
        print(
            "next     reload the broker (SIGHUP), then restart what uses the new files; see docs/security.md"
        )
    return 0
