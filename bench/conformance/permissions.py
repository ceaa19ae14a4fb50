"""Try, on a real nats-server with TLS and keys, what every user of the broker may do and what it must not.

    python -m bench permissions

Prints the table of docs/security.md. The expected permissions are listed separately (permission_table.py) and
compared with the effects: what was stored, answered or received. The last line is one JSON object.
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
from shared.settings import Settings
from shared.settings_sources import load_settings

STREAMS = (
    "JOBS",
    "STATE-a",
    "STATE-b",
    "KV_leases",
    "PROGRESS",
    "DECISIONS",
    "SCORES",
    "NONCES",
    "OBJ_artifacts-a",
    "OBJ_artifacts-b",
)
TIMEOUT_S = 5.0  # never reached in practice: a denial is reported at once
UNCHANGED = 3  # reads with the same result


class Report(Struct):
    """Counts of attempts. `wrong`: attempts whose effect was not the expected one."""

    allowed: int = 0
    denied: int = 0
    refused: int = 0  # refused connections
    reflected: int = 0  # requests with another user's subject as the reply, without effect
    rolled_up: int = 0  # publishes with a header that would delete records of others, without effect
    wrong: list[str] = []

    def note(self, user: str, row: Row, happened: bool) -> None:
        """Count one pair of user and row."""
        if happened:
            self.allowed += 1
        else:
            self.denied += 1
        if happened != (user in row.users):
            what = "was possible" if happened else "was denied"
            self.wrong.append(f"{user}: {row.operation} {row.subject} {what}")


class Fleet:
    """A secured broker with its streams, and one connection of every user."""

    def __init__(self, settings: Settings, buses: dict[str, Bus]) -> None:
        self.settings = settings
        self.buses = buses
        self.admin = buses[ADMIN]

    async def newest(self, subject: str) -> bytes | None:
        """Return the newest record on a subject, in any stream."""
        for stream in STREAMS:
            if record := await self.admin.last(stream, subject):
                return record.data
        return None

    async def state(self) -> dict[str, Any]:
        """Return every stream's configuration and message counts."""
        found = {}
        for stream in ("JOBS", "STATE-a", "STATE-b", "KV_leases"):
            reply = json.loads((await self.admin.request(f"$JS.API.STREAM.INFO.{stream}")).data)
            found[stream] = (reply["config"], reply["state"]["last_seq"], reply["state"]["messages"])
        return found

    async def all_stored(self) -> None:
        """Wait until the streams stored what was published: a flush is answered before that."""
        for subject in ("podium.jobs.a.s", "podium.state.a.s", "podium.state.b.s", "$KV.leases.s"):
            reply = json.loads((await self.admin.request(subject, b"", timeout_s=TIMEOUT_S)).data)
            if "error" in reply:
                raise PodiumError(f"{subject} was not stored: {reply['error']}")

    async def settled(self) -> dict[str, Any]:
        """Return the state once it stays the same: the server responds to requests after a flush's answer."""
        state, unchanged = await self.state(), 0
        while unchanged < UNCHANGED:
            await asyncio.sleep(0.02)
            before, state = state, await self.state()
            unchanged = unchanged + 1 if state == before else 0
        return state


async def measure(folder: Path) -> Report:
    """Try everything on a new broker in `folder`."""
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
    """Try every row as every user; then the attacks by reply subjects and roll-up headers."""
    attempts = (stores, reads, reads, subscribes, asks)
    for rows, attempt in zip(KINDS, attempts, strict=True):
        for row in rows:
            for user in GUESTS:
                report.note(user, row, await attempt(fleet, user, row))
    await reflect(fleet, report)
    await roll_up(fleet, report)


async def stores(fleet: Fleet, user: str, row: Row) -> bool:
    """Return whether a message that `user` publishes is stored, or received if no stream stores it."""
    token = uuid.uuid4().hex.encode()
    if row.operation == "publish":
        return await received_by(fleet.buses["gateway"], row.subject, fleet.buses[user], row.subject, token)
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
    """Return whether JetStream answers a request."""
    try:
        reply = await fleet.buses[user].request(row.subject, row.body, timeout_s=TIMEOUT_S)
    except BusError as error:
        must_be_denial(error)
        return False
    return b'"code":503' not in reply.data  # 503: no JetStream in this account


