"""Measure offers per second and latency of our gateway and of the reference, at 1 and at 64 connections.

    python -m bench gateway_load [--rounds 5] [--seconds 1.5] [--broker client|server]     # about 3 minutes

A real gateway process on a real nats-server against bench/performance/fastapi_gateway.py (FastAPI, pydantic,
uvicorn with uvloop and httptools, state in memory), without and with authentication (sr25519). Both have two
busy slots; the offers are valid text offers of mixed types, one in thirty too long, one in fifty of an
accepted task. Rounds of all servers are interleaved, figures are medians over rounds. Each server is pinned
to core 0, the load generator (raw sockets, requests made and signed before the clock starts) to core 1;
nats-server is on the generator's core (`--broker server`: on the gateway's). The generator's own limit is
measured against a constant response. CPU microseconds per request are the scheduler's count for the server
process, and for its broker: on a busy machine they are more reliable than the clock. The last line is one
JSON object; ours is better where ratios are above 1, for p99 below 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from msgspec import Struct

from bench.fake_validator.validator import keys_from_seed
from bench.harness.http_load_client import Generator, Measured, Plan
from bench.performance.gateway_latency import quantiles
from bench.performance.load_servers import TAKEN, Server, canned, ours, reference

SERVER_CORE, CLIENT_CORE = 0, 1
CONNECTIONS = (1, 64)
WARM_UP = 500
GOALS = {"ratio_c1": 1.3, "ratio_c64": 2.5, "ratio_auth_c64": 1.6}


class Round(Struct, frozen=True):
    """One round of one server."""

    measured: Measured
    cpu_us: float  # of the server, per request
    broker_us: float  # of its broker, per request


class Contest:
    """All servers, and what their rounds gave."""

    def __init__(self, generator: Generator, rounds: int, seconds: float) -> None:
        self.generator = generator
        self.rounds = rounds
        self.seconds = seconds
        self.seen: dict[tuple[str, int], list[Round]] = {}
        self._seed = 0

    async def one(self, server: Server, count: int, connections: int, validator: str | None) -> Round:
        """Offer so many times."""
        self._seed += 1
        plan = Plan(
            port=server.port,
            count=count,
            connections=connections,
            seed=self._seed,
            accepted=TAKEN,
            validator=validator,
            miner=keys_from_seed("miner").address,
        )
        cpu, broker = server.cpu_s(), server.broker_cpu_s()
        measured = await asyncio.to_thread(self.generator.measure, plan)
        if set(measured.statuses) != {"200"}:
            raise SystemExit(f"{server.name} answered {measured.statuses}")
        cpu_us = (server.cpu_s() - cpu) / count * 1e6
        return Round(measured, cpu_us, (server.broker_cpu_s() - broker) / count * 1e6)

    async def interleaved(self, servers: list[Server], label: str, validator: str | None) -> None:
        """Rounds of all servers in turn, at each number of connections."""
        for connections in CONNECTIONS:
            counts = {}
            for server in servers:
                warm = await self.one(server, WARM_UP, connections, validator)
                counts[server.name] = max(WARM_UP, int(warm.measured.per_second * self.seconds))
            for _ in range(self.rounds):
                for server in servers:
                    round_ = await self.one(server, counts[server.name], connections, validator)
                    self.seen.setdefault((server.name + label, connections), []).append(round_)

    def figures(self, name: str, connections: int) -> dict[str, Any]:
        """Medians over the rounds of one server, and each round's rate and CPU time."""
        rounds = self.seen[name, connections]
        cuts = [quantiles(one.measured.latencies) for one in rounds]
        return {
            "per_s": round(statistics.median(one.measured.per_second for one in rounds), 1),
            "p50_ms": round(statistics.median(cut["p50_ms"] for cut in cuts), 3),
            "p99_ms": round(statistics.median(cut["p99_ms"] for cut in cuts), 3),
            "cpu_us": round(statistics.median(one.cpu_us for one in rounds), 1),
            "rounds": [(round(one.measured.per_second, 1), round(one.cpu_us, 1)) for one in rounds],
            "broker_us": round(statistics.median(one.broker_us for one in rounds), 1),
            "client_share": round(
                statistics.median(one.measured.cpu_s / one.measured.seconds for one in rounds), 2
            ),
        }


