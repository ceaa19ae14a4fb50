"""One machine's whole Podium: broker, gateway and a node per slot, as processes that are kept running."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import msgspec

from gateway.api.tokens import own_token
from podium.client import Client
from podium.local.discovery import KEYS
from podium.local.gpu_split import SlotShare, Split
from podium.local.nats_server import bootstrap, broker_command, port_open, take_over_open_store, write_config
from podium.local.process import ManagedProcess, Say, Spec
from podium.local.watchdog import until_broken
from podium.security.key_files import make_users
from shared.errors import PodiumError
from shared.net import BACKLOG, LOOPBACK, LOOPBACK_HOSTS, free_port
from shared.settings import Settings
from shared.settings_sources import PREFIX
from trainer_node.worker.slot_lock import SlotLock

OWN_FOLDERS = ("nats", KEYS, "mirror", "nodes", "artifacts", "logs", "run")  # in the data folder
NODE_EXTRA_S = 15.0  # time for a node to drain, in addition to its worker's grace


class Stack:
    """Services in the order in which they start; they stop in reverse order.

    The gateway's listening socket belongs to the stack, so a request that arrives while the gateway
    restarts waits for it. All persistent data is in the data folder; the next stack continues with it.
    """

    def __init__(self, settings: Settings, split: Split, say: Say) -> None:
        self.folder = settings.data.absolute()
        self.split = split
        self.services: list[ManagedProcess] = []
        self.broker_port = _own_broker_port(settings)
        nats_url = f"nats://{LOOPBACK}:{self.broker_port}" if self.broker_port else settings.nats_url
        self.settings = msgspec.structs.replace(
            settings,
            data_dir=str(self.folder),
            nats_url=nats_url,
            slots=tuple(share.slot for share in split.shares),
            slot=split.shares[0].slot,
            expected_hardware=split.expected_hardware,
        )
        if self.broker_port:  # its own users, and no TLS: no traffic leaves this machine
            own: dict[str, Any] = {"nats_nkey_seed_file": str(self.folder / KEYS), "nats_ca_file": None}
            self.settings = msgspec.structs.replace(self.settings, **own)
        self._say = say
        self._tasks: list[asyncio.Task[None]] = []
        self._lock: TextIO | None = None
        self._listening: socket.socket | None = None

    @property
    def url(self) -> str:
        """Return the gateway's URL, once started."""
        if self._listening is None:
            raise PodiumError("not started")
        host, port = self._listening.getsockname()[:2]
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def start(self, *, fresh: bool = False) -> None:
        """Lock the folder, stop leftovers of an earlier launch, start everything. Raises PodiumError.

        `fresh`: delete the folder's data first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / "up.lock"
        if fresh and not lock.exists() and any(self.folder.iterdir()):
            raise PodiumError(f"{self.folder} holds files that are not Podium's; choose another --data-dir")
        self._lock = _take(lock)
        self.services = [ManagedProcess(spec, self.folder, self._say) for spec in self._specs()]
        for service in reversed(self.services):
            await service.stop_leftover()
        if fresh:
            await self._kill_workers()
            for name in OWN_FOLDERS:
                await asyncio.to_thread(shutil.rmtree, self.folder / name, ignore_errors=True)
        if self.broker_port:
            _listen(LOOPBACK, self.broker_port, "--nats-port").close()
            monitor_port = free_port()
            self._prepare_broker(monitor_port)
            watch = partial(until_broken, monitor_port, self.settings.broker_patience_s)
            self.services[0].watch = watch
        self._listening = _listen(self.settings.gateway_host, self.settings.gateway_port, "--port")
        for service in self.services:
            if service.spec.name == "gateway":
                service.socket = self._listening.fileno()
            self._tasks.append(asyncio.create_task(service.supervise(), name=service.spec.name))
            if service.spec.name == "broker":
                await port_open(self.broker_port)
                await bootstrap(self.settings)

    def _prepare_broker(self, monitor_port: int) -> None:
        keys = self.folder / KEYS
        make_users(keys, self.settings.slots)
        write_config(self.folder / "nats", self.broker_port, monitor_port, keys=keys)
        if take_over_open_store(self.folder / "nats"):
            self._say("the broker now has users; its store was moved to their account")

    async def ready(self, timeout_s: float) -> None:
        """Wait until the gateway decides on offers and every slot's node sends heartbeats."""
        client, until = Client(self.url, own_token(self.settings)), time.monotonic() + timeout_s
        while missing := await asyncio.to_thread(_what_is_missing, client, len(self.split.shares)):
            self.check()
            if time.monotonic() > until:
                raise PodiumError(f"not ready after {timeout_s:g} s: {missing}; see {self.folder / 'logs'}")
            await asyncio.sleep(0.2)

    def check(self) -> None:
        """Raise PodiumError if a service can't be kept running."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def wait(self) -> None:
        """Wait until a service can't be kept running; raise its PodiumError."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        self.check()

    async def stop(self, *, kill_workers: bool = False) -> None:
        """Drain the nodes, then the gateway, then the broker; `kill_workers`: kill remaining workers."""
        pairs = list(zip(self.services, self._tasks, strict=False))  # not all were started if `start` failed
        for prefix in ("node-", "gateway", "broker"):
            group = [(service, task) for service, task in pairs if service.spec.name.startswith(prefix)]
            for service, _ in group:
                service.stop()
            await asyncio.gather(*(task for _, task in group), return_exceptions=True)
        self._tasks.clear()
        if kill_workers and self._lock is not None:  # without the lock they belong to another launcher
            await self._kill_workers()
        for held in (self._listening, self._lock):
            if held is not None:
                held.close()

    async def _kill_workers(self) -> None:
        """Kill the workers, which by design outlive their nodes."""
        for share in self.split.shares:
            lock = SlotLock(self._node_folder(share))
            for pid in await asyncio.to_thread(lock.holders):
                self._say(f"killing the worker of slot {share.slot} (process {pid})")
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _specs(self) -> list[Spec]:
        environment = _environment(self.settings)
        python = sys.executable
        command = [python, "-m", "gateway"]
        # a short pause: upstream sends a start once and waits 10 s for the answer
        specs = [Spec(name="gateway", command=command, environment=environment, longest_pause_s=1.0)]
        specs += [self._node(share, environment) for share in self.split.shares]
        if self.broker_port:
            specs.insert(0, Spec(name="broker", command=broker_command(self.folder / "nats" / "nats.conf")))
        return specs

    def _node(self, share: SlotShare, environment: dict[str, str]) -> Spec:
        own = {"slot": share.slot, "node_dir": str(self._node_folder(share)), "threads": str(share.threads)}
        if share.gpus is not None:
            own["gpus"] = share.gpus
        elif self.settings.hardware == "auto":
            own["hardware"] = "cpu"
        return Spec(
            name=f"node-{share.slot}",
            command=[sys.executable, "-m", "trainer_node"],
            environment=environment | {PREFIX + key.upper(): value for key, value in own.items()},
            stop_s=self.settings.stop_grace_s + NODE_EXTRA_S,
            # SIGTERM would stop its worker; after SIGKILL the worker trains on and the next node adopts it.
            on_leftover=signal.SIGKILL,
        )

    def _node_folder(self, share: SlotShare) -> Path:
        return Path(self.settings.node_dir or self.folder / "nodes").expanduser().absolute() / share.slot


