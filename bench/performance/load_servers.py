"""The servers that bench/performance/gateway_load.py compares: real processes on one core, two busy slots.

- ours: `python -m gateway` on a real nats-server, both slots live, one mirror, one decision file
- reference: `python -m bench.performance.fastapi_gateway`
- canned: a constant response by an asyncio protocol, to measure the load generator's own limit
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from msgspec import Struct

from bench.fake_validator.validator import Keys, Validator, accepted
from bench.performance.gateway_latency import beat, until_live
from podium.local.nats_server import Broker
from shared.broker.connection import connect
from shared.broker.streams import bootstrap
from shared.errors import PodiumError
from shared.net import free_port
from shared.settings_sources import load_settings

START_S = 30.0
TAKEN = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")


class Server(Struct, frozen=True):
    """A running server, and the processes whose CPU time it costs."""

    name: str
    port: int
    pid: int
    broker_pid: int | None = None

    def cpu_s(self) -> float:
        """Seconds of CPU that the server itself has used."""
        return cpu_s(self.pid)

    def broker_cpu_s(self) -> float:
        """Seconds of CPU that its broker has used."""
        return cpu_s(self.broker_pid) if self.broker_pid else 0.0


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process, by the scheduler's own count of nanoseconds."""
    return (
        sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
    )


def pin(pid: int, core: int) -> None:
    """Keep every thread of a process, and those it will start, on one core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


@asynccontextmanager
async def process(command: list[str], core: int, log: Path, environ: dict[str, str]) -> AsyncIterator[int]:
    """Run one server on one core; its process id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        child = await asyncio.create_subprocess_exec(*command, env=environ, stdout=out, stderr=out)
    os.sched_setaffinity(child.pid, {core})
    try:
        yield child.pid
    finally:
        if child.returncode is None:
            child.terminate()
        await child.wait()


@asynccontextmanager
async def ours(
    folder: Path, core: int, broker_core: int, miner: Keys, validator: Keys | None
) -> AsyncIterator[Server]:
    """Our gateway; signed if there is a validator."""
    async with AsyncExitStack() as stack:
        broker = Broker(folder / "nats")
        await broker.start()
        stack.push_async_callback(broker.stop)
        if broker.process is None:
            raise PodiumError("the broker has no process")
        pin(broker.process.pid, broker_core)
        settings = load_settings({}, nats_url=broker.url, data_dir=str(folder / "data"), upstream_auth="off")
        bus = await connect(settings, name="bench")
        stack.push_async_callback(bus.close)
        await bootstrap(bus, settings)
        port = free_port()
        environ = os.environ | {
            "PODIUM_NATS_URL": broker.url,
            "PODIUM_DATA_DIR": str(folder / "data"),
            "PODIUM_GATEWAY_PORT": str(port),
            "PODIUM_EXPECTED_HARDWARE": "cpu",
            "PODIUM_HUB_LOOK_S": "0",
            "PODIUM_LOG_FORMAT": "json",
            "PODIUM_RESERVATION_S": "86400",
            "PODIUM_HOTKEY": miner.address,
            "PODIUM_UPSTREAM_AUTH": "signed" if validator else "off",
            "PODIUM_UPSTREAM_VALIDATORS": validator.address if validator else "",
        }
        command = [sys.executable, "-m", "gateway"]
        pid = await stack.enter_async_context(process(command, core, folder / "gateway.log", environ))
        beating = asyncio.create_task(beat(bus))
        stack.callback(beating.cancel)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            await until_live(session)
        await take_slots(port, miner, validator)
        yield Server("ours", port, pid, broker.process.pid)


@asynccontextmanager
async def reference(folder: Path, core: int, miner: Keys, validator: Keys | None) -> AsyncIterator[Server]:
    """Serve the reference stack; signed if there is a validator."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "bench.performance.fastapi_gateway",
        "--port",
        str(port),
        "--folder",
        str(folder),
    ]
    if validator:
        command += ["--hotkey", miner.address, "--validator", validator.address]
    async with process(command, core, folder / "gateway.log", dict(os.environ)) as pid:
        await listening(port)
        await take_slots(port, miner, validator)
        yield Server("reference", port, pid)


@asynccontextmanager
async def canned(folder: Path, core: int) -> AsyncIterator[Server]:
    """Serve canned responses: the cheapest server possible here."""
    port = free_port()
    command = [sys.executable, "-m", "bench.performance.load_servers", str(port)]
    async with process(command, core, folder / "canned.log", dict(os.environ)) as pid:
        await listening(port)
        yield Server("canned", port, pid)


async def listening(port: int) -> None:
    """Wait until something accepts connections."""
    until = time.monotonic() + START_S
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError as error:
            if time.monotonic() > until:
                raise PodiumError(f"nothing listens on port {port} after {START_S:g} s") from error
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return


async def take_slots(port: int, miner: Keys, validator: Keys | None) -> None:
    """Have two offers accepted, so that every other one meets full slots."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        upstream = Validator(session, validator, miner.address)
        for task in TAKEN:
            offer = {
                "ds_size": 100_000,
                "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "hours_to_complete": 4,
                "task_id": task,
                "task_type": "InstructTextTask",
                "model_params_count": 134_515_008,
            }
            reply = await upstream.offer(offer)
            if not accepted(reply):
                raise PodiumError(f"the slots could not be taken: {reply}")


class Canned(asyncio.Protocol):
    """Answers whatever comes; requests are small and come whole."""

    BODY = b'{"message":"At maximum accuracy capacity (2 jobs for #1)","accepted":false}'
    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n%b" % (
        len(BODY),
        BODY,
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where to write."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer."""
        self.transport.write(self.ANSWER)  # type: ignore[attr-defined]


async def serve_canned(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve_canned(int(sys.argv[1])))
