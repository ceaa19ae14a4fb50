"""Kill and stop real brokers, gateways, nodes and workers during jobs, and check that no guarantee breaks.

    python -m bench chaos --quick             # kill each of the four kinds of process once, during two jobs
    python -m bench chaos                     # 1,500 jobs under 3,000 faults, with scripted workers
    python -m bench chaos --worker real       # 60 jobs under 60 faults, with the real engine
    python -m bench chaos --ci                # scripted workers for two minutes

The fleet is a broker, two gateways that clients use at random, two nodes, and a standby that contends for
slot a on the same machine. The faults are kill -9, SIGTERM, and SIGSTOP for .5 to 12 s (the lease lasts 2
s) of any process, including workers, and sometimes kill -9 of all at once. A killed process restarts after
a random gap, in any order. Scripted workers follow the real workers' contract with the node (job.json,
progress, checkpoints, outcome, export, lock) and need a second per job. bench/harness/checker.py judges
from the stored records, and bench/harness/worker_witness.py detects two workers on one slot. The last line
is one JSON object. After a violation the folder with all logs is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from bench.harness.checker import Report
from bench.reliability import lost_work
from bench.reliability.chaos_rounds import disturbed, rounds
from bench.reliability.chaos_storm import Goal, Outcome, Storm, say
from shared.logs import set_up_logs

GOALS = {"scripted": (1500, 3000), "real": (60, 60)}
FOREVER_S = 24 * 3600.0


def main() -> int:
    """Run, print the verdict, fail if anything that must not happen did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="kill each kind of process once, nothing else")
    parser.add_argument("--ci", action="store_true", help="--worker scripted --minutes 2")
    parser.add_argument("--worker", choices=sorted(GOALS), default="scripted")
    parser.add_argument("--jobs", type=int, help="results to reach")
    parser.add_argument("--faults", type=int, help="faults to reach")
    parser.add_argument("--minutes", type=float, help="stop here, whatever was reached")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; kept (default: a temporary one)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="podium-chaos-"))
    if args.quick:
        summary, findings = quick(folder)
    else:
        summary, findings = storm(folder, args)
    for finding in findings:
        print("VIOLATION", finding)
    if findings:
        print(f"all logs are in {folder}")
    elif args.folder is None:
        shutil.rmtree(folder)
    print(msgspec.json.encode(summary | {"violations": len(findings)}).decode())
    return 1 if findings else 0


def quick(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Run one kill of each kind."""
    seen, report = asyncio.run(rounds(folder))
    findings = report.findings + [finding for one in seen for finding in disturbed(one)]
    summary = counts(report) | {
        "faults": len(seen),
        "refused_requests": sum(one.refused_requests for one in seen),
        "back_s": {one.victim: round(one.back_s, 2) for one in seen},
    }
    return summary, findings


def storm(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Jobs under faults until the goal or the time is reached."""
    worker = "scripted" if args.ci else args.worker
    jobs, faults = GOALS[worker]
    minutes = args.minutes or (2.0 if args.ci else None)
    goal = Goal(
        jobs=args.jobs or jobs,
        faults=args.faults or faults,
        seconds=minutes * 60 if minutes else FOREVER_S,
    )
    set_up_logs("console", "error", service="chaos")  # the bench's own connection dies with the broker
    say(f"{worker} workers, seed {args.seed}: {goal.jobs} jobs, {goal.faults} faults, in {folder}")
    outcome = asyncio.run(Storm(folder, worker, goal, args.seed).run())
    summary = counts(outcome.report) | _of(outcome) | lost_work.summary(folder)
    return summary, outcome.report.findings + outcome.findings


def counts(report: Report) -> dict[str, Any]:
    """Return the checker's part of the summary."""
    return {name: value for name, value in msgspec.structs.asdict(report).items() if name != "findings"}


def _of(outcome: Outcome) -> dict[str, Any]:
    return {
        "faults": sum(outcome.faults.values()),
        "by_kind": outcome.faults,
        "all_at_once": outcome.all_at_once,
        "heard": outcome.responses,
        "own_ends": outcome.own_ends,
        "tracebacks": outcome.tracebacks,
        "minutes": round(outcome.seconds / 60, 1),
        "settle_s": round(outcome.settle_s, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
