"""Play a day of upstream in minutes, with random kills; check every job's end, decision and learned rate.

    python -m bench soak [--hours 24] [--hour-seconds 10] [--seed 0] [--mean-gap 8]     # about 6 minutes

A trace of bench/fake_validator/trace.py is played in fast time against a real fleet: a broker, two gateways
that require signatures, two nodes and a standby, scripted workers, the hub's stand-in. A job of four hours
takes four hours of the fast clock, of which its worker uses up to four fifths; messages and deadlines keep
their real hours. Meanwhile processes are killed, terminated and stopped at random
(bench/harness/fault_injector.py), so an offer or a start may get no response; upstream sends each only once.

At the end bench/harness/checker.py judges the logs: each stored job has one result, each submitted one has
an artifact, no slot has two jobs at once; and every start with status 200 must be in them. Every decision
with status 200 must have a reason and be in the gateways' decision files, where a killed gateway may lose
the last fifth of a second. Offers with bad signatures or stale nonces must be refused. One job in six has
unusable data, so that results differ. Then upstream's scores are posted, and the learned rates are compared
with an independent count (bench/reliability/soak_learning.py). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from msgspec import Struct

from bench.fake_validator.player import Played, Player
from bench.fake_validator.simulator import outcome
from bench.fake_validator.trace import HOUR_S, Event, World, generate
from bench.harness.checker import Report, check, read_logs
from bench.harness.fake_hub import FakeHub
from bench.harness.fault_injector import Injector
from bench.harness.fleet import GATEWAYS, NODES, Fleet
from bench.harness.signed_fleet import MINER, VALIDATOR, hub_settings, make_fleet, scripted_data, started
from bench.reliability.soak_learning import Learned, learn
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.logs import set_up_logs
from shared.messages.jobs import Result
from shared.messages.runs import ErrorCode

SETTLE_S = 120.0
STEP_S = 0.1
LEAST_RESERVATION_S = 5.0
LONGEST_WORK = 0.8  # of a job's time
UNUSABLE = 1 / 6  # of the jobs have data that ends them


class Verdict(Struct, kw_only=True):
    """Figures of a soak."""

    report: Report
    learned: Learned
    played: list[Played]
    faults: int
    unexplained: int  # decisions without a reason
    not_in_file: int
    findings: list[str]


def data_for(folder: Path, scale: float, chance: random.Random) -> Any:
    """Write data files that make a worker run for at most its task's time on the fast clock."""

    def dataset(event: Event) -> str:
        seconds = event.offer["hours_to_complete"] * HOUR_S * scale * chance.uniform(0.3, LONGEST_WORK)
        knobs: dict[str, Any] = {"steps": max(2, int(seconds / STEP_S)), "step_s": STEP_S}
        if chance.random() < UNUSABLE:
            knobs["fail"] = ErrorCode.BAD_DATA
        return scripted_data(folder, f"{event.offer['task_id']}.json", checkpoint_every=5, **knobs)

    return dataset


async def unfinished(bus: Bus) -> int:
    """Count the stored jobs without a result."""
    logs = await read_logs(bus)
    ended = {record.task for record in logs.states if isinstance(record, Result)}
    return sum(job.task not in ended for job in logs.jobs)


async def settled(bus: Bus) -> None:
    """Wait until every job has its result, or for SETTLE_S."""
    for _ in range(int(SETTLE_S)):
        try:
            if not await unfinished(bus):
                return
        except BusError:
            pass  # on the way back
        await asyncio.sleep(1.0)


