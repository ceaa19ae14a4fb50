"""`podium doctor`: check the whole installation and say how to fix each problem. Changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from podium.arguments import add_url, examples
from podium.client import default_url
from podium.commands.up import chosen_settings
from podium.console import make_console
from podium.diagnostics.findings import Finding, Severity
from podium.local.discovery import with_own_keys
from shared.settings import Settings
from shared.settings_sources import load_settings
from shared.version import version
from trainer_node.hardware import detect
from trainer_node.self_test import run_self_test

COLOURS = {Severity.OK: "green", Severity.NOTE: "cyan", Severity.WARNING: "yellow", Severity.ERROR: "red"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="find problems and say how to fix them",
        description=__doc__,
        epilog=examples("podium doctor", "podium doctor --self-test", "podium doctor --strict --json"),
    )
    add_url(parser)
    parser.add_argument("--monitor", help="the broker's monitoring URL, such as http://127.0.0.1:8222")
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="also test this machine's GPUs, or its CPU: a minute in which no job should run here",
    )
    parser.add_argument("--strict", action="store_true", help="also exit with 1 for warnings")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine and print; exit code 1 if there is an error (with --strict: or a warning)."""
    from podium.diagnostics.checks import examine
    from podium.diagnostics.probe import gather

    settings = with_own_keys(load_settings())
    url, chosen = args.url or default_url(), chosen_settings(os.environ)
    vitals = asyncio.run(gather(settings, url, args.monitor, version(), chosen))
    findings = examine(vitals)
    if args.self_test:
        findings = [*asyncio.run(own_self_test(settings)), *findings]
    if args.json:
        print(msgspec.json.encode(findings).decode())
    else:
        make_console().print(table(findings))
    bad = {Severity.ERROR} | ({Severity.WARNING} if args.strict else set())
    return 1 if any(finding.severity in bad for finding in findings) else 0


async def own_self_test(settings: Settings) -> list[Finding]:
    """Test the devices that a node with these settings would have, in a folder of its own."""
    hardware = await detect(settings)
    with tempfile.TemporaryDirectory(prefix="podium-self-test-") as folder:
        health = await run_self_test(settings, hardware, Path(folder))
    what = f"{hardware.name} passed its self-test"
    do = "repair it before a node with this hardware takes a job"
    found = [Finding("self-test here", Severity.ERROR, fault, do) for fault in health.faults]
    found = found or [Finding("self-test here", Severity.OK, what)]
    slower = "see the versions of torch, flash-attn and the driver: jobs are accepted, and take longer"
    return found + [Finding("self-test here", Severity.WARNING, text, slower) for text in health.warnings]


def table(findings: list[Finding]) -> Table:
    """Return a table with one row per finding."""
    shown = Table("", "check", "found", "what to do", box=None)
    for finding in findings:
        colour = COLOURS[finding.severity]
        shown.add_row(
            f"[{colour}]{finding.severity}[/]", finding.check, escape(finding.what), escape(finding.do)
        )
    return shown
