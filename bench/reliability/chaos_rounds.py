"""Rounds: a job on each slot, one process killed amid both, both results awaited; each process once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from bench.harness.checker import Report, check
from podium.client import ENDED, Client, Refusal
from podium.local.gpu_split import split
from podium.local.stack import Stack
from shared.broker.connection import connect
from shared.errors import PodiumError
from shared.messages.encoding import encode
from shared.messages.offers import DatasetType, FileFormat, Offer, TaskType
from shared.settings_sources import load_settings
from trainer_node.worker.supervisor import WorkerFile

ROOT = Path(__file__).parents[2]
MODEL, MODEL_FOLDER = "podium/tiny", ROOT / "tests" / "data" / "oracle" / "base"
DATA = ROOT / "examples" / "wordnet"
ROUND_S = 60.0  # a job's whole time
VICTIMS = ("node", "worker", "broker", "gateway")


class Seen(Struct, kw_only=True):
    """Observations of one round that are not in the logs."""

    victim: str
    same_worker_a: bool = False  # slot a's worker after the kill is the one before it
    same_worker_b: bool = False
    back_s: float = 0.0  # from the kill until the gateway is ready and both nodes send heartbeats
    refused_requests: int = 0
    submitted: int = 0


class Machine:
    """The processes of `podium up` in a temporary folder, and their process ids."""

    def __init__(self, folder: Path) -> None:
        settings = load_settings(
            {},
            data_dir=str(folder),
            nats_url="nats://127.0.0.1:0",
            gateway_port=0,
            deadline_margin_s=0.0,
            models={MODEL: str(MODEL_FOLDER)},
            dataset_roots=(str(DATA),),
            log_max_bytes=64 << 20,
            checkpoint_interval_s=2.0,
            threads=1,
        )
        self.folder = folder
        self.stack = Stack(settings, split(settings, [], expectation_set=False), say)

    @property
    def client(self) -> Client:
        """Return the gateway's HTTP interface."""
        return Client(self.stack.url)

    def worker(self, slot: str) -> WorkerFile | None:
        """Return the newest worker of a slot."""
        try:
            return msgspec.json.decode((self.node_folder(slot) / "worker.json").read_bytes(), type=WorkerFile)
        except FileNotFoundError:
            return None

    def node_folder(self, slot: str) -> Path:
        """Return a node's work folder."""
        return self.folder / "nodes" / slot

    def pid(self, victim: str) -> int:
        """Return the process id of a victim; of a node or worker, slot a's."""
        if victim == "worker":
            worker = self.worker("a")
            if worker is None:
                raise PodiumError("slot a never had a worker")
            return worker.pid
        name = "node-a" if victim == "node" else victim
        service = next(service for service in self.stack.services if service.spec.name == name)
        if service.pid is None:
            raise PodiumError(f"{name} never started")
        return service.pid


