"""Show every setting: its value here, where that comes from, its default and meaning.

Environment variables override the TOML file that PODIUM_CONFIG names. `podium up` also gives some
settings that are left at their default another value: models_dir, dataset_roots, and the slots' hardware.
Secrets are in files that settings name; they are not shown.
"""

from __future__ import annotations

import argparse

import msgspec
from rich.markup import escape
from rich.table import Table

from podium.arguments import examples
from podium.console import make_console
from shared.settings_sources import SettingInForce, settings_in_force, shown


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `settings` to the command line."""
    parser = subparsers.add_parser(
        "settings",
        help="show every setting, its value and its source",
        description=__doc__,
        epilog=examples("podium settings", "podium settings --set", "podium settings --markdown"),
    )
    parser.add_argument("--set", action="store_true", help="only settings that are not left at their default")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list")
    form.add_argument(
        "--markdown",
        action="store_true",
        help="print the table of docs/settings.md: names, defaults, meanings",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the settings in force."""
    settings = [one for one in settings_in_force() if not args.set or one.source != "default"]
    if args.json:
        print(msgspec.json.encode(settings).decode())
    elif args.markdown:
        print(markdown(settings))
    else:
        make_console().print(table(settings))
    return 0


def markdown(settings: list[SettingInForce]) -> str:
    """Return the settings as a table for a document; nothing in it is of this machine."""
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for one in settings:
        default = f"`{shown(one.default)}`" if shown(one.default) else "empty"
        meaning = f"{one.meaning} ({one.type})".replace("<", "&lt;").replace("|", "or")
        lines.append(f"| `{one.variable}` | {default} | {meaning} |")
    return "\n".join(lines)


def table(settings: list[SettingInForce]) -> Table:
    """Return a table with one row per setting; what is set here stands out."""
    made = Table(box=None)
    for column in ("variable", "value", "from", "default", "meaning"):
        made.add_column(column, overflow="fold", no_wrap=column == "variable")
    for one in settings:
        own = one.source != "default"
        value, default = escape(shown(one.value)), escape(shown(one.default)) if own else ""
        made.add_row(
            one.variable,
            f"[bold]{value}[/]" if own else value,
            escape(one.source),
            default,
            escape(f"{one.meaning} ({one.type})"),
        )
    return made
