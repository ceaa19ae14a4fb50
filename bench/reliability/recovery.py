"""Measure how long a fleet takes to recover after a kill of its broker, a node, or a node and its worker.

    python -m bench recovery [--count 20]     # about 5 minutes

A real broker, gateways and a node with default timings; scripted workers. Measured are:

- broker: kill -9, down for .2 to 1 s. From the reopened port until a job offered after that is claimed.
- node: kill -9 while its worker trains. From the start of the new process until it has claimed the running
  job under a new epoch.
- node and worker: the same with both killed, until a new worker of the job has started.

The last line is one JSON object: medians and worst cases in seconds, and `violations`, medians over 2 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from bench.harness.fleet import GATEWAYS, SCRIPTED, Fleet
from podium.local.nats_server import port_open
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.errors import BusError, PodiumError
from shared.logs import set_up_logs
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, Result, StateRecord, decode_state_record
from shared.messages.offers import FileFormat, Offer, TaskType

JSON = {"Content-Type": "application/json"}
LIMIT_S = 2.0
POLL_S = 0.01
PATIENCE_S = 60.0
NODE, SLOT = "node-a", "a"


class Patient:
    """The fleet that is hurt, and what is seen of it."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance
        gap = lambda: chance.uniform(0.2, 1.0)  # noqa: E731
        self.fleet = Fleet(folder, SCRIPTED, gap, nodes={NODE: SLOT}, dataset_roots=(str(folder),))
        self.bus: Bus | None = None
        self._number = 0

    async def offer(self, steps: int) -> str:
        """Offer a new job until it is accepted; return its key."""
        self._number += 1
        task = f"job-{self._number:03d}"
        script = self.folder / f"{task}.json"
        script.write_text(json.dumps({"steps": steps, "step_s": 0.05, "checkpoint_every": 5}))
        offer = Offer(
            task_id=task,
            task_type=TaskType.INSTRUCT,
            model="podium/scripted",
            hours_to_complete=1.0,
            dataset=str(script),
            file_format=FileFormat.JSON,
            model_params_count=140_000,
        )
        url = self.fleet.url(GATEWAYS[0]) + "/v1/offers"

        async def accepted() -> bool | None:
            async with session.post(url, data=encode(offer), headers=JSON) as reply:
                return reply.status == 200 and bool((await reply.json())["accepted"])

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3.0)) as session:
            await self.until(f"{task} to be accepted", accepted)
        return task

    async def claimed(self, task: str, after_epoch: int = 0) -> Claimed:
        """Wait for the task's claim under a newer epoch."""

        async def there() -> Claimed | None:
            last = await self.last(task)
            return last if isinstance(last, Claimed) and last.epoch > after_epoch else None

        claim: Claimed = await self.until(f"a claim of {task}", there)
        return claim

    async def ended(self, task: str) -> None:
        """Wait for the task's result."""

        async def there() -> bool:
            return isinstance(await self.last(task), Result)

        await self.until(f"the result of {task}", there)

    async def training(self, task: str) -> None:
        """Wait for a checkpoint."""
        checkpoints = self.fleet.node_folder(NODE) / "runs" / task / "checkpoints"

        async def there() -> bool:
            return any(checkpoints.glob("step-*"))

        await self.until(f"a checkpoint of {task}", there)

    async def last(self, task: str) -> StateRecord | None:
        """Return the newest record of a task's chain."""
        if self.bus is None:
            self.bus = await connect(self.fleet.settings, name="recovery")
        record = await self.bus.last(subjects.state_stream(SLOT), subjects.state(SLOT, task))
        return decode_state_record(record.data) if record else None

    async def until(self, what: str, look: Callable[[], Awaitable[Any]]) -> Any:
        """Poll `look` every POLL_S until it returns a true value, and return that."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                if found := await look():
                    return found
            except (BusError, aiohttp.ClientError, TimeoutError, OSError):
                pass  # on the way back
            if time.monotonic() > give_up_at:
                raise PodiumError(f"waited {PATIENCE_S:g} s for {what}; logs are in {self.folder}")
            await asyncio.sleep(POLL_S)

    async def killed(self, name: str) -> None:
        """kill -9 a member, and wait until it was started again."""
        member = self.fleet.members[name]
        before = member.started_at
        member.signal(signal.SIGKILL)

        async def back() -> bool:
            return member.started_at > before

        await self.until(f"{name} to be started again", back)


async def broker(patient: Patient) -> float:
    """Kill the broker once."""
    if patient.bus is not None:
        await patient.bus.close()
        patient.bus = None
    await patient.killed("broker")
    await port_open(patient.fleet.port)
    opened_at = time.time()
    task = await patient.offer(steps=3)
    claim = await patient.claimed(task)
    await patient.ended(task)
    return claim.at - opened_at


async def node(patient: Patient, *, worker_too: bool) -> float:
    """Kill the node once, during a job."""
    task = await patient.offer(steps=120)
    await patient.training(task)
    epoch = (await patient.claimed(task)).epoch
    worker = patient.fleet.worker(NODE)
    if worker is None:
        raise PodiumError(f"{task} has no worker")
    killing = asyncio.create_task(patient.killed(NODE))
    if worker_too:
        os.kill(worker.pid, signal.SIGKILL)
    await killing
    started_at = patient.fleet.members[NODE].started_at
    claim = await patient.claimed(task, epoch)
    await patient.ended(task)
    again = patient.fleet.worker_starts(SLOT, task)
    if len(again) != 1 + worker_too:
        raise PodiumError(f"{task} had {len(again)} workers")
    return (again[-1] if worker_too else claim.at) - started_at


async def measure(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Run all rounds; return medians and worst cases."""
    patient = Patient(folder, random.Random(seed))
    kinds: dict[str, Callable[[], Awaitable[float]]] = {
        "broker": lambda: broker(patient),
        "node": lambda: node(patient, worker_too=False),
        "node_and_worker": lambda: node(patient, worker_too=True),
    }
    summary: dict[str, Any] = {"count": count}
    try:
        await patient.fleet.start()
        await patient.ended(await patient.offer(steps=3))
        for name, once in kinds.items():
            seconds = [await once() for _ in range(count)]
            summary[f"{name}_median_s"] = round(statistics.median(seconds), 3)
            summary[f"{name}_max_s"] = round(max(seconds), 3)
            print(f"{name}: {', '.join(f'{value:.2f}' for value in sorted(seconds))}", flush=True)
        return summary
    finally:
        if patient.bus is not None:
            await patient.bus.close()
        await patient.fleet.close()


def main() -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20, help="rounds of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_up_logs("console", "error", service="recovery")
    with tempfile.TemporaryDirectory(prefix="podium-recovery-") as folder:
        summary = asyncio.run(measure(Path(folder), args.count, args.seed))
    slow = [name for name, value in summary.items() if name.endswith("median_s") and value > LIMIT_S]
    print(msgspec.json.encode(summary | {"violations": len(slow)}).decode())
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
