"""Try, on a real nats-server with TLS and keys, what every user of the broker may do and what it must not.

    python -m bench permissions

Prints the table of docs/security.md. What each may do is written down here once more, and judged by what
really happened: what was stored, answered or heard. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from bench.conformance.permission_table import (
    GUESTS,
    KINDS,
    REFLECTED,
    REPLIES,
    ROLLUPS,
    Row,
)
from podium.local.nats_server import Broker, bootstrap
from podium.security.key_files import make_certificates, make_users, new_identity
from shared.broker.bus import Bus
from shared.broker.connection import connect
from shared.broker.credentials import ADMIN, seed_path, seed_text
from shared.errors import BusError, DeniedError, PodiumError, RefusedError
from shared.logs import set_up_logs
from shared.settings import Settings, load_settings

STREAMS = (
    "JOBS",
    "STATE",
    "KV_leases",
    "PROGRESS",
    "DECISIONS",
    "SCORES",
    "NONCES",
    "OBJ_artifacts-a",
    "OBJ_artifacts-b",
)
TIMEOUT_S = 5.0  # nothing here waits for it: a denial is reported at once


class Report(Struct):
    """What was tried. `wrong`: what should have been denied or allowed and was not."""

    allowed: int = 0
    denied: int = 0
    refused: int = 0  # who was not even let in
    reflected: int = 0  # requests with somebody else's subject as the reply, to no effect
    rolled_up: int = 0  # publishes with a header that would delete what others stored, to no effect
    wrong: list[str] = []

    def note(self, user: str, row: Row, happened: bool) -> None:
        """Count one pair of user and row."""
        if happened:
            self.allowed += 1
        else:
            self.denied += 1
        if happened != (user in row.users):
            what = "was possible" if happened else "was denied"
            self.wrong.append(f"{user}: {row.deed} {row.subject} {what}")


class Fleet:
    """A secured broker with its streams, and one connection of every user."""

    def __init__(self, settings: Settings, buses: dict[str, Bus]) -> None:
        self.settings = settings
        self.buses = buses
        self.admin = buses[ADMIN]

    async def newest(self, subject: str) -> bytes | None:
        """What is stored last on a subject, wherever."""
        for stream in STREAMS:
            if record := await self.admin.last(stream, subject):
                return record.data
        return None

    async def state(self) -> dict[str, Any]:
        """Every stream's configuration, and how many messages it has had."""
        found = {}
        for stream in ("JOBS", "STATE", "KV_leases"):
            reply = json.loads((await self.admin.request(f"$JS.API.STREAM.INFO.{stream}")).data)
            found[stream] = (reply["config"], reply["state"]["last_seq"], reply["state"]["messages"])
        return found


async def measure(folder: Path) -> Report:
    """Try everything on a broker of its own in `folder`."""
    report = Report()
    keys = folder / "keys"
    make_users(keys, ("a", "b"))
    make_certificates(keys, [], GUESTS)
    broker = Broker(folder / "nats", keys=keys)
    await broker.start()
    try:
        settings = load_settings(
            {},
            nats_url=broker.url,
            nats_nkey_seed_file=str(keys),
            nats_ca_file=str(keys / "ca" / "ca.crt"),
            nats_connect_timeout_s=TIMEOUT_S,
            artifacts_kind="object",
            log_max_bytes=64 << 20,
        )
        await bootstrap(settings)
        async with AsyncExitStack() as stack:
            buses = {}
            for user in (ADMIN, *GUESTS):
                buses[user] = await connect(settings, name=f"test {user}", user=user)
                stack.push_async_callback(buses[user].close)
            fleet = Fleet(settings, buses)
            await try_everything(fleet, report)
        await try_to_get_in(settings, folder, report)
    finally:
        await broker.stop(kill=True)
    return report


async def try_everything(fleet: Fleet, report: Report) -> None:
    """Every user, every row; then what only a clever user would try."""
    attempts = (stores, reads, reads, hears, asks)
    for rows, attempt in zip(KINDS, attempts, strict=True):
        for row in rows:
            for user in GUESTS:
                report.note(user, row, await attempt(fleet, user, row))
    await reflect(fleet, report)
    await roll_up(fleet, report)


async def stores(fleet: Fleet, user: str, row: Row) -> bool:
    """Whether a message that `user` publishes ends up in a stream, or is received if no stream takes it."""
    token = uuid.uuid4().hex.encode()
    if row.deed == "say":
        return await heard_by(fleet.buses["gateway"], row.subject, fleet.buses[user], row.subject, token)
    acknowledged = False
    try:
        reply = await fleet.buses[user].request(row.subject, token, timeout_s=TIMEOUT_S)
        acknowledged = "error" not in json.loads(reply.data)
    except BusError as error:
        must_be_denial(error)
    stored = await fleet.newest(row.subject) == token
    if stored != acknowledged:
        raise PodiumError(f"{user} on {row.subject}: stored {stored}, acknowledged {acknowledged}")
    return stored


async def reads(fleet: Fleet, user: str, row: Row) -> bool:
    """Whether JetStream answers a request."""
    try:
        reply = await fleet.buses[user].request(row.subject, row.body, timeout_s=TIMEOUT_S)
    except BusError as error:
        must_be_denial(error)
        return False
    return b'"code":503' not in reply.data  # that says: no JetStream in this account