async def measure(folder: Path, rounds: int, seconds: float, broker_core: int) -> dict[str, Any]:
    """Start all servers, measure, stop them."""
    miner, validator = keys_from_seed("miner"), keys_from_seed("validator")
    generator = Generator(CLIENT_CORE)
    contest = Contest(generator, rounds, seconds)
    async with AsyncExitStack() as stack:
        stack.callback(generator.close)
        start = stack.enter_async_context
        ceiling = await start(canned(folder / "canned", SERVER_CORE))
        await contest.interleaved([ceiling], "", None)
        for label, signer in (("", None), ("_auth", validator)):
            servers = [
                await start(ours(folder / f"ours{label}", SERVER_CORE, broker_core, miner, signer)),
                await start(reference(folder / f"reference{label}", SERVER_CORE, miner, signer)),
            ]
            await contest.interleaved(servers, label, "validator" if signer else None)
    return {f"{name}_c{count}": contest.figures(name, count) for name, count in contest.seen}


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios, and the goals they miss."""

    def ratio(what: str, label: str, upper: str = "ours", lower: str = "reference") -> float:
        kind, _, connections = label.rpartition("c")
        one, other = figures[f"{upper}{kind}_c{connections}"], figures[f"{lower}{kind}_c{connections}"]
        return round(float(one[what] / other[what]), 2)

    def paired(place: int, label: str) -> float:
        """Return the median over the rounds of our rate divided by that of the reference's next run.

        In between the core's own speed hardly changes; within minutes it does, by half.
        """
        kind, _, connections = label.rpartition("c")
        pairs = zip(
            figures[f"ours{kind}_c{connections}"]["rounds"],
            figures[f"reference{kind}_c{connections}"]["rounds"],
            strict=True,
        )
        return round(float(statistics.median(one[place] / other[place] for one, other in pairs)), 2)

    ratios = {
        "ratio_c1": paired(0, "c1"),
        "ratio_c64": paired(0, "c64"),
        "p99_ratio_c64": ratio("p99_ms", "c64"),
        "ratio_auth_c1": paired(0, "_authc1"),
        "ratio_auth_c64": paired(0, "_authc64"),
        "p99_ratio_auth_c64": ratio("p99_ms", "_authc64"),
        "cpu_ratio_c64": ratio("cpu_us", "c64", "reference", "ours"),
        "cpu_ratio_auth_c64": ratio("cpu_us", "_authc64", "reference", "ours"),
    }
    missed = [f"{name} {ratios[name]} < {goal}" for name, goal in GOALS.items() if ratios[name] < goal]
    if ratios["p99_ratio_c64"] >= 1:
        missed.append(f"p99_ratio_c64 {ratios['p99_ratio_c64']} >= 1")
    return ratios | {"missed": missed} | figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each server at each number of connections")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long a round is to take")
    parser.add_argument("--broker", choices=("client", "server"), default="client", help="nats-server's core")
    args = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("two cores are needed: one for the servers, one for the load")
    broker_core = CLIENT_CORE if args.broker == "client" else SERVER_CORE
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="podium-load-") as folder:
        figures = asyncio.run(measure(Path(folder), args.rounds, args.seconds, broker_core))
    for name, values in figures.items():
        print(f"{name:20}", *(f"{key} {value!s:<9}" for key, value in values.items() if key != "rounds"))
    print(
        f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after; "
        f"nats-server on the {args.broker}'s core"
    )
    print(json.dumps(summary(figures) | {"broker_on": args.broker, "load_before": round(load, 2)}))


if __name__ == "__main__":
    main()
