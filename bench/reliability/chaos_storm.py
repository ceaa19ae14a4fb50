"""A storm: faults at random on every process while jobs keep coming, then calm, then the verdict."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from bench.harness.checker import Report, check, read_logs
from bench.harness.fault_injector import Injector
from bench.harness.fleet import ENGINE, ROOT, SCRIPTED, Fleet, any_gap
from bench.harness.offer_client import Upstream
from shared import subjects
from shared.broker.bus import Bus
from shared.errors import BusError
from shared.messages.encoding import encode
from shared.messages.jobs import Result, decode_state_record
from shared.messages.offers import DatasetType, FileFormat, Offer, TaskType

DATA = ROOT / "examples" / "wordnet" / "nouns_train.json"
ROWS = 200  # of it: a real job then ends with its epochs, after some 10 s of training, not with its clock
MODEL, MODEL_FOLDER = "podium/tiny", ROOT / "tests" / "data" / "oracle" / "base"
TELL_S = 15.0
STUCK_S = 180.0  # without any new result, however bad the weather: something is stuck
CALM_S = 3.0  # at the end: who has something left to write wrongly, writes it now

# Times a tenth of the house's, in the same order: a stop lasts up to six leases.
QUICK: dict[str, Any] = {
    "lease_ttl_s": 2.0,
    "lease_renew_s": 0.5,
    "lease_trust_s": 1.5,
    "heartbeat_s": 0.3,
    "heartbeat_missing_s": 1.5,
    "poll_s": 0.5,
    "stop_grace_s": 3.0,
    "submit_reserve_s": 5.0,
    "expire_after_s": 60.0,
    "nats_connect_timeout_s": 10.0,
}
# What scripted jobs are: .3 to 1 s of work; one in eight outlives a lease, so that a stale worker can be met.
SCRIPTS: list[dict[str, Any]] = [
    *({"steps": steps, "step_s": 0.05, "checkpoint_every": 3} for steps in (6, 9, 12, 15, 15, 18, 21)),
    {"steps": 20, "step_s": 0.25, "checkpoint_every": 3},
]
REAL: dict[str, Any] = {
    "checkpoint_interval_s": 2.0,
    "models": {MODEL: str(MODEL_FOLDER)},
    "stop_grace_s": 20.0,
}


class Kind(Struct, frozen=True, kw_only=True):
    """The workers and timings of a storm."""

    worker: tuple[str, ...]
    job_s: float  # from acceptance to deadline
    mean_gap_s: float  # between faults, while they may come
    settle_s: float  # all jobs must have their result so long after the last fault


class Goal(Struct, frozen=True, kw_only=True):
    """When a storm is over: so many results and faults, or the time."""

    jobs: int
    faults: int
    seconds: float


class Outcome(Struct, kw_only=True):
    """Figures of a storm."""

    report: Report
    faults: dict[str, int]
    all_at_once: int
    responses: dict[str, int]
    findings: list[str]
    own_ends: dict[str, list[int]]  # exit codes of services that no fault had ended
    tracebacks: dict[str, int]
    seconds: float
    settle_s: float


KINDS = {
    "scripted": Kind(worker=SCRIPTED, job_s=120.0, mean_gap_s=0.3, settle_s=180.0),
    "real": Kind(worker=ENGINE, job_s=300.0, mean_gap_s=4.0, settle_s=300.0),
}


class Storm:
    """One run in one folder."""

    def __init__(self, folder: Path, worker: str, goal: Goal, seed: int) -> None:
        self.kind, self.goal = KINDS[worker], goal
        chance = random.Random(seed)
        settings = (QUICK if worker == "scripted" else REAL) | {"dataset_roots": (str(folder),)}
        gaps = random.Random(chance.random())
        self.fleet = Fleet(folder, self.kind.worker, lambda: any_gap(gaps), **settings)
        self.injector = Injector(self.fleet, random.Random(chance.random()))
        templates = _templates(worker, folder, self.kind.job_s)
        self.upstream = Upstream(self.fleet, templates, random.Random(chance.random()))
        self.results: set[str] = set()
        self._asked = False  # to let it be calm now
        self._read_to = {subjects.state_stream(slot): 0 for slot in self.fleet.settings.slots}
        self._newest_at = time.monotonic()
        self._began = time.monotonic()

    async def run(self) -> Outcome:
        """Run the whole storm and end the fleet. SIGINT and SIGTERM end the faults early."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._ask)
        try:
            await self.fleet.start()
            bus = await self.fleet.bus()
            settle_s = await self._weather(bus)
            await asyncio.sleep(CALM_S)
            report = await check(
                bus,
                acknowledged=set(self.upstream.responses.accepted),
                artifacts=self.fleet.settings.artifacts,
                lock_logs=self.fleet.lock_logs(),
            )
            await _dump(bus, self.fleet.folder)
            await bus.close()
        finally:
            await self.fleet.close()
        members = self.fleet.members.values()
        return Outcome(
            report=report,
            faults=self.injector.by_kind(),
            all_at_once=self.injector.all_at_once,
            responses=dict(self.upstream.responses.counts),
            findings=self.upstream.responses.findings,
            own_ends={member.name: member.own_ends for member in members if member.own_ends},
            tracebacks=self.fleet.tracebacks(),
            seconds=time.monotonic() - self._began,
            settle_s=settle_s,
        )

    async def _weather(self, bus: Bus) -> float:
        """Inject faults until the goal is reached; return how long the last results then took."""
        offering = asyncio.create_task(self.upstream.run(clients=3))
        harm = asyncio.create_task(self.injector.run(self.kind.mean_gap_s, self._faults_are_due))
        looking = asyncio.create_task(self._look(bus))
        tasks = [offering, harm, looking]
        try:
            while not self._reached():
                await asyncio.sleep(0.2)
                self.fleet.check()
                for task in tasks:
                    if task.done():
                        task.result()
                if time.monotonic() - self._newest_at > STUCK_S:
                    self.upstream.responses.findings.append(f"no new result for {STUCK_S:g} s")
                    break
            harm.cancel()
            await self.injector.settle()
            calm = time.monotonic()
            self.upstream.closing = True
            say(f"calm after {self.injector.count} faults")
            try:
                async with asyncio.timeout(self.kind.settle_s):
                    await offering
                    while len(self.results) < len(self.upstream.responses.accepted):  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
            except TimeoutError:
                say(f"not settled within {self.kind.settle_s:g} s")
            return time.monotonic() - calm
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _ask(self) -> None:
        self._asked = True

    def _reached(self) -> bool:
        if self._asked or time.monotonic() - self._began > self.goal.seconds:
            return True
        return len(self.results) >= self.goal.jobs and self.injector.count >= self.goal.faults

    def _faults_are_due(self) -> bool:
        """Faults keep step with results, a few ahead, so that both goals are reached together."""
        share = self.goal.faults / max(1, self.goal.jobs)
        return self.injector.count < share * (len(self.results) + 3) + 4

    async def _look(self, bus: Bus) -> None:
        printed_at = time.monotonic()
        while True:
            try:
                await self._read_results(bus)
            except BusError:  # a fault: the next look sees it
                await asyncio.sleep(0.1)
            await asyncio.to_thread(self.fleet.keep_progress)
            if time.monotonic() - printed_at > TELL_S:
                printed_at = time.monotonic()
                stored, faults = len(self.upstream.responses.accepted), self.injector.count
                say(f"{stored} accepted, {len(self.results)} ended, {faults} faults")
            await asyncio.sleep(0.25)

    async def _read_results(self, bus: Bus) -> None:
        for stream, read_to in self._read_to.items():
            async for batch in bus.read_all(stream, read_to):
                self._read_to[stream] = batch[-1].sequence
                ended = {each.task for r in batch if isinstance(each := decode_state_record(r.data), Result)}
                if ended - self.results:
                    self._newest_at = time.monotonic()
                self.results |= ended


def say(text: str) -> None:
    """Print one line, flushed."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _templates(worker: str, folder: Path, job_s: float) -> list[Offer]:
    """Return the offers that all jobs are copies of, one chosen at random."""
    folder.mkdir(parents=True, exist_ok=True)
    common = Offer(
        task_id="-",
        task_type=TaskType.INSTRUCT,
        model=MODEL if worker == "real" else "podium/scripted",
        hours_to_complete=job_s / 3600,
        dataset="-",
        file_format=FileFormat.JSON,
        dataset_type=DatasetType(field_instruction="instruct", field_output="output"),
        model_params_count=140_000,
    )
    contents = SCRIPTS if worker == "scripted" else [json.loads(DATA.read_text())[:ROWS]]
    offers = []
    for number, content in enumerate(contents):
        data = folder / f"data-{number}.json"
        data.write_text(json.dumps(content))
        offers.append(replace(common, dataset=str(data)))
    return offers


async def _dump(bus: Bus, folder: Path) -> None:
    """Write all logs to files, to study a violation."""
    logs = await read_logs(bus)
    for name, records in (("jobs", logs.jobs), ("states", logs.states)):
        (folder / f"{name}.jsonl").write_bytes(b"".join(encode(record) + b"\n" for record in records))
