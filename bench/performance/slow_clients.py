"""Measure how fast offers are answered while others hold connections, by each kind of attack.

    python -m bench slow_clients [--kinds silent ...] [--clients 1000] [--seconds 5] [--rate 40]

A real gateway on a real nats-server. Attackers in a process of their own hold connections and come back half
a second after one is closed: silent ones, heads and bodies byte by byte, half-closed sockets; and a tenth as
many that pipeline 200 requests at a time, read no response, or leave at once. Meanwhile a validator sends
signed offers, each over a new connection. At the end silent clients stay, and the gateway must close them by
itself.

The last line is one JSON object: offers, how many of them were lost (no answer with status 200 within
upstream's 3 s), worst_ms of all, most open descriptors, the gateway's memory, and seconds until the silent
clients were closed. Exit code 1 if an offer was lost or took over 500 ms, or connections stayed open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from msgspec import Struct

from bench.fake_validator.validator import (
    OFFER,
    OFFER_TIMEOUT_S,
    Keys,
    keys_from_seed,
    request_bytes,
    signed_headers,
)
from bench.harness.http_load_client import Plan, offers
from bench.harness.slow_clients import FLOODS, KINDS, attack
from bench.performance.gateway_latency import quantiles
from bench.performance.load_servers import TAKEN, Server, ours

LEFT = "silent_once"  # clients that stay silent, and don't come back
LIMIT_MS = 500.0
STAY_S = 60.0  # within which the gateway must have closed connections that it can't use
SETTLED = 20  # connections that are left between two attacks: NATS, files, the listening socket


class Phase(Struct, frozen=True):
    """Offers during one attack."""

    name: str
    offers: int
    lost: int
    p50_ms: float
    p99_ms: float
    worst_ms: float
    open: int  # most descriptors of the gateway
    memory_mb: int


def descriptors(pid: int) -> int:
    """Return how many files and sockets a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def memory_mb(pid: int) -> int:
    """Return the memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))


async def answer_s(port: int, body: bytes, keys: Keys, miner: str) -> float | None:
    """Send one signed offer over a new connection; return how long it took, None if it was lost."""
    request = request_bytes("POST", OFFER, signed_headers(keys, miner, body) | {"Connection": "close"}, body)
    began = time.perf_counter()
    try:
        async with asyncio.timeout(OFFER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                status = (await reader.readline()).split()[1:2]
                await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    return time.perf_counter() - began if status == [b"200"] else None


async def measure(server: Server, name: str, seconds: float, rate: float, seed: int) -> Phase:
    """Send offers at a fixed rate, whether or not the last one was answered."""
    keys, miner = keys_from_seed("validator"), keys_from_seed("miner").address
    plan = Plan(port=server.port, count=int(seconds * rate), connections=1, seed=seed, accepted=TAKEN)
    tasks, most = [], 0
    began = time.perf_counter()
    for number, body in enumerate(offers(plan)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(answer_s(server.port, body, keys, miner)))
        if number % 10 == 0:
            most = max(most, descriptors(server.pid))
    found = await asyncio.gather(*tasks)
    took = [one for one in found if one is not None]
    cuts = quantiles(took) if len(took) > 1 else {"p50_ms": 0.0, "p99_ms": 0.0}
    worst = round(max(took, default=0.0) * 1e3, 1)
    return Phase(
        name,
        len(found),
        len(found) - len(took),
        **cuts,
        worst_ms=worst,
        open=most,
        memory_mb=memory_mb(server.pid),
    )


async def settled_s(server: Server, quiet: int, patience_s: float) -> float | None:
    """Wait until the gateway holds hardly more descriptors than when it was quiet; None if it keeps them."""
    began = time.perf_counter()
    while descriptors(server.pid) > quiet + SETTLED:
        if time.perf_counter() - began > patience_s:
            return None
        await asyncio.sleep(0.1)
    return round(time.perf_counter() - began, 1)


async def run(
    folder: Path, kinds: Sequence[str], clients: int, seconds: float, rate: float
) -> dict[str, Any]:
    """Start a gateway, measure every attack, and return the figures of the last line."""
    miner, validator = keys_from_seed("miner"), keys_from_seed("validator")
    async with ours(folder, 0, 1, miner, validator) as server:
        quiet, floods = descriptors(server.pid), {client.__name__ for client in FLOODS}
        phases = [await measure(server, "quiet", seconds, rate, 0)]
        print(line_of(phases[0]), flush=True)
        for seed, kind in enumerate(kinds, 1):
            with ExitStack() as stack:
                await asyncio.to_thread(
                    stack.enter_context,
                    attack(kind, server.port, clients // 10 if kind in floods else clients),
                )
                phases.append(await measure(server, kind, seconds, rate, seed))
            print(line_of(phases[-1]), flush=True)
            await settled_s(server, quiet, STAY_S)
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, attack(LEFT, server.port, clients))
            closed_s = await settled_s(server, quiet, STAY_S)
    return {
        "offers": sum(phase.offers for phase in phases),
        "lost": sum(phase.lost for phase in phases),
        "worst_ms": max(phase.worst_ms for phase in phases),
        "quiet_worst_ms": phases[0].worst_ms,
        "most_open": max(phase.open for phase in phases),
        "memory_mb": max(phase.memory_mb for phase in phases),
        "silent_closed_s": closed_s,
    }


def line_of(phase: Phase) -> str:
    """Return a phase as a line of the table."""
    return (
        f"{phase.name:12} {phase.offers:5} offers, {phase.lost} lost; ms: p50 {phase.p50_ms:7.1f} "
        f"p99 {phase.p99_ms:7.1f} worst {phase.worst_ms:7.1f}; {phase.open} open, {phase.memory_mb} MB"
    )


def main() -> int:
    """Print a line for each attack and the figures; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of offers during each attack")
    parser.add_argument("--rate", type=float, default=40.0, help="offers per second")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(run(Path(folder), args.kinds, args.clients, args.seconds, args.rate))
    print(json.dumps(figures))
    kept = not figures["lost"] and figures["worst_ms"] <= LIMIT_MS and figures["silent_closed_s"] is not None
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
