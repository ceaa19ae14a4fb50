"""`podium policy`: list the policies, or replay one over a trace of offers."""

from __future__ import annotations

import argparse
from math import isfinite
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from gateway.learning.rates import LearnedRates
from gateway.policy.builtin import BUILT_IN
from gateway.policy.loader import load_policy
from podium.arguments import add_commands, examples
from podium.console import make_console
from podium.simulation.replay import Report, Rules, replay
from podium.simulation.trace import Trace, read_trace
from shared.clock import DAY_S
from shared.planning.hardware import parse_hardware
from shared.settings import Settings
from shared.settings_sources import load_settings

MOST_SLOTS = 1000


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `policy` and its own commands to the command line."""
    commands = add_commands(
        subparsers,
        "policy",
        "list policies, replay one over a trace",
        __doc__,
        "podium policy list",
        "podium policy replay decisions.jsonl",
    )
    listing = commands.add_parser(
        "list",
        help="list the built-in policies",
        epilog=examples("podium policy list", "podium policy list --json"),
    )
    listing.add_argument("--json", action="store_true", help="print a JSON object: summaries by name")
    listing.set_defaults(run=run_list)
    about = "Replay a policy over a trace of offers (docs/deciding.md); the last line is one JSON object."
    parser = commands.add_parser(
        "replay",
        help="run a policy over a trace",
        description=about,
        epilog=examples(
            "podium policy replay ~/.podium/decisions.jsonl",
            "podium policy replay trace.jsonl --policy maximum_accuracy --policy first_come --slots 2",
        ),
    )
    parser.add_argument(
        "trace", type=Path, metavar="TRACE", help="JSON lines, or a gateway's decisions.jsonl"
    )
    parser.add_argument(
        "--policy", action="append", metavar="NAME", help="repeatable (default: from the settings)"
    )
    parser.add_argument("--slots", type=_slots, default=2, help="number of slots (default: %(default)s)")
    parser.add_argument(
        "--hardware", help="hardware of every slot (default: expected_hardware from the settings)"
    )
    house = LearnedRates()
    parser.add_argument(
        "--win",
        type=_share,
        default=house.task_weight.house,
        help="chance of winning where the trace records no outcome (default: %(default)s)",
    )
    parser.add_argument(
        "--fail",
        type=_share,
        default=round(1 - house.task_success.house, 6),
        help="chance of no valid submission where the trace records no outcome (default: %(default)s)",
    )
    parser.set_defaults(run=run_replay)


def run_list(args: argparse.Namespace) -> int:
    """Print every built-in policy with its summary."""
    summaries = {name: (policy.__doc__ or "").splitlines()[0] for name, policy in BUILT_IN.items()}
    if args.json:
        print(msgspec.json.encode(summaries).decode())
        return 0
    for name, summary in summaries.items():
        print(f"{name:18} {summary}")
    print(f"{'module:function':18} Yours: a plain function (BareOffer, PolicyView) -> Verdict.")
    return 0


def run_replay(args: argparse.Namespace) -> int:
    """Replay and print; exit code 1 if the trace can't be read, 2 if there is no such policy."""
    settings = load_settings()
    names = args.policy or [settings.policy]
    policies = {name: load_policy(name) for name in names}
    rules = rules_of(settings, args)
    trace = read_trace(args.trace)
    reports = [replay(trace.lines, policy, name, rules) for name, policy in policies.items()]
    show(trace, reports, rules)
    print(
        msgspec.json.encode({"trace": str(args.trace), "skipped": trace.skipped, "replays": reports}).decode()
    )
    return 0


def rules_of(settings: Settings, args: argparse.Namespace) -> Rules:
    """Return the simulated fleet: the settings, with slots, hardware and chances from the arguments."""
    return Rules(
        slots=tuple(f"s{number}" for number in range(1, args.slots + 1)),
        hardware=parse_hardware(args.hardware or settings.expected_hardware),
        profile=settings.profile,
        max_hours=settings.max_hours,
        deadline_margin_s=settings.deadline_margin_s,
        reservation_s=settings.reservation_s,
        min_points_per_hour=settings.min_points_per_hour,
        prior_strength=settings.prior_strength,
        half_life_s=settings.evidence_half_life_days * DAY_S,
        win=args.win,
        fail=args.fail,
    )


def show(trace: Trace, reports: list[Report], rules: Rules) -> None:
    """Print the reports side by side."""
    console = make_console()
    first = reports[0]
    console.print(
        f"{first.offers} offers in {first.hours:.1f} hours for {len(rules.slots)} x {rules.hardware.name}"
        + (f"; {trace.skipped} decisions without an offer are skipped" if trace.skipped else "")
    )
    table = Table("", *(escape(report.policy) for report in reports), box=None)
    for label, values in rows_of(reports):
        table.add_row(escape(label), *values)
    console.print(table)
    console.print(
        f"expected points = sum of W x score; where the trace has no outcome: 3 with chance {rules.win:g}, "
        f"-1 with chance {rules.fail:g}, always -1 if no plan fits or a late start is refused; a job "
        "without ran_s lasts until its deadline",
        soft_wrap=True,
    )


def rows_of(reports: list[Report]) -> list[tuple[str, list[str]]]:
    """Return one row per figure, one column per report."""
    rows = [
        ("accepted", [str(report.accepted) for report in reports]),
        ("offered again after acceptance", [str(report.again) for report in reports]),
    ]
    for reason in dict.fromkeys(reason for report in reports for reason in report.rejected):
        rows.append((f"rejected: {reason}", [str(report.rejected.get(reason, 0)) for report in reports]))
    for kind in reports[0].by_type:
        counts = [report.by_type[kind] for report in reports]
        rows.append((f"accepted of {kind}", [f"{accepted} of {offered}" for offered, accepted in counts]))
    return [
        *rows,
        ("started", [str(report.started) for report in reports]),
        ("never started", [str(report.never_started) for report in reports]),
        ("started too late, refused", [str(report.late_refused) for report in reports]),
        ("outcomes recorded in the trace", [str(report.recorded) for report in reports]),
        ("slot time running", [f"{report.running_share:.1%}" for report in reports]),
        ("slot time reserved", [f"{report.reserved_share:.1%}" for report in reports]),
        ("expected points", [f"{report.points:.1f}" for report in reports]),
        ("expected points per day", [f"{report.points_per_day:.2f}" for report in reports]),
    ]


def _slots(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_SLOTS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of slots from 1 to {MOST_SLOTS}")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not (isfinite(share) and 0 <= share <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a chance from 0 to 1")
    return share
