"""Print a script that completes commands and options in your shell. Add the line of your shell:

bash    eval "$(podium completion bash)"           in ~/.bashrc
zsh     eval "$(podium completion zsh)"            in ~/.zshrc, after compinit
fish    podium completion fish | source            in ~/.config/fish/config.fish
"""

from __future__ import annotations

import argparse
import importlib

from podium.arguments import examples
from shared.errors import PodiumError

SHELLS = ("bash", "zsh", "fish")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `completion` to the command line."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script for your shell that completes commands and options",
        description=__doc__,
        epilog=examples("podium completion bash", "podium completion zsh", "podium completion fish"),
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script; exit code 1 if the package that writes it is not installed."""
    try:
        shtab = importlib.import_module("shtab")
    except ImportError as error:
        raise PodiumError("completion needs the package shtab: pip install '.[completion]'") from error
    main = importlib.import_module("podium.__main__")  # it imports this module: a circle, were it at the top
    print(shtab.complete(main.parser(), shell=args.shell))
    return 0
