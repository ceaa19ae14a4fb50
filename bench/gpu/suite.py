"""Check the engine on real GPUs, the most valuable check first, within nine minutes and without a network.

    python -m bench gpu --out FOLDER            # all checks; those that FOLDER has an answer to are skipped
    python -m bench gpu worker kernels          # only these
    python -m bench gpu --dry                   # the same checks on a CPU, with tiny shapes

Each check runs in its own process, which is killed at its limit, and its answer is written to
FOLDER/gpu.json at once. FOLDER is $OUT by default, else var/gpu. The last line is one JSON object:
`{"checks", "ok", "failed", "skipped", "seconds"}`. For a machine that has only a checkout see
bench/gpu/bare_machine.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.gpu import kernel_table, kernel_times, machine, sharing, steps, trl_trainer, workers
from bench.gpu.check import Answer, Check, run_check
from shared.files import write_atomically

WHOLE_S, DRY_WHOLE_S = 540.0, 1700.0
DRY_LIMIT_S = 300.0  # of any check: nothing is measured, and the CPU may be busy
LEAST_S = 15.0  # left: with less a check is not begun


class Entry(NamedTuple):
    """A check of the suite, and the seconds after which it is killed."""

    check: Check
    limit_s: float


CHECKS: dict[str, Entry] = {
    "environment": Entry(machine.environment, 30),
    "doctor": Entry(machine.doctor, 120),
    "worker": Entry(workers.worker, 130),
    "sharded_worker": Entry(workers.sharded_worker, 110),
    "layouts": Entry(workers.layouts, 100),
    "kernels": Entry(kernel_table.kernels, 60),
    "compile": Entry(steps.compiled, 120),
    "memory": Entry(steps.memory, 100),
    "throughput": Entry(steps.throughput, 150),
    "recorded": Entry(steps.recorded, 90),
    "kernel_times": Entry(kernel_times.kernel_times, 90),
    "sharing": Entry(sharing.sharing, 110),
    "out_of_memory": Entry(steps.out_of_memory, 40),
    "rates": Entry(machine.rates, 40),
    "trl": Entry(trl_trainer.beside_trl, 60),
}


def main() -> int:
    """Run the checks that have no answer yet; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "var/gpu")), metavar="FOLDER")
    parser.add_argument("--seconds", type=float, help="for all checks together")
    args = parser.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        parser.error(f"there is no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    names = [name for name in CHECKS if not args.checks or name in args.checks]
    seconds = args.seconds or (DRY_WHOLE_S if args.dry else WHOLE_S)
    print(json.dumps(run_suite(names, args.out, dry=args.dry, seconds=seconds)))
    return int(any(answer.status == "failed" for answer in read_answers(args.out).values()))


def run_suite(names: list[str], folder: Path, *, dry: bool, seconds: float) -> dict[str, object]:
    """Run the named checks in order; return how they ended."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    answers = read_answers(folder)
    for name in names:
        left = seconds - (time.monotonic() - began)
        if name in answers or left < LEAST_S:
            print(f"{name:15} {'done before' if name in answers else 'no time is left'}", flush=True)
            continue
        entry = CHECKS[name]
        limit = min(left, DRY_LIMIT_S if dry else entry.limit_s)
        answers[name] = run_check(entry.check, dry=dry, limit_s=limit)
        write_atomically(folder / "gpu.json", msgspec.json.format(msgspec.json.encode(answers), indent=1))
        told = "; ".join(answers[name].faults)[:300]
        print(f"{name:15} {answers[name].status:8} {answers[name].seconds:6.1f} s  {told}", flush=True)
    ended = {name: answers[name].status if name in answers else "not run" for name in names}
    return {
        "checks": len(names),
        "ok": sum(status == "ok" for status in ended.values()),
        "failed": [name for name, status in ended.items() if status == "failed"],
        "skipped": [name for name, status in ended.items() if status in ("skipped", "not run")],
        "seconds": round(time.monotonic() - began, 1),
    }


def read_answers(folder: Path) -> dict[str, Answer]:
    """Return the answers that a folder has, by check."""
    path = folder / "gpu.json"
    if not path.exists():
        return {}
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Answer])


if __name__ == "__main__":
    sys.exit(main())
