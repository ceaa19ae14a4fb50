"""A fleet for fault injection: broker, two gateways, two nodes, a standby; each is restarted when it dies.

This is the bench's own supervisor. `podium up` restarts processes with fixed pauses and in a fixed order;
here each process restarts after a random gap, so that every order occurs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from podium.local.nats_server import broker_command, port_open, write_config
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.streams import bootstrap
from shared.errors import BusUnavailableError, PodiumError
from shared.net import free_port
from shared.processes import start_time
from shared.settings import Settings
from shared.settings_sources import PREFIX, load_settings
from trainer_node.worker.supervisor import WorkerFile

ROOT = Path(__file__).parents[2]
SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_worker.py")))
ENGINE = (sys.executable, "-m", "trainer_node.engine")
WITNESS = Path(__file__).with_name("worker_witness.py")
NODES = {"node-a": "a", "standby-a": "a", "node-b": "b"}  # node -> slot; two contend for one
GATEWAYS = ("gateway-1", "gateway-2")
STOP_S = 10.0


class Member:
    """One process of the fleet: kept running, with a random gap after each death."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self.command = command
        self.environment = environment
        self.log = folder / f"{name}.log"
        self.process: asyncio.subprocess.Process | None = None
        self.started_at = 0.0
        self.expected = False  # whether the next end is a fault's work
        self.own_ends: list[int] = []  # exit codes of ends that were not
        self.closing = False

    @property
    def pid(self) -> int | None:
        """Return the process id if it runs."""
        running = self.process is not None and self.process.returncode is None
        return self.process.pid if running and self.process else None

    async def keep(self, gap: Callable[[], float]) -> None:
        """Run it until `close`; `gap` says how long it stays dead."""
        while True:
            self.expected = False
            self.started_at = time.time()
            with self.log.open("ab") as log:
                self.process = await asyncio.create_subprocess_exec(
                    *self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
                )
            code = await self.process.wait()
            if self.closing:
                return
            if not self.expected:
                self.own_ends.append(code)
            await asyncio.sleep(gap())

    def signal(self, number: int) -> bool:
        """Send it a signal; False if it is not running."""
        if self.pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return True

    async def close(self) -> None:
        """End it for good."""
        self.closing = True
        if self.process is None or not self.signal(signal.SIGTERM):
            return
        self.signal(signal.SIGCONT)
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.process.wait()


def any_gap(chance: random.Random) -> float:
    """Seconds until a dead process is started again: mostly at once, sometimes beyond the lease."""
    kind = chance.random()
    return chance.uniform(0.0, 0.3) if kind < 0.5 else chance.uniform(0.3, 2.0 if kind < 0.85 else 6.0)


