"""`podium restore FILE`: restore all logs from a gateway's mirror into a broker that has lost them.

A restored log starts at the sequence after the old one's last, and epochs start above every old epoch. No
old number is ever expected again, so the usual compare-and-set refuses a process that slept through the
restore. The slots' states are restored before JOBS, so a reader that sees a job sees its whole chain.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import msgspec

from podium.arguments import examples


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `restore` to the command line."""
    parser = subparsers.add_parser(
        "restore",
        help="restore lost logs from a mirror",
        description=__doc__,
        epilog=examples("podium restore ~/.podium/mirror/1.jsonl"),
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="the mirror, such as <data folder>/mirror/1.jsonl"
    )
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Restore and verify; exit code 0 if the logs equal the file."""
    from podium.local.restoration import restore_from

    restored = asyncio.run(restore_from(args.file))
    if args.json:
        print(msgspec.json.encode(restored).decode())
        return 0
    for stream, count in restored.records.items():
        gaps = restored.missing[stream]
        print(f"{stream}: {count} records, read back and equal" + (f"; {gaps} were missing" if gaps else ""))
    if restored.cut_bytes:
        print(f"the file's last line is truncated and was skipped ({restored.cut_bytes} bytes)")
    states = ", ".join(f"{count} {state}" for state, count in restored.tasks.items())
    print(f"tasks: {states or 'none'}. Start the nodes and gateways again.")
    return 0
