"""Check that a live gateway keeps upstream's contract: complete tasks, and about 300 requests it must refuse.

    python -m bench contract [--verbose]     # about half a minute

A real broker, two gateways that require signatures, two nodes with scripted workers, and a stand-in of the
hub. First one task of each text type runs completely: offer, start, polls, until GET
/get_latest_model_submission names a repository that is on the hub under the name upstream assigned. Of a
reserved task every start but its own is refused: another model, type, more hours, another validator. Then,
with one slot busy and one free, the bench sends every case of bench/conformance/contract_cases.py and
compares its status with the protocol. After each it reads the ends of JOBS and of the slots' logs, which have
every acceptance, reservation and step. Replays are also sent to the other gateway. Finally a good offer must
still be accepted and appear in the logs. Data is a file in a folder that the nodes may read, because
scripted workers don't download. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from msgspec import Struct
from msgspec.structs import replace

from bench.conformance.contract_cases import Case, all_cases, of_reserved, of_running, replayed
from bench.fake_validator import requests
from bench.fake_validator.validator import Reply, Validator, accepted
from bench.harness.fake_hub import FakeHub
from bench.harness.fleet import GATEWAYS, Fleet
from bench.harness.signed_fleet import (
    MINER,
    VALIDATOR,
    end_of,
    hub_settings,
    make_fleet,
    scripted_data,
    started,
    until,
)
from shared import subjects
from shared.broker.bus import Bus
from shared.logs import set_up_logs

RESULT_S = 60.0


class Row(Struct, frozen=True):
    """A case and what came of it."""

    case: Case
    gateway: str
    reply: Reply
    moved: bool  # something was stored

    @property
    def equal(self) -> bool:
        """Return whether the status is one of the protocol's, and an offer's answer the expected one."""
        case = self.case
        if self.reply.status not in case.expected:
            return False
        if case.accepted is None or self.reply.status != 200:
            return True
        return accepted(self.reply) is case.accepted and isinstance(self.reply.body.get("message"), str)


class Trial:
    """Sends cases to live gateways and watches the logs."""

    def __init__(
        self, fleet: Fleet, bus: Bus, hub: FakeHub, sessions: dict[str, aiohttp.ClientSession]
    ) -> None:
        self.fleet = fleet
        self.bus = bus
        self.hub = hub
        self.sessions = sessions
        self.rows: list[Row] = []
        self.findings: list[str] = []
        self._ends = {
            subjects.JOBS_STREAM: 0,
            **{subjects.state_stream(slot): 0 for slot in fleet.settings.slots},
        }

    def upstream(self, gateway: str = GATEWAYS[0]) -> Validator:
        """Return a validator that calls one gateway."""
        return Validator(self.sessions[gateway], VALIDATOR, MINER.address)

    async def moved(self) -> bool:
        """Return whether a log has grown since the last check."""
        ends = {stream: await end_of(self.bus, stream, after) for stream, after in self._ends.items()}
        grown, self._ends = ends != self._ends, ends
        return grown

    async def send(self, case: Case, gateway: str = GATEWAYS[0]) -> None:
        """Send one case, and note what came of it."""
        reply = await self.upstream(gateway).send(case.method, case.path, case.headers, case.body)
        self.rows.append(Row(case, gateway, reply, await self.moved()))

    async def whole_task(self, kind: str) -> None:
        """Take one task from its offer to its submission."""
        task, repo = str(uuid.uuid4()), str(uuid.uuid4())
        upstream = self.upstream()
        data = scripted_data(self.fleet.folder, f"{kind}.json", steps=4, step_s=0.05)
        offered = await upstream.offer(requests.offer(kind, task))
        if not accepted(offered):
            self.findings.append(f"{kind}: not accepted: {offered}")
            return
        begun = await upstream.start(requests.START_PATHS[kind], requests.start(kind, task, repo, data))
        if begun.status != 200 or begun.body.get("task_id") != task or "message" not in begun.body:
            self.findings.append(f"{kind}: start was answered {begun}")
        early = await upstream.submission(task)
        if early.status != 404:
            self.findings.append(f"{kind}: a submission before the result: {early}")

        async def submitted() -> Reply | None:
            reply = await upstream.submission(task)
            return reply if reply.status == 200 else None

        last: Reply = await until(f"the submission of {kind}", submitted, RESULT_S)
        if last.body != {"repo": f"me/{repo}", "model_hash": None}:
            self.findings.append(f"{kind}: the submission is {last.body}, not me/{repo} without a hash")
        titles = [commit["title"] for commit in self.hub.repos.get(f"me/{repo}", [])]
        if titles != ["initial commit", f"podium: {task}"]:
            self.findings.append(f"{kind}: the hub has {titles} under me/{repo}")
        print(f"{kind:12} accepted, started, submitted as {last.body['repo']}", flush=True)

    async def reserved_task(self) -> None:
        """Refuse every start of a reserved task but its own, then let that one run to its end."""
        task = str(uuid.uuid4())
        data = scripted_data(self.fleet.folder, "reserved.json", steps=4, step_s=0.05)
        begin = requests.start(requests.INSTRUCT, task, str(uuid.uuid4()), data)
        if not accepted(offered := await self.upstream().offer(requests.offer(requests.INSTRUCT, task))):
            self.findings.append(f"the task to reserve was not accepted: {offered}")
        await self.settled()
        for case in of_reserved(task, begin):
            await self.send(case)
        begun = await self.upstream().start(requests.START_PATHS[requests.INSTRUCT], begin)
        if begun.status != 200:
            self.findings.append(f"after the refused starts its own was refused too: {begun}")

        async def submitted() -> bool:
            return (await self.upstream().submission(task)).status == 200

        await until("the submission of the reserved task", submitted, RESULT_S)

    async def running_task(self) -> tuple[str, dict[str, Any]]:
        """Start a task that runs for the rest of the bench; return its id and its start."""
        task = str(uuid.uuid4())
        data = scripted_data(
            self.fleet.folder, "long.json", steps=100_000, step_s=0.1, checkpoint_every=100_000
        )
        begin = requests.start(requests.INSTRUCT, task, str(uuid.uuid4()), data)
        offered = await self.upstream().offer(requests.offer(requests.INSTRUCT, task))
        begun = await self.upstream().start(requests.START_PATHS[requests.INSTRUCT], begin)
        if not accepted(offered) or begun.status != 200:
            raise SystemExit(f"the task that is to run was not taken: {offered}, {begun}")

        async def trains() -> bool:
            return any(self.fleet.worker(node) is not None for node in self.fleet.nodes)

        await until("the long task to run", trains)
        return task, begin

    async def settled(self) -> None:
        """Wait until nothing is written any more."""
        await self.moved()

        async def still() -> bool:
            await asyncio.sleep(1.0)
            return not await self.moved()

        await until("the logs to be still", still)

    async def run(self) -> None:
        """Everything."""
        for kind in requests.TEXT_KINDS:
            await self.whole_task(kind)
        await self.reserved_task()
        task, begin = await self.running_task()
        await self.settled()
        for case in [*all_cases(), *of_running(task, begin)]:
            await self.send(case)
        for first, again in replayed():
            for gateway in GATEWAYS:
                sent = replace(first, name=f"{first.name} at {GATEWAYS[0]}")
                if gateway == GATEWAYS[0]:
                    await self.send(sent)
                await self.send(replace(again(), name=f"{again().name} at {gateway}"), gateway)
        control = await self.upstream().offer(requests.offer(requests.INSTRUCT, str(uuid.uuid4())))
        if not accepted(control) or not await self.moved():
            self.findings.append(f"after all cases a good offer was not accepted, or not stored: {control}")


async def measure(folder: Path) -> Trial:
    """Start a fleet, send all cases, return the verdict."""
    hub = FakeHub()
    try:
        fleet = make_fleet(folder, **hub_settings(folder, hub.url, hub.token))
        async with started(fleet) as bus:
            sessions = {name: aiohttp.ClientSession(fleet.url(name)) for name in GATEWAYS}
            trial = Trial(fleet, bus, hub, sessions)
            try:
                await trial.run()
            finally:
                await asyncio.gather(*(session.close() for session in sessions.values()))
        return trial
    finally:
        hub.close()


def table(rows: list[Row], verbose: bool) -> None:
    """Print all rows, or one line for those of one name and outcome."""
    shown: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        case = row.case
        where = f"{case.method} {case.path}" if verbose or not row.equal or row.moved else "*"
        shown[case.name, where, case.expected, row.reply.status, row.equal and not row.moved] += 1
    for (name, where, expected, status, good), count in shown.items():
        wanted = "/".join(map(str, expected))
        mark = "" if good else "  <-- WRONG"
        print(f"{count:3} x {name:48} {where:32.60} expected {wanted:8} got {status}{mark}")


def main() -> int:
    """Run, print, fail on any difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbose", action="store_true", help="one line for every request")
    args = parser.parse_args()
    set_up_logs("console", "error", service="bench")
    with tempfile.TemporaryDirectory(prefix="podium-contract-") as folder:
        trial = asyncio.run(measure(Path(folder)))
    table(trial.rows, args.verbose)
    for finding in trial.findings:
        print("FINDING", finding)
    unequal, moved = sum(not row.equal for row in trial.rows), sum(row.moved for row in trial.rows)
    for row in trial.rows:
        if not row.equal:
            print("UNEQUAL", row.case.name, row.case.method, row.case.path, row.reply)
    figures = {
        "whole_tasks": len(requests.TEXT_KINDS),
        "requests": len(trial.rows),
        "unequal": unequal,
        "state_changed": moved,
        "findings": len(trial.findings),
    }
    print(json.dumps(figures))
    return 1 if unequal or moved or trial.findings else 0


if __name__ == "__main__":
    sys.exit(main())
