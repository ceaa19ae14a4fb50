"""Run and watch a two-slot fine-tuning miner.

podium COMMAND --help explains a command, with examples. docs/start.md is a first run in ten minutes.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module

from podium.arguments import Parser
from shared.errors import PodiumError, SettingsError
from shared.logs import set_up_logs
from shared.version import version

# Each command's module in podium/commands, in the order of the help.
COMMANDS = {
    **{name: name for name in ("up", "demo", "offer", "status", "watch", "logs", "track")},
    **{name: f"fleet.{name}" for name in ("jobs", "cancel", "requeue", "drain", "resume")},
    "scores": "scores",
    **{name: name for name in ("plan", "train", "score", "policy", "doctor", "env", "settings")},
    **{name: f"broker.{name}" for name in ("keys", "bootstrap", "restore")},
    "completion": "completion",
    "entry": "contest.entry",
}
EXIT_CODES = """exit codes:
  0    done
  1    failed; the last line says why
  2    wrong arguments or settings
  3    offer: the offer was rejected
  130  ended by Ctrl-C"""


def parser(only: str | None = None) -> Parser:
    """Return the parser for all commands, or for one. Heavy modules are imported only when a command runs."""
    top = Parser(prog="podium", description=__doc__, epilog=EXIT_CODES)
    top.add_argument("--version", action="version", version=f"podium {version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in [only] if only in COMMANDS else COMMANDS:  # loading all takes 0.5 s, `plan` alone 0.2 s
        import_module(f"podium.commands.{COMMANDS[name]}").add_parser(commands)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit codes: 0 = done, 1 = failed, 2 = wrong arguments or settings, 130 = Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parser(given[0] if given else None).parse_args(given)
    if arguments is None:
        set_up_logs("console", "info")  # standard output belongs to the command's answer, which may be JSON
        if isinstance(sys.stdout, io.TextIOWrapper):  # a file or a pipe would get a line minutes later
            sys.stdout.reconfigure(line_buffering=True)
    try:
        code: int = args.run(args)
    except SettingsError as error:
        print(f"podium {args.command}: {error}", file=sys.stderr)
        return 2
    except PodiumError as error:
        print(f"podium {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # for example `podium settings | head`
        sys.stderr.close()
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