async def soak(fleet: Fleet, events: list[Event], scale: float, mean_gap_s: float, seed: int) -> Verdict:
    """Play, disturb, settle, judge."""
    chance = random.Random(seed + 1)
    data = data_for(fleet.folder, scale, chance)
    async with started(fleet) as bus:
        urls = [fleet.url(gateway) for gateway in GATEWAYS]
        player = Player(urls, VALIDATOR, MINER.address, scale=scale, dataset=data)
        injector = Injector(fleet, chance)
        harm = asyncio.create_task(injector.run(mean_gap_s, lambda: True))
        try:
            played = await player.play(events)
        finally:
            harm.cancel()
            await injector.settle()
        await settled(bus)
        acknowledged = {
            subjects.task_key(one.task_id) for one in played if one.started and one.started.status == 200
        }
        report = await check(
            bus,
            acknowledged=acknowledged,
            artifacts=fleet.settings.artifacts,
            lock_logs=fleet.lock_logs(),
        )
        learned = await learn(fleet, bus, chance)
    unexplained, not_in_file = explanations(fleet, played)
    return Verdict(
        report=report,
        learned=learned,
        played=played,
        faults=injector.count,
        unexplained=unexplained,
        not_in_file=not_in_file,
        findings=[*report.findings, *learned.findings, *wrongly_answered(played)],
    )


def wrongly_answered(played: list[Played]) -> list[str]:
    """Return the faulty offers that were not refused; 0 and 503 are kills."""
    return [
        f"{one.task_id}: {one.event.fault} was answered {one.offered.status}"
        for one in played
        if one.event.fault and one.offered.status not in (0, 401, 503)
    ]


def explanations(fleet: Fleet, played: list[Played]) -> tuple[int, int]:
    """Count the decisions sent without a reason, and those that no gateway has written with all terms."""
    written: set[tuple[str, bool]] = set()
    for gateway in GATEWAYS:
        path = fleet.folder / "data" / gateway / "decisions.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                decision = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if decision.get("terms") and decision.get("reason"):
                written.add((decision["task_id"], decision["accepted"]))
    decided = [one for one in played if one.offered.status == 200]
    unexplained = sum(not one.offered.body.get("message") for one in decided)
    return unexplained, sum((one.task_id, one.accepted) not in written for one in decided)


def figures_of(verdict: Verdict, hours: float) -> dict[str, Any]:
    """Return the last line's figures."""
    return outcome(verdict.played) | {
        "simulated_hours": hours,
        "jobs": verdict.report.jobs,
        "results": verdict.report.results,
        "without_result": verdict.report.without_result,
        "double_submissions": verdict.report.double_submissions,
        "lost": verdict.report.lost,
        "faults": verdict.faults,
        "decisions_without_reason": verdict.unexplained,
        "decisions_lost_by_kills": verdict.not_in_file,
        "rates_learned": verdict.learned.rates,
        "rates_above_house": verdict.learned.above_house,
        "rates_below_house": verdict.learned.below_house,
        "rates_wrong": len(verdict.learned.findings),
        "violations": len(verdict.findings) + verdict.unexplained,
    }


def main() -> int:
    """Run, print, fail on any finding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=24.0, help="simulated")
    parser.add_argument("--hour-seconds", type=float, default=10.0, help="real seconds of a simulated hour")
    parser.add_argument("--mean-gap", type=float, default=8.0, help="real seconds between two faults")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_up_logs("console", "error", service="bench")
    scale = args.hour_seconds / HOUR_S
    folder = Path(tempfile.mkdtemp(prefix="podium-soak-"))
    hub = FakeHub()
    fleet = make_fleet(
        folder,
        nodes=NODES,
        reservation_s=max(LEAST_RESERVATION_S, 900.0 * scale),
        **hub_settings(folder, hub.url, hub.token),
    )
    events = generate(World(models="log"), args.hours, args.seed)
    print(f"{len(events)} offers in {args.hours:g} simulated hours", flush=True)
    try:
        verdict = asyncio.run(soak(fleet, events, scale, args.mean_gap, args.seed))
    finally:
        hub.close()
    for finding in verdict.findings:
        print("VIOLATION", finding)
    figures = figures_of(verdict, args.hours)
    if figures["violations"]:
        print(f"all logs are in {folder}")
    else:
        shutil.rmtree(folder)
    print(json.dumps(figures))
    return 1 if figures["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