class Fleet:
    """All members in one folder, and where what they leave behind is found."""

    def __init__(
        self,
        folder: Path,
        worker: tuple[str, ...],
        gap: Callable[[], float],
        *,
        nodes: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.gap = gap
        self.nodes = nodes or NODES
        self.witness = folder / "witness"
        self.port = free_port()
        command = (sys.executable, "-IS", str(WITNESS), str(self.witness), *worker)
        self.settings: Settings = load_settings(
            {},
            data_dir=str(folder / "data"),
            nats_url=f"nats://127.0.0.1:{self.port}",
            expected_hardware="cpu",
            hardware="cpu",
            deadline_margin_s=0.0,
            hub_look_s=0.0,
            threads=1,
            slots=tuple(sorted(set(self.nodes.values()))),
            worker_command=command,
            **settings,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self.members: dict[str, Member] = {}

    def build(self) -> None:
        """Write the settings file, and what each member is."""
        for path in (self.witness, self.folder / "logs", self.folder / "progress", self.folder / "data"):
            path.mkdir(parents=True, exist_ok=True)
        (self.folder / "podium.toml").write_text(_toml(self.settings))
        write_config(self.folder / "nats", self.port, free_port())
        logs, base = self.folder / "logs", _environment(self.folder / "podium.toml")
        broker = broker_command(self.folder / "nats" / "nats.conf")
        self.members["broker"] = Member("broker", broker, base, logs)
        for name in GATEWAYS:
            own = {
                "gateway_port": str(free_port()),
                "gateway_id": name,
                "data_dir": str(self.folder / "data" / name),
            }
            self.members[name] = Member(name, [sys.executable, "-m", "gateway"], base | _variables(own), logs)
        for name, slot in self.nodes.items():
            own = {"slot": slot, "node_dir": str(self.node_folder(name))}
            command = [sys.executable, "-m", "trainer_node"]
            self.members[name] = Member(name, command, base | _variables(own), logs)

    async def start(self) -> None:
        """Start everything, the broker first this once: its streams are wanted."""
        self.build()
        for name, member in self.members.items():
            self._tasks.append(asyncio.create_task(member.keep(self.gap), name=name))
            if name == "broker":
                await port_open(self.port)

    async def bus(self) -> Bus:
        """Return a connection of the bench's own; the streams exist."""
        bus = await connect(self.settings, name="chaos")
        while True:
            try:
                await bootstrap(bus, self.settings)
                return bus
            except BusUnavailableError:
                await asyncio.sleep(0.1)

    def check(self) -> None:
        """Raise what ended a supervisor; none ends by itself."""
        for task in self._tasks:
            if task.done():
                task.result()
                raise PodiumError(f"the supervisor of {task.get_name()} ended")

    def wake_all(self) -> None:
        """Wake every stopped process."""
        for member in self.members.values():
            member.signal(signal.SIGCONT)
        for worker in self.workers():
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGCONT)

    async def close(self) -> None:
        """End everything, workers last: they outlive their nodes by design."""
        self.wake_all()
        members = list(self.members.values())
        await asyncio.gather(*(member.close() for member in members if member.name != "broker"))
        await self.members["broker"].close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers():
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)

    def url(self, gateway: str) -> str:
        """Return a gateway's URL."""
        return f"http://127.0.0.1:{self.members[gateway].environment['PODIUM_GATEWAY_PORT']}"

    def node_folder(self, name: str) -> Path:
        """Return a node's work folder."""
        return self.folder / "nodes" / name

    def worker(self, node: str) -> WorkerFile | None:
        """Return the running worker of a node."""
        try:
            file = msgspec.json.decode((self.node_folder(node) / "worker.json").read_bytes(), type=WorkerFile)
        except FileNotFoundError:
            return None
        return file if start_time(file.pid) == file.start_time else None

    def workers(self) -> Iterator[WorkerFile]:
        """Return all running workers."""
        return (worker for node in self.nodes if (worker := self.worker(node)) is not None)

    def worker_starts(self, slot: str, task: str) -> list[float]:
        """Return when the task's workers were started, by the witness."""
        lines = map(json.loads, (self.witness / f"{slot}.log").read_bytes().splitlines())
        return [line["at"] for line in lines if line["task"] == task and line["event"] == "acquired"]

    def keep_progress(self) -> None:
        """Link each run's progress file before the node prunes its folder; the link grows with it."""
        for node in self.nodes:
            for path in (self.node_folder(node) / "runs").glob("*/progress.jsonl"):
                kept = self.folder / "progress" / f"{node}.{path.parent.name}.jsonl"
                with suppress(FileNotFoundError, FileExistsError):
                    os.link(path, kept)

    def lock_logs(self) -> dict[str, Path]:
        """Return the logs of who held each slot, by the nodes and by the bench's witnesses."""
        nodes = {f"{self.nodes[node]} ({node})": self.node_folder(node) / "slot.log" for node in self.nodes}
        return nodes | {slot: self.witness / f"{slot}.log" for slot in self.settings.slots}

    def tracebacks(self) -> dict[str, int]:
        """Return the number of unexpected tracebacks in each member's log."""
        counts = {name: m.log.read_bytes().count(b"Traceback") for name, m in self.members.items()}
        return {name: count for name, count in counts.items() if count}

    def remove(self) -> None:
        """Delete the whole folder."""
        shutil.rmtree(self.folder)


def _variables(values: dict[str, str]) -> dict[str, str]:
    return {PREFIX + key.upper(): value for key, value in values.items()}


def _environment(config: Path) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith((PREFIX, "LISTEN_"))}
    return inherited | {"PODIUM_CONFIG": str(config)}


def _toml(settings: Settings) -> str:
    """Return the settings that differ from the defaults as TOML, whose values are JSON's."""
    lines = []
    for field in msgspec.structs.fields(Settings):
        value = getattr(settings, field.name)
        if value is None or (field.default is not msgspec.NODEFAULT and value == field.default):
            continue
        if isinstance(value, dict):
            if value:
                inner = ", ".join(f"{json.dumps(key)} = {json.dumps(item)}" for key, item in value.items())
                lines.append(f"{field.name} = {{ {inner} }}")
            continue
        lines.append(f"{field.name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"
