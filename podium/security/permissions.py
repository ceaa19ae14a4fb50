"""Permissions of the broker's users, and the nats-server configuration that enforces them.

Every user has its own account; the streams are in the account BUS, which only the admin belongs to. Subject
permissions in one shared account are not enough: the server doesn't check a reply subject, so a user that may
send any request to JetStream can have it reply on any subject, and so store forbidden records or empty a
stream (seen on 2.15.1; bench/conformance/permissions.py tries it). A reply to another account stays there.

Messages from one user to another pass between accounts as a stream import; appends, reads and requests as a
service import.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from msgspec import Struct

from shared import subjects
from shared.broker.credentials import ADMIN, GATEWAY, OPERATOR, UPSTREAM, inbox_prefix, trainer

STREAMS_ACCOUNT = "BUS"
GET, INFO = subjects.DIRECT_GET, subjects.STREAM_INFO
ALL_PUBLISHED = (
    subjects.ANY_JOB,
    subjects.ANY_RESERVATION,
    subjects.ANY_STATE,
    subjects.ANY_DECISION,
    subjects.ANY_SCORE,
    subjects.ANY_PROGRESS,
    subjects.ANY_HEARTBEAT,
)
# Of every stream, as slots that the fleet no longer has keep a log: their jobs stay in JOBS.
EVERYTHING = (f"{GET}.*", f"{GET}.*.>")
ANSWER_WITHIN = "10m"  # a node may first have to stop a worker, gracefully


class User(Struct, frozen=True, kw_only=True):
    """A user and its permissions, as subjects."""

    name: str
    publishes: tuple[str, ...] = ()  # stored by a stream, or core messages
    reads: tuple[str, ...] = ()  # direct gets: a stream, or a stream and a subject
    inspects: tuple[str, ...] = ()  # streams whose configuration and state it may read
    subscribes: tuple[str, ...] = ()
    asks: tuple[tuple[str, str], ...] = ()  # (user, subject): requests that another user answers
    answers: tuple[str, ...] = ()
    queue: str = ""  # the queue group it answers in

    @property
    def account(self) -> str:
        """Return its account in the broker."""
        return STREAMS_ACCOUNT if self.name == ADMIN else self.name

    @property
    def requests(self) -> tuple[str, ...]:
        """Return all subjects it sends to the streams' account, by their names there."""
        return (*self.publishes, *self.reads, *(f"{INFO}.{stream}" for stream in self.inspects))


def users(slots: Iterable[str]) -> list[User]:
    """Return all users of a fleet with these slots."""
    slots = tuple(slots)
    return [
        User(name=ADMIN),
        _gateway(slots),
        *(_trainer(slot) for slot in slots),
        User(name=OPERATOR, reads=EVERYTHING, inspects=_streams(slots), subscribes=ALL_PUBLISHED),
        User(name=UPSTREAM, asks=((GATEWAY, subjects.OFFERS),)),
    ]


def _gateway(slots: tuple[str, ...]) -> User:
    """Return the gateway's user, the only writer of jobs; it may end a chain that no node has ended."""
    return User(
        name=GATEWAY,
        publishes=(
            subjects.job("*", "*"),
            subjects.reservation("*", "*"),
            subjects.state("*", "*"),
            subjects.decision("*"),
            subjects.score("*"),
            subjects.NONCES,
        ),
        reads=EVERYTHING,
        inspects=_streams(slots),
        subscribes=(*ALL_PUBLISHED, subjects.NONCES),
        asks=tuple((trainer(slot), subjects.control(slot)) for slot in slots),
        answers=(subjects.OFFERS,),
        queue=subjects.OFFERS_QUEUE,
    )


def _trainer(slot: str) -> User:
    """Return the user of one slot's nodes; it can neither write nor read anything of another slot."""
    bucket = subjects.artifacts_stream(slot)
    return User(
        name=trainer(slot),
        publishes=(
            subjects.state(slot, "*"),
            subjects.lease(slot),
            subjects.heartbeat(slot),
            subjects.progress(slot, "*"),
            subjects.artifact_chunks(slot, "*"),
            f"$O.{subjects.artifacts_bucket(slot)}.M.*",
        ),
        reads=(
            f"{GET}.{subjects.JOBS_STREAM}.{subjects.jobs_of_slot(slot)}",
            f"{GET}.{subjects.state_stream(slot)}.{subjects.state(slot, '*')}",
            f"{GET}.{subjects.LEASES_STREAM}.{subjects.lease(slot)}",
            f"{GET}.{bucket}",
            f"{GET}.{bucket}.>",
        ),
        subscribes=(
            subjects.jobs_of_slot(slot),
            subjects.heartbeat(slot),
        ),  # its health check needs the latter
        answers=(subjects.control(slot),),
    )


def _streams(slots: tuple[str, ...]) -> tuple[str, ...]:
    return (
        subjects.JOBS_STREAM,
        *map(subjects.state_stream, slots),
        subjects.LEASES_STREAM,
        subjects.PROGRESS_STREAM,
        subjects.DECISIONS_STREAM,
        subjects.SCORES_STREAM,
        subjects.NONCES_STREAM,
        *map(subjects.artifacts_stream, slots),
    )


