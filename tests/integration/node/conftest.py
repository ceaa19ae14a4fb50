"""A small world for trainer nodes: real broker, real node processes, scripted workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.streams import bootstrap
from shared.errors import BusError
from shared.files import folder_digest
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed, Job, Result, StateRecord, decode_state_record
from shared.messages.offers import Decision, FileFormat, Offer, TaskType
from shared.messages.slots import Lease, decode_lease
from shared.settings import Settings
from trainer_node.worker.supervisor import WorkerFile

SCRIPTED_WORKER = Path(__file__).parents[3] / "bench" / "harness" / "scripted_worker.py"
QUICK = {"lease_ttl_s": 2, "lease_renew_s": 0.3, "lease_trust_s": 1.2, "poll_s": 0.5, "stop_grace_s": 5}


def claims(chain: list[StateRecord]) -> list[Claimed]:
    """Return the claims of a state chain, oldest first."""
    return [record for record in chain if isinstance(record, Claimed)]


class NodeProcess:
    """One `python -m trainer_node` with a folder of its own; stays the same node over restarts."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment | {"PODIUM_NODE_DIR": str(folder)}
        self.log_file = folder / "node.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **settings: Any) -> NodeProcess:
        self.folder.mkdir(parents=True, exist_ok=True)
        extra = {f"PODIUM_{key.upper()}": str(value) for key, value in settings.items()}
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer_node"],
                env=self.environment | extra,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def node_id(self) -> str:
        return (self.folder / "node_id").read_text()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def wait(self, timeout_s: float = 60) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, timeout_s)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.wait()

    def worker(self) -> WorkerFile:
        return msgspec.json.decode((self.folder / "worker.json").read_bytes(), type=WorkerFile)

    def slot_log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "slot.log").read_text().splitlines()]


class World:
    """What a test does to a slot and sees of it."""

    def __init__(
        self, bus: Bus, broker: Broker, make_settings: Callable[..., Settings], folder: Path
    ) -> None:
        self.bus = bus
        self.make_settings = make_settings
        self.broker = broker
        self.settings = make_settings()
        self.folder = folder
        self.nodes: list[NodeProcess] = []

    @property
    def knobs(self) -> Path:
        """Where the jobs' data lies."""
        folder = self.folder / "knobs"
        folder.mkdir(exist_ok=True)
        return folder

    def node(self, name: str = "one", **settings: Any) -> NodeProcess:
        values = {
            "nats_url": self.broker.url,
            "data_dir": self.settings.data_dir,
            "dataset_roots": str(self.knobs),
            "worker_command": json.dumps([sys.executable, str(SCRIPTED_WORKER)]),
            "hardware": "cpu",
            "log_level": "debug",
        }
        environment = dict(os.environ) | {
            f"PODIUM_{key.upper()}": str(value) for key, value in (values | QUICK | settings).items()
        }
        node = NodeProcess(self.folder / "nodes" / name, environment)
        self.nodes.append(node)
        return node

    async def give(self, task: str = "job1", *, seconds: float = 60, slot: str = "a", **knobs: Any) -> Job:
        """Store a job as a gateway does."""
        data = self.knobs / f"{task}.json"
        data.write_text(json.dumps(knobs))
        now = time.time()
        offer = Offer(
            task_id=task,
            task_type=TaskType.INSTRUCT,
            model="org/scripted",
            hours_to_complete=1,
            dataset=knobs.pop("dataset", str(data)),
            file_format=FileFormat.JSON,
        )
        job = Job(
            record_id=f"job-{task}",
            task_id=task,
            task=task,
            slot=slot,
            gateway="test",
            offer=offer,
            decision=Decision(task_id=task, task=task, accepted=True, reason="", slot=slot),
            received_at=now,
            deadline_at=now + seconds,
        )
        await self.bus.append(subjects.JOBS_STREAM, subjects.job(slot, task), encode(job), last_on_subject=0)
        return job

    async def streams(self) -> bool:
        """Make the streams again."""
        await bootstrap(self.bus, self.settings)
        return True

    async def chain(self, task: str = "job1", slot: str = "a") -> list[StateRecord]:
        records = await self.bus.read(subjects.state_stream(slot), after=0)
        subject = subjects.state(slot, task)
        return [decode_state_record(record.data) for record in records if record.subject == subject]

    async def lease(self, slot: str = "a") -> Lease | None:
        record = await self.bus.last(subjects.LEASES_STREAM, subjects.lease(slot))
        return decode_lease(record.data) if record and record.data else None

    async def result(self, task: str = "job1", timeout_s: float = 90) -> Result:
        """The task's result, once it is there; nothing may come after it."""

        async def there() -> Result | None:
            records = [record for record in await self.chain(task) if isinstance(record, Result)]
            return records[0] if records else None

        result = await self.until(there, timeout_s, f"no result of {task}")
        await asyncio.sleep(0.3)
        records = await self.chain(task)
        assert records[-1] == result
        assert sum(isinstance(record, Result) for record in records) == 1
        return result

    def submitted(self, task: str = "job1") -> str:
        """Digest of what lies under the task's submission name."""
        return folder_digest(self.settings.artifacts / task / "submission")

    def steps(self, node: NodeProcess, task: str = "job1") -> list[int]:
        """Return every step that a worker reported, in order."""
        path = node.folder / "runs" / task / "progress.jsonl"
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""  # a line may be half written
        return [line["step"] for line in map(json.loads, whole.splitlines()) if line["phase"] == "train"]

    async def trained(self, node: NodeProcess, step: int, task: str = "job1") -> None:
        """Wait until a worker has reported `step`."""

        async def there() -> bool:
            return step in self.steps(node, task)

        await self.until(there, 60, f"step {step} of {task} not reached")

    async def until(self, look: Callable[[], Any], timeout_s: float, otherwise: str) -> Any:
        """What `look` finds, once it is true; a broker that is down is waited for."""
        end = time.monotonic() + timeout_s
        while True:
            with suppress(BusError):
                if found := await look():
                    return found
            assert time.monotonic() < end, f"{otherwise} within {timeout_s:g} s"
            await asyncio.sleep(0.05)

    async def exists(self, path: Path) -> None:
        """Wait until a file is there."""

        await self.until(lambda: asyncio.to_thread(path.exists), 60, f"no {path}")


@pytest.fixture
async def world(
    bus: Bus, broker: Broker, make_settings: Callable[..., Settings], tmp_path: Path
) -> AsyncIterator[World]:
    world = World(bus, broker, make_settings, tmp_path)
    yield world
    for node in world.nodes:
        if node.process is not None and node.running:
            node.signal(signal.SIGCONT)
            node.signal(signal.SIGKILL)
            node.process.wait()
        if (node.folder / "worker.json").exists():
            try:
                os.killpg(node.worker().pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
