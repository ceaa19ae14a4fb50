"""The parser of every command: help that keeps its lines, and errors that say what to do."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from typing import NoReturn

_WRONG_CHOICE = re.compile(r"invalid choice: '([^']*)'.*\(choose from (.*)\)", re.DOTALL)
_UNKNOWN = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_HOURS = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([smh]?)", re.IGNORECASE)
LONGEST_HOURS = 10.0**6


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest name for a mistyped one."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print one line that says what is wrong and what to do; exit with 2."""
        print(f"{self.prog}: {self._explained(message)}", file=sys.stderr)
        raise SystemExit(2)

    def _explained(self, message: str) -> str:
        if match := _WRONG_CHOICE.search(message):
            what = message.partition(":")[0].removeprefix("argument ")
            known = [name.strip().strip("'") for name in match[2].split(",")]  # quoted up to Python 3.13
            return f"{what}: {nearest(match[1], known)}"
        if match := _UNKNOWN.search(message):
            first = shlex.split(match[1])[0] if match[1].strip() else match[1]
            name = first.partition("=")[0]
            if name.startswith("--"):
                return nearest(name, sorted(set(_OPTION.findall(self.format_help()))), "option")
            return f"nothing takes the argument {first!r}; see `{self.prog} --help`"
        return f"{message}; see `{self.prog} --help`"

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Let each command report its own unknown options: the top parser doesn't know their names."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {shlex.join(unknown)}")
        return found, unknown


def nearest(given: str, known: list[str], what: str = "") -> str:
    """Return an error about an unknown name, with the nearest known one, or with all of them."""
    head = f"unknown {what} {given!r}" if what else f"there is no {given!r}"
    near = difflib.get_close_matches(given, known, n=1) or [name for name in known if name.startswith(given)]
    if near and given:
        return f"{head}; is {near[0]!r} meant?"
    return f"{head}; choose from {', '.join(known)}"


def examples(*lines: str) -> str:
    """Return the end of a command's help. A test parses each example."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def add_commands(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    words: str,
    description: str | None,
    *lines: str,
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    """Add a command that has commands of its own, with `lines` as its examples; to what these are added."""
    top = subparsers.add_parser(name, help=words, description=description, epilog=examples(*lines))
    return top.add_subparsers(dest=f"{name}_command", required=True, metavar="COMMAND")


def add_url(parser: argparse.ArgumentParser) -> None:
    """Add the gateway's address, as every command that asks the gateway takes it."""
    parser.add_argument("--url", help="the gateway's URL (default: from the settings)")


def hours(text: str) -> float:
    """Parse a time in hours, the unit of offers: `4`, `0.5`; or with its own unit: `30m`, `90s`, `2h`."""
    match = _HOURS.fullmatch(text.strip())
    found = float(match[1]) * _SECONDS[match[2].lower() or "h"] / 3600 if match else 0.0
    if not 0 < found < LONGEST_HOURS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 4 (hours), 30m or 90s")
    return found


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