async def hears(fleet: Fleet, user: str, row: Row) -> bool:
    """Whether `user` hears on `row.subject` what `row.speaker` says on `row.said`, or may listen at all."""
    if not row.speaker:
        return await may_listen(fleet.buses[user], row.subject)
    token = uuid.uuid4().hex.encode()
    return await heard_by(fleet.buses[user], row.subject, fleet.buses[row.speaker], row.said, token)


async def asks(fleet: Fleet, user: str, row: Row) -> bool:
    """Whether a request of `user` reaches who answers it, and the answer `user`."""
    answering = fleet.buses[row.speaker]

    async def answer(message: Any) -> None:
        await answering.publish(message.reply, b"answer")

    subscription = await answering.subscribe(row.subject, answer, queue=row.queue)
    await arrived(answering)
    try:
        reply = await fleet.buses[user].request(row.subject, b"?", timeout_s=TIMEOUT_S)
        return bool(reply.data == b"answer")
    except BusError as error:
        must_be_denial(error)
        return False
    finally:
        await subscription.unsubscribe()


async def heard_by(listener: Bus, pattern: str, speaker: Bus, subject: str, token: bytes) -> bool:
    """Whether it is received. A denial is reported at once; what is allowed is awaited."""
    refused = listener.denied.total() + speaker.denied.total()
    subscription = await listener.client.subscribe(pattern)
    await arrived(listener)
    await speaker.publish(subject, token, reply=speaker.client.new_inbox())
    await arrived(speaker)
    await arrived(listener)
    messages = [await subscription.next_msg(timeout=TIMEOUT_S) for _ in range(subscription.pending_msgs)]
    await subscription.unsubscribe()
    heard = any(message.data == token for message in messages)
    if heard == (listener.denied.total() + speaker.denied.total() > refused):
        raise PodiumError(f"{listener.user} on {pattern}: heard {heard}, denied {not heard}")
    return heard


async def may_listen(bus: Bus, pattern: str) -> bool:
    """Whether the broker takes a subscription."""
    before = bus.denied.total()
    subscription = await bus.client.subscribe(pattern)
    await arrived(bus)
    await subscription.unsubscribe()
    return bus.denied.total() == before


async def arrived(bus: Bus) -> None:
    """Everything sent is at the server and everything it sent is here: the library's first ping overtakes."""
    await bus.client.flush()
    await bus.client.flush()


async def reflect(fleet: Fleet, report: Report) -> None:
    """Have JetStream send its answers where the user himself may not publish: nothing may come of it."""
    for user, allowed in REFLECTED.items():
        bus = fleet.buses[user]
        for subject in REPLIES[user]:
            before = await fleet.state()
            for request in allowed:
                await bus.publish(request, b"", reply=subject)
                report.reflected += 1
            await arrived(bus)
            if await fleet.state() != before:
                report.wrong.append(f"{user}: something happened on {subject}, named as the reply")


async def roll_up(fleet: Fleet, report: Report) -> None:
    """A header on a permitted publish that would delete what others stored."""
    for user, stream, subject in ROLLUPS:
        before = await fleet.state()
        for what in ("sub", "all"):
            reply = await fleet.buses[user].request(subject, b"", headers={"Nats-Rollup": what})
            report.rolled_up += 1
            if "error" not in json.loads(reply.data) or await fleet.state() != before:
                report.wrong.append(f"{user}: rolled {stream} up by {subject}")


async def try_to_get_in(settings: Settings, folder: Path, report: Report) -> None:
    """Without a key, with an unknown one, without TLS, with another CA."""
    stranger = seed_path(folder / "stranger", "gateway")
    stranger.parent.mkdir(parents=True)
    stranger.touch(0o600)
    stranger.write_text(seed_text(new_identity("gateway")))
    make_certificates(folder / "other", [], ())
    attempts = {
        "anonymous": replace(settings, nats_nkey_seed_file=None),
        "an unknown key": replace(settings, nats_nkey_seed_file=str(stranger)),
        "no TLS": replace(settings, nats_ca_file=None),
        "another CA": replace(settings, nats_ca_file=str(folder / "other" / "ca" / "ca.crt")),
    }
    for name, attempt in attempts.items():
        try:
            await (await connect(attempt, name=name)).close()
        except RefusedError:
            report.refused += 1
        else:
            report.wrong.append(f"{name} was let in")


def must_be_denial(error: BusError) -> None:
    """A request that failed must have been denied, or nobody may be there to hear it; not just be lost."""
    if not isinstance(error, DeniedError):
        raise error


def table() -> str:
    """What each user may do, for docs/security.md."""
    lines = ["| | " + " | ".join(GUESTS) + " |", "| --- |" + " :-: |" * len(GUESTS)]
    for rows in KINDS:
        for row in rows:
            marks = " | ".join("yes" if user in row.users else "-" for user in GUESTS)
            lines.append(f"| {row.deed} `{row.subject}` | {marks} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table and the verdict; 1 if anything was wrong."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    set_up_logs("console", "error", service="permissions")
    with tempfile.TemporaryDirectory(prefix="podium-permissions-") as folder:
        report = asyncio.run(measure(Path(folder)))
    print(table())
    for line in report.wrong:
        print("WRONG", line)
    summary = {
        "pairs_allowed": report.allowed,
        "pairs_denied": report.denied,
        "reflected_without_effect": report.reflected,
        "rolled_up_without_effect": report.rolled_up,
        "strangers_refused": report.refused,
        "wrong": len(report.wrong),
    }
    print(msgspec.json.encode(summary).decode())
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