def say(text: str) -> None:
    """Print one line, flushed."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


async def until(what: str, condition: Callable[[], Awaitable[bool]], timeout_s: float) -> float:
    """Wait for a condition; how many seconds it took. PodiumError after `timeout_s`."""
    began = time.monotonic()
    while not await condition():
        if time.monotonic() - began > timeout_s:
            raise PodiumError(f"waited {timeout_s:g} s for {what}")
        await asyncio.sleep(0.1)
    return time.monotonic() - began


async def send(machine: Machine, task_id: str, *, hours: float) -> str:
    """Offer one job until it is decided, as a patient upstream would; the token if accepted."""
    offer = Offer(
        task_id=task_id,
        task_type=TaskType.INSTRUCT,
        model=MODEL,
        hours_to_complete=hours,
        dataset=str(DATA / "nouns_train.json"),
        file_format=FileFormat.JSON,
        dataset_type=DatasetType(field_instruction="instruct", field_output="output"),
        model_params_count=140_000,
    )
    decision = await asyncio.to_thread(machine.client.offer, encode(offer))
    if isinstance(decision, Refusal) or not decision.accepted:
        raise PodiumError(f"{task_id} was not accepted: {decision}")
    return decision.task


async def one_round(machine: Machine, victim: str, acknowledged: set[str]) -> Seen:
    """Start two jobs, kill one process in the middle, wait for two results."""
    tasks = [await send(machine, f"{victim}-{slot}", hours=ROUND_S / 3600) for slot in ("first", "second")]
    acknowledged.update(tasks)

    async def both_train() -> bool:
        views = {view.task: view for view in await asyncio.to_thread(machine.client.tasks)}
        return all((progress := views[task].progress) is not None and progress.step > 0 for task in tasks)

    async def checkpointed() -> bool:
        return all(
            any((machine.node_folder(view.slot) / "runs" / view.task / "checkpoints").glob("step-*"))
            for view in await asyncio.to_thread(machine.client.tasks)
            if view.task in tasks
        )

    await until("both jobs to train", both_train, ROUND_S)
    await until("a checkpoint of both", checkpointed, ROUND_S)
    before = {slot: machine.worker(slot) for slot in ("a", "b")}
    pid = machine.pid(victim)
    say(f"kill -9 {victim} (process {pid})")
    os.kill(pid, signal.SIGKILL)
    seen = Seen(victim=victim)
    probe = asyncio.create_task(_probe(machine, seen))
    began = time.monotonic()
    await asyncio.sleep(0.2)
    await machine.stack.ready(30.0)
    seen.back_s = time.monotonic() - began
    await until("both results", lambda: _ended(machine, tasks), ROUND_S + 30.0)
    probe.cancel()
    after = {slot: machine.worker(slot) for slot in ("a", "b")}
    seen.same_worker_a, seen.same_worker_b = before["a"] == after["a"], before["b"] == after["b"]
    views = {view.task: view for view in await asyncio.to_thread(machine.client.tasks)}
    seen.submitted = sum(views[task].state == "submitted" for task in tasks)
    say(f"{victim}: {seen}")
    return seen


async def _probe(machine: Machine, seen: Seen) -> None:
    """Ask the gateway ten times a second: a restart may delay an answer, never refuse it."""
    while True:
        try:
            await asyncio.to_thread(machine.client.slots)
        except PodiumError as error:
            if "refused" in str(error):  # a request that was being answered may break off; a new one waits
                seen.refused_requests += 1
        await asyncio.sleep(0.1)


async def _ended(machine: Machine, tasks: list[str]) -> bool:
    try:
        views = {view.task: view for view in await asyncio.to_thread(machine.client.tasks)}
    except PodiumError:  # the broker or the gateway is starting
        return False
    return all(task in views and views[task].state in ENDED for task in tasks)


async def rounds(folder: Path) -> tuple[list[Seen], Report]:
    """Run one round per victim, then judge."""
    machine = Machine(folder)
    acknowledged: set[str] = set()
    try:
        await machine.stack.start()
        await machine.stack.ready(60.0)
        seen = [await one_round(machine, victim, acknowledged) for victim in VICTIMS]
        bus = await connect(machine.stack.settings, name="checker")
        report = await check(
            bus,
            acknowledged=acknowledged,
            artifacts=machine.stack.settings.artifacts,
            lock_logs={slot: machine.node_folder(slot) / "slot.log" for slot in ("a", "b")},
        )
        await bus.close()
        return seen, report
    finally:
        await machine.stack.stop()


def disturbed(seen: Seen) -> list[str]:
    """Return findings about processes that a kill must not affect."""
    findings = []
    if not seen.same_worker_b:
        findings.append("slot b's worker was started again")
    if seen.victim != "worker" and not seen.same_worker_a:
        findings.append("slot a's worker was started again")
    if seen.victim == "worker" and seen.same_worker_a:
        findings.append("slot a's worker was not started again")
    if seen.submitted != 2:
        findings.append(f"{seen.submitted} of 2 jobs were submitted")
    if seen.refused_requests:
        findings.append(f"{seen.refused_requests} requests were refused")
    return [f"kill of the {seen.victim}: {finding}" for finding in findings]
