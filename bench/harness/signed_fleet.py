"""A fleet as upstream sees it: signed requests, a broker, two gateways, nodes, scripted workers, a hub.

Validators are listed in a nodes.json of the subnet, as fiber writes it: two with stake, one with too little.
Submissions go to the tests' stand-in of the hub's HTTP interface, over real sockets.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from bench.fake_validator.validator import Keys, keys_from_seed
from bench.harness.fleet import GATEWAYS, SCRIPTED, Fleet
from shared.broker.bus import Bus
from shared.errors import PodiumError

MINER, VALIDATOR, SECOND = keys_from_seed("miner"), keys_from_seed("validator"), keys_from_seed("second")
POOR, UNKNOWN = keys_from_seed("a validator with too little stake"), keys_from_seed("nobody")
NODES = {"node-a": "a", "node-b": "b"}
READY_S = 60.0
REPOSITORY = {
    "training_repo": "https://example.org/miner/trainer",
    "training_commit": "0123abc" * 5 + "01234",
}

# Times a fifth of the house's: a bench has no time to wait for a lease of ten seconds.
FASTER: dict[str, Any] = {
    "lease_ttl_s": 2.0,
    "lease_renew_s": 0.5,
    "lease_trust_s": 1.5,
    "heartbeat_s": 0.3,
    "heartbeat_missing_s": 1.5,
    "poll_s": 0.5,
    "stop_grace_s": 3.0,
}


def subnet_node(keys: Keys, place: int, stake: float) -> dict[str, Any]:
    """Return a node of the subnet as fiber's own file of nodes has it."""
    return {
        "hotkey": keys.address,
        "coldkey": keys.address,
        "node_id": place,
        "incentive": 0.0,
        "netuid": 56,
        "alpha_stake": stake,
        "tao_stake": 0.0,
        "stake": stake,
        "trust": 0.0,
        "vtrust": 1.0,
        "last_updated": 0.0,
        "ip": "192.0.2.1",
        "ip_type": 4,
        "port": 8000,
        "protocol": 4,
    }


def signed_settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Settings of a miner that asks for signatures, with its file of nodes in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = folder / "nodes.json"
    known = [subnet_node(VALIDATOR, 0, 50_000.0), subnet_node(POOR, 1, 999.0), subnet_node(SECOND, 2, 2000.0)]
    nodes.write_text(json.dumps({node["hotkey"]: node for node in known}))
    own = {"hotkey": MINER.address, "upstream_auth": "signed", "upstream_nodes_file": str(nodes)}
    return own | REPOSITORY | more


def hub_settings(folder: Path, url: str, token: str) -> dict[str, Any]:
    """Settings of nodes that submit to a hub."""
    path = folder / "token"
    path.write_text(token)
    return {"artifacts_kind": "hub", "hub_url": url, "hub_namespace": "me", "hub_token_file": str(path)}


def scripted_data(folder: Path, name: str, **knobs: Any) -> str:
    """Write a data file with the knobs of a scripted worker; return its name for a start."""
    (folder / "datasets").mkdir(parents=True, exist_ok=True)
    (folder / "datasets" / name).write_text(json.dumps(knobs))
    return name


def make_fleet(folder: Path, **settings: Any) -> Fleet:
    """Return a fleet whose scripted workers find their data in `folder`/datasets."""
    gaps = random.Random(0)
    (folder / "datasets").mkdir(parents=True, exist_ok=True)
    roots = {"dataset_roots": (str(folder / "datasets"),)}
    return Fleet(
        folder,
        SCRIPTED,
        lambda: gaps.uniform(0.05, 0.3),
        **({"nodes": NODES} | FASTER | roots | signed_settings(folder) | settings),
    )


@asynccontextmanager
async def started(fleet: Fleet) -> AsyncIterator[Bus]:
    """Start a fleet and wait until every gateway decides and every slot is live; yield a connection to it."""
    try:
        await fleet.start()
        bus = await fleet.bus()
        async with aiohttp.ClientSession() as session:
            for gateway in GATEWAYS:
                await until(f"{gateway} to be ready", partial(ready, session, fleet.url(gateway)))
        yield bus
        await bus.close()
    finally:
        await fleet.close()


async def ready(session: aiohttp.ClientSession, url: str) -> bool:
    """Return whether a gateway decides and every slot is live."""
    try:
        async with session.get(url + "/readyz") as reply, session.get(url + "/v1/slots") as slots:
            views = (await slots.json()).get("slots", [])
            return reply.status == 200 and bool(views) and all(view["live"] for view in views)
    except (aiohttp.ClientError, OSError):
        return False


async def until(what: str, look: Callable[[], Awaitable[Any]], patience_s: float = READY_S) -> Any:
    """Poll `look` until it returns a true value, and return that. Raises PodiumError after `patience_s`."""
    give_up_at = time.monotonic() + patience_s
    while not (found := await look()):
        if time.monotonic() > give_up_at:
            raise PodiumError(f"waited {patience_s:g} s for {what}")
        await asyncio.sleep(0.05)
    return found


async def end_of(bus: Bus, stream: str, after: int = 0) -> int:
    """Return the sequence of a stream's last record."""
    async for batch in bus.read_all(stream, after):
        after = batch[-1].sequence
    return after