async def subscribes(fleet: Fleet, user: str, row: Row) -> bool:
    """Return whether `user` receives on `row.subject` `row.publisher`'s message, or may subscribe at all."""
    if not row.publisher:
        return await may_subscribe(fleet.buses[user], row.subject)
    token = uuid.uuid4().hex.encode()
    publisher = fleet.buses[row.publisher]
    return await received_by(fleet.buses[user], row.subject, publisher, row.published, token)


async def asks(fleet: Fleet, user: str, row: Row) -> bool:
    """Return whether a request of `user` reaches its responder, and the response `user`."""
    answering = fleet.buses[row.publisher]

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


async def received_by(subscriber: Bus, pattern: str, publisher: Bus, subject: str, token: bytes) -> bool:
    """Return whether the message is received. A denial is reported at once; an allowed message is awaited."""
    refused = subscriber.denied.total() + publisher.denied.total()
    subscription = await subscriber.client.subscribe(pattern)
    await arrived(subscriber)
    await publisher.publish(subject, token, reply=publisher.client.new_inbox())
    await arrived(publisher)
    await arrived(subscriber)
    messages = [await subscription.next_msg(timeout=TIMEOUT_S) for _ in range(subscription.pending_msgs)]
    await subscription.unsubscribe()
    received = any(message.data == token for message in messages)
    if received == (subscriber.denied.total() + publisher.denied.total() > refused):
        raise PodiumError(f"{subscriber.user} on {pattern}: received {received}, denied {not received}")
    return received


async def may_subscribe(bus: Bus, pattern: str) -> bool:
    """Return whether the broker allows a subscription."""
    before = bus.denied.total()
    subscription = await bus.client.subscribe(pattern)
    await arrived(bus)
    await subscription.unsubscribe()
    return bus.denied.total() == before


async def arrived(bus: Bus) -> None:
    """Wait until both sides have processed everything. Twice: the library's first ping overtakes data."""
    await bus.client.flush()
    await bus.client.flush()


async def reflect(fleet: Fleet, report: Report) -> None:
    """Name forbidden subjects as the reply of allowed requests: this must have no effect."""
    await fleet.all_stored()
    before = await fleet.settled()
    for user, allowed in REFLECTED.items():
        bus = fleet.buses[user]
        for subject in REPLIES[user]:
            for request in allowed:
                await bus.publish(request, b"", reply=subject)
                report.reflected += 1
            await arrived(bus)
            after = await fleet.settled()
            if changed := [stream for stream in after if after[stream] != before[stream]]:
                report.wrong.append(f"{user}: the reply to {subject} had an effect on {', '.join(changed)}")
            before = after


async def roll_up(fleet: Fleet, report: Report) -> None:
    """Publish allowed messages with a header that would delete records of others."""
    for user, stream, subject in ROLLUPS:
        before = await fleet.state()
        for what in ("sub", "all"):
            reply = await fleet.buses[user].request(subject, b"", headers={"Nats-Rollup": what})
            report.rolled_up += 1
            if "error" not in json.loads(reply.data) or await fleet.state() != before:
                report.wrong.append(f"{user}: rolled {stream} up by {subject}")


async def try_to_get_in(settings: Settings, folder: Path, report: Report) -> None:
    """Connect without a key, with an unknown one, without TLS, and with another CA."""
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
    """Raise `error` unless the request was denied: no request may just be lost."""
    if not isinstance(error, DeniedError):
        raise error


def table() -> str:
    """Return the permissions of all users as a Markdown table, for docs/security.md."""
    lines = ["| | " + " | ".join(GUESTS) + " |", "| --- |" + " :-: |" * len(GUESTS)]
    for rows in KINDS:
        for row in rows:
            marks = " | ".join("yes" if user in row.users else "-" for user in GUESTS)
            lines.append(f"| {row.operation} `{row.subject}` | {marks} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table and the verdict; exit code 1 if anything was wrong."""
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