def common(published: str, subscribed: str) -> str | None:
    """Return the pattern of subjects that match both patterns, or None. Only `subscribed` may end in `>`."""
    ours, theirs = published.split("."), subscribed.split(".")
    if theirs[-1] == ">" and len(ours) >= len(theirs):
        theirs[-1:] = ["*"] * (len(ours) - len(theirs) + 1)
    if len(ours) != len(theirs) or any(
        a != b and "*" not in (a, b) for a, b in zip(ours, theirs, strict=True)
    ):
        return None
    return ".".join(b if a == "*" else a for a, b in zip(ours, theirs, strict=True))


def configuration(everybody: list[User], keys: Mapping[str, str]) -> str:
    """Return the `accounts` block of nats-server's configuration; `keys` are public keys by user name."""
    blocks = [
        f"  {json.dumps(user.account)} {{\n" + "".join(_lines(user, everybody, keys[user.name])) + "  }\n"
        for user in everybody
    ]
    return (
        "# Made by `podium keys`; what each user may do: docs/security.md. Public keys only.\n"
        "accounts {\n" + "".join(blocks) + "}\n"
    )


def _lines(user: User, everybody: list[User], key: str) -> Iterable[str]:
    if user.name == ADMIN:
        yield "    jetstream: enabled\n"
        yield f"    users: [ {{nkey: {key}}} ]\n"
        yield _array("exports", _stored_for(everybody))
        return
    yield f"    users: [ {{nkey: {key}, permissions: {{\n"
    yield _array("publish: {allow", [json.dumps(s) for s in _may_publish(user)], "      ", "}")
    yield _array("subscribe: {allow", [json.dumps(s) for s in _may_subscribe(user)], "      ", "}")
    if user.answers:
        yield f'      allow_responses: {{max: 1, expires: "{ANSWER_WITHIN}"}}\n'
    yield "    }} ]\n"
    yield _array("exports", [*_published_to(user, everybody), *_answered_to(user, everybody)])
    yield _array("imports", [*_stored(user), *_subscribed(user, everybody), *_asked(user, everybody)])


def _may_publish(user: User) -> list[str]:
    inspected = map(subjects.stream_info, user.inspects)
    return [*user.publishes, *user.reads, *inspected, *(subject for _, subject in user.asks)]


def _may_subscribe(user: User) -> list[str]:
    answered = [f"{subject} {user.queue}".strip() for subject in user.answers]
    return [f"{inbox_prefix(user.name)}.>", *user.subscribes, *answered]


def _stored_for(everybody: list[User]) -> list[str]:
    """Return the exports of the streams' account, each with the accounts that may use it."""
    guests: dict[str, list[str]] = {}
    for user in everybody:
        for subject in user.requests:
            guests.setdefault(subject, []).append(user.account)
    return [
        f"{{service: {json.dumps(subject)}, accounts: {json.dumps(accounts)}{_many(subject)}}}"
        for subject, accounts in guests.items()
    ]


def _many(subject: str) -> str:
    """Allow many response messages for a direct get from a whole stream."""
    return ", response: stream" if subject.startswith(GET) and subject.count(".") == 4 else ""


def _stored(user: User) -> list[str]:
    plain = [_import("service", STREAMS_ACCOUNT, subject) for subject in user.publishes + user.reads]
    return plain + [
        _import("service", STREAMS_ACCOUNT, f"{INFO}.{stream}", to=subjects.stream_info(stream))
        for stream in user.inspects
    ]


def _published_to(user: User, everybody: list[User]) -> list[str]:
    """Return the subjects it publishes, each exported once to all accounts that may subscribe."""
    subscribers: dict[str, list[str]] = {}
    for other in everybody:
        for subject in _between(user, other):
            subscribers.setdefault(subject, []).append(other.account)
    return [
        f"{{stream: {json.dumps(subject)}, accounts: {json.dumps(accounts)}}}"
        for subject, accounts in subscribers.items()
    ]


def _subscribed(user: User, everybody: list[User]) -> list[str]:
    return [
        _import("stream", other.account, subject) for other in everybody for subject in _between(other, user)
    ]


def _between(publisher: User, subscriber: User) -> list[str]:
    """Return the subjects that one user publishes and another subscribes to."""
    if publisher is subscriber:  # nothing is imported within one account
        return []
    both = (common(ours, theirs) for ours in publisher.publishes for theirs in subscriber.subscribes)
    return list(dict.fromkeys(subject for subject in both if subject is not None))


def _answered_to(user: User, everybody: list[User]) -> list[str]:
    return [
        f"{{service: {json.dumps(subject)}, accounts: {json.dumps([other.account])}}}"
        for other in everybody
        for name, subject in other.asks
        if name == user.name
    ]


def _asked(user: User, everybody: list[User]) -> list[str]:
    accounts = {other.name: other.account for other in everybody}
    return [_import("service", accounts[name], subject) for name, subject in user.asks]


def _import(kind: str, account: str, subject: str, *, to: str = "") -> str:
    under = f", to: {json.dumps(to)}" if to else ""
    return f"{{{kind}: {{account: {json.dumps(account)}, subject: {json.dumps(subject)}}}{under}}}"


def _array(name: str, items: list[str], indent: str = "    ", end: str = "") -> str:
    inner = "".join(f"{indent}  {item}\n" for item in items)
    return f"{indent}{name}: [\n{inner}{indent}]{end}\n"
