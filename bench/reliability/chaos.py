"""What survives kill -9 and SIGSTOP: real broker, gateways, nodes and workers; a checker that trusts nobody.

    python -m bench chaos --quick             # each of the four kinds of process killed once,
    amid two jobs
    python -m bench chaos                     # 1,500 jobs under 3,000 faults, with scripted
    workers
    python -m bench chaos --worker real       # 60 jobs under 60 faults, with the real engine
    python -m bench chaos --ci                # the scripted one for two minutes

The fleet: a broker, two gateways that any client may ask, two nodes, and a standby that contends for slot a
on the same machine. The faults: kill -9, SIGTERM, and SIGSTOP for .5 to 12 s (the lease lasts 2 s) of any
process, workers too; now and then kill -9 of all at once. What died comes back after a random gap, in any
order. Scripted workers keep the real ones' contract with the node (job.json, progress, checkpoints, outcome,
export, lock) and need a second per job. bench/harness/checker.py judges from what is stored; whether two
workers
were ever on one slot is seen by bench/harness/worker_witness.py. The last line is one JSON object. On a
violation
the folder with all logs is kept.
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
from bench.reliability import lost_work as waste
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
    """One kill of each kind."""
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
    summary = counts(outcome.report) | _of(outcome) | waste.summary(folder)
    return summary, outcome.report.findings + outcome.findings


def counts(report: Report) -> dict[str, Any]:
    """The checker's part of the summary."""
    return {name: value for name, value in msgspec.structs.asdict(report).items() if name != "findings"}


def _of(outcome: Outcome) -> dict[str, Any]:
    return {
        "faults": sum(outcome.faults.values()),
        "by_kind": outcome.faults,
        "all_at_once": outcome.all_at_once,
        "heard": outcome.heard,
        "own_ends": outcome.own_ends,
        "tracebacks": outcome.tracebacks,
        "minutes": round(outcome.seconds / 60, 1),
        "settle_s": round(outcome.settle_s, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
