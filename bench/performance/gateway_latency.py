"""Measure the milliseconds of `POST /v1/offers` on a real gateway process and nats-server.

    python -m bench gateway_latency [--count 300]

Accepting stores a synced job; rejecting reads the ends of all logs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp

from podium.local.nats_server import Broker
from shared import subjects
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.streams import bootstrap
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.jobs import Result, ResultStatus
from shared.messages.slots import Heartbeat
from shared.net import free_port
from shared.settings_sources import load_settings

CPU = Hardware(device="cpu", count=8, memory_bytes=64 << 30)
AT_ONCE = 500

Post = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def offer(task: str, hours: float) -> dict[str, Any]:
    """Return an offer of a model that any machine can train."""
    return {
        "task_id": task,
        "task_type": "InstructTextTask",
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "hours_to_complete": hours,
        "dataset": "rows.jsonl",
        "file_format": "jsonl",
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_ms": round(cuts[49] * 1e3, 3), "p99_ms": round(cuts[98] * 1e3, 3)}


async def beat(bus: Bus) -> None:
    """Show both slots as live."""
    while True:
        for slot in "ab":
            heartbeat = Heartbeat(slot=slot, node=slot, epoch=1, hardware=CPU, at=time.time())
            await bus.publish(subjects.heartbeat(slot), encode(heartbeat))
        await asyncio.sleep(0.5)


async def accepted(post: Post, bus: Bus, count: int) -> list[float]:
    """Seconds of each acceptance; a result frees the slot in between, outside the measured time."""
    seconds = []
    for number in range(count):
        task = f"accept-{number}"
        begun = time.perf_counter()
        decision = await post(offer(task, 2))
        seconds.append(time.perf_counter() - begun)
        if not decision["accepted"]:
            raise SystemExit(f"not accepted: {decision['reason']}")
        slot = decision["slot"]
        result = Result(record_id=task, task=task, task_id=task, slot=slot, status=ResultStatus.FAILED)
        await bus.append(subjects.state_stream(slot), subjects.state(slot, task), encode(result))
    return seconds


async def refused(post: Post, count: int) -> list[float]:
    """Seconds of each refusal, one after the other."""
    seconds = []
    for number in range(count):
        begun = time.perf_counter()
        await post(offer(f"refuse-{number}", 97))
        seconds.append(time.perf_counter() - begun)
    return seconds


async def at_once(post: Post, count: int) -> tuple[list[float], int]:
    """Seconds of `count` simultaneous offers, and how many of them were accepted."""
    begun = time.perf_counter()

    async def one(number: int) -> tuple[float, bool]:
        decision = await post(offer(f"burst-{number}", 2))
        return time.perf_counter() - begun, decision["accepted"]

    answers = await asyncio.gather(*(one(number) for number in range(count)))
    return [seconds for seconds, _ in answers], sum(accepted for _, accepted in answers)


async def measure(count: int) -> dict[str, Any]:
    """Start everything, measure, stop everything."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = Broker(folder / "nats")
        await broker.start()
        stack.push_async_callback(broker.stop)
        settings = load_settings({}, nats_url=broker.url, data_dir=str(folder / "data"))
        bus = await connect(settings, name="bench")
        stack.push_async_callback(bus.close)
        await bootstrap(bus, settings)
        port = free_port()
        gateway = await start_gateway(folder, broker.url, port)
        stack.push_async_callback(gateway.wait)
        stack.callback(gateway.terminate)
        beating = asyncio.create_task(beat(bus))
        stack.callback(beating.cancel)
        connector = aiohttp.TCPConnector(limit=0)
        client = await stack.enter_async_context(
            aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector)
        )
        await until_live(client)

        async def post(body: dict[str, Any]) -> dict[str, Any]:
            async with client.post("/v1/offers", json=body) as response:
                answer: dict[str, Any] = await response.json()
                return answer

        await refused(post, 20)
        figures: dict[str, Any] = {
            "accept": quantiles(await accepted(post, bus, count)),
            "refuse": quantiles(await refused(post, count)),
        }
        seconds, taken = await at_once(post, AT_ONCE)
        figures["at_once"] = {"offers": AT_ONCE, "accepted": taken, "last_ms": round(max(seconds) * 1e3, 1)}
        return figures


async def start_gateway(folder: Path, nats_url: str, port: int) -> asyncio.subprocess.Process:
    """Start a gateway process; its log is gateway.log."""
    environ = os.environ | {
        "PODIUM_NATS_URL": nats_url,
        "PODIUM_DATA_DIR": str(folder / "data"),
        "PODIUM_GATEWAY_PORT": str(port),
        "PODIUM_EXPECTED_HARDWARE": "cpu",
        "PODIUM_HUB_LOOK_S": "0",
        "PODIUM_LOG_FORMAT": "json",
    }
    with (folder / "gateway.log").open("wb") as log:
        return await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", env=environ, stderr=log)


async def until_live(client: aiohttp.ClientSession) -> None:
    """Wait until the gateway decides and both slots are live."""
    async with asyncio.timeout(30):
        while True:
            try:
                async with client.get("/readyz") as ready, client.get("/v1/slots") as slots:
                    views = (await slots.json())["slots"]
                    if ready.status == 200 and all(view["live"] for view in views):
                        return
            except aiohttp.ClientConnectionError:
                pass  # not listening yet
            await asyncio.sleep(0.05)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="offers of each kind")
    figures = asyncio.run(measure(parser.parse_args().count))
    for kind, values in figures.items():
        print(f"{kind:8}", *(f"{name} {value}" for name, value in values.items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