def _environment(settings: Settings) -> dict[str, str]:
    """Return every setting as a variable, so that all services have the same settings."""
    values = {}
    for name, value in msgspec.structs.asdict(settings).items():
        if value is not None:
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            values[PREFIX + name.upper()] = text
    return values


def _own_broker_port(settings: Settings) -> int:
    """Return the embedded broker's port; 0 if the settings name a broker on another machine."""
    parts = urlsplit(settings.nats_url)
    if parts.hostname not in LOOPBACK_HOSTS:
        return 0
    return 4222 if parts.port is None else parts.port or free_port()


def _take(path: Path) -> TextIO:
    """Lock the data folder while the returned file is open."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise PodiumError(
            f"podium already runs on {path.parent}; choose another folder with --data-dir"
        ) from error
    return file


def _listen(host: str, port: int, option: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise PodiumError(
            f"can't listen on {host}:{port}: {error.strerror or error}; "
            f"choose another port with {option} (0 = any)"
        ) from error


def _what_is_missing(client: Client, nodes: int) -> str | None:
    """Return None if the gateway is ready and `nodes` nodes hold their slots, else what is missing."""
    try:
        if why := client.why_not_ready():
            return why
        live = [slot.slot for slot in client.slots() if slot.live]
    except PodiumError as error:
        return str(error)
    return None if len(live) >= nodes else f"live slots: {', '.join(live) or 'none'}"
