"""Permissions at the broker, written independently of podium/security/permissions.py."""

from __future__ import annotations

from msgspec import Struct

A, B, GATEWAY, OPERATOR, UPSTREAM = "trainer-a", "trainer-b", "gateway", "operator", "upstream"
GUESTS = (GATEWAY, A, B, OPERATOR, UPSTREAM)
ALL_MESSAGES = b'{"seq":1,"next_by_subj":">","batch":1}'
A_LAST = b'{"last_by_subj":"podium.jobs.a.*"}'


class Row(Struct, frozen=True, kw_only=True):
    """One operation on one subject, and the users that may do it."""

    operation: str
    subject: str
    users: frozenset[str]
    body: bytes = b""
    publisher: str = ""  # user that publishes, or that answers a request
    published: str = ""  # subject of the published message
    queue: str = ""


def _rows(operation: str, *rows: tuple[str, set[str]], body: bytes = b"") -> tuple[Row, ...]:
    return tuple(Row(operation=operation, subject=s, users=frozenset(users), body=body) for s, users in rows)


STORES = (
    *_rows(
        "store",
        ("podium.jobs.a.t", {GATEWAY}),
        ("podium.jobs.b.t", {GATEWAY}),
        ("podium.reservations.a.t", {GATEWAY}),
        ("podium.reservations.b.t", {GATEWAY}),
        ("podium.state.a.t", {GATEWAY, A}),
        ("podium.state.b.t", {GATEWAY, B}),
        ("$KV.leases.a", {A}),
        ("$KV.leases.b", {B}),
        ("podium.progress.a.t", {A}),
        ("podium.progress.b.t", {B}),
        ("podium.decisions.t", {GATEWAY}),
        ("podium.scores.t", {GATEWAY}),
        ("podium.nonces", {GATEWAY}),
        ("$O.artifacts-a.C.upload", {A}),
        ("$O.artifacts-b.C.upload", {B}),
        ("$O.artifacts-a.M.object", {A}),
        ("$O.artifacts-b.M.object", {B}),
    ),
    *_rows("publish", ("podium.heartbeats.a", {A}), ("podium.heartbeats.b", {B})),
)

GET = "$JS.API.DIRECT.GET"
READERS = {GATEWAY, OPERATOR}
READS = (
    *_rows(
        "read",
        (f"{GET}.JOBS", READERS),
        (f"{GET}.STATE-a", READERS),
        (f"{GET}.STATE-b", READERS),
        (f"{GET}.KV_leases", READERS),
        (f"{GET}.PROGRESS", READERS),
        (f"{GET}.DECISIONS", READERS),
        (f"{GET}.SCORES", READERS),
        (f"{GET}.NONCES", READERS),
        (f"{GET}.OBJ_artifacts-a", READERS | {A}),
        (f"{GET}.OBJ_artifacts-b", READERS | {B}),
        body=ALL_MESSAGES,
    ),
    *_rows(
        "read",
        (f"{GET}.JOBS.podium.jobs.a.*", READERS | {A}),
        (f"{GET}.JOBS.podium.jobs.b.*", READERS | {B}),
        (f"{GET}.JOBS.podium.jobs.>", READERS),
        (f"{GET}.STATE-a.podium.state.a.t", READERS | {A}),
        (f"{GET}.STATE-b.podium.state.b.t", READERS | {B}),
        (f"{GET}.KV_leases.$KV.leases.a", READERS | {A}),
        (f"{GET}.KV_leases.$KV.leases.b", READERS | {B}),
        ("podium.streams.JOBS", READERS),
        ("podium.streams.STATE-a", READERS),
        ("podium.streams.STATE-b", READERS),
        ("podium.streams.KV_leases", READERS),
    ),
    *_rows("read", ("$JS.API.STREAM.MSG.GET.JOBS", set()), body=A_LAST),
)

MANAGES = (
    *_rows(
        "manage",
        ("$JS.API.INFO", set()),
        ("$JS.API.STREAM.NAMES", set()),
        ("$JS.API.STREAM.LIST", set()),
        ("$JS.API.STREAM.INFO.JOBS", set()),
        ("$JS.API.STREAM.PURGE.JOBS", set()),
        ("$JS.API.STREAM.PURGE.STATE-a", set()),
        ("$JS.API.STREAM.PURGE.STATE-b", set()),
        ("$JS.API.STREAM.DELETE.JOBS", set()),
        ("$JS.API.STREAM.DELETE.STATE-a", set()),
        ("$JS.API.STREAM.DELETE.STATE-b", set()),
        ("$JS.API.STREAM.DELETE.KV_leases", set()),
        ("$JS.API.STREAM.DELETE.OBJ_artifacts-a", set()),
    ),
    *_rows("manage", ("$JS.API.STREAM.CREATE.MINE", set()), body=b'{"name":"MINE","subjects":["mine"]}'),
    *_rows("manage", ("$JS.API.STREAM.UPDATE.JOBS", set()), body=b'{"name":"JOBS","subjects":["mine"]}'),
    *_rows("manage", ("$JS.API.STREAM.MSG.DELETE.JOBS", set()), body=b'{"seq":1}'),
    *_rows(
        "manage",
        ("$JS.API.STREAM.SNAPSHOT.JOBS", set()),
        body=b'{"deliver_subject":"mine"}',
    ),
    *_rows(
        "manage",
        ("$JS.API.CONSUMER.CREATE.JOBS", set()),
        body=b'{"stream_name":"JOBS","config":{"ack_policy":"none","deliver_subject":"mine"}}',
    ),
    *_rows("manage", ("$SYS.REQ.SERVER.PING", set()), ("$SYS.REQ.ACCOUNT.BUS.INFO", set())),
)


def _subscribe(pattern: str, publisher: str, published: str, *users: str) -> Row:
    return Row(
        operation="subscribe to",
        subject=pattern,
        users=frozenset(users),
        publisher=publisher,
        published=published,
    )


SUBSCRIBES = (
    _subscribe("podium.jobs.a.*", GATEWAY, "podium.jobs.a.h", GATEWAY, OPERATOR, A),
    _subscribe("podium.jobs.b.*", GATEWAY, "podium.jobs.b.h", GATEWAY, OPERATOR, B),
    _subscribe("podium.jobs.>", GATEWAY, "podium.jobs.b.h", GATEWAY, OPERATOR),
    _subscribe("podium.reservations.>", GATEWAY, "podium.reservations.a.h", GATEWAY, OPERATOR),
    _subscribe("podium.state.a.*", A, "podium.state.a.h", GATEWAY, OPERATOR),
    _subscribe("podium.state.>", B, "podium.state.b.h", GATEWAY, OPERATOR),
    _subscribe("podium.progress.>", A, "podium.progress.a.h", GATEWAY, OPERATOR),
    _subscribe("podium.decisions.>", GATEWAY, "podium.decisions.h", GATEWAY, OPERATOR),
    _subscribe("podium.scores.>", GATEWAY, "podium.scores.h", GATEWAY, OPERATOR),
    _subscribe("podium.nonces", GATEWAY, "podium.nonces", GATEWAY),
    _subscribe("podium.heartbeats.a", A, "podium.heartbeats.a", GATEWAY, OPERATOR, A),
    _subscribe("podium.heartbeats.b", B, "podium.heartbeats.b", GATEWAY, OPERATOR, B),
    _subscribe("podium.offers", UPSTREAM, "podium.offers"),  # only in the gateways' queue group
    _subscribe("podium.control.a", GATEWAY, "podium.control.a", A),
    _subscribe("podium.control.b", GATEWAY, "podium.control.b", B),
    _subscribe("$KV.leases.>", A, "$KV.leases.a"),
    _subscribe("$O.>", A, "$O.artifacts-a.C.h"),
    _subscribe("_INBOX_gateway.>", "", "", GATEWAY),  # answers to requests
    _subscribe("_INBOX_trainer-a.>", "", "", A),
    _subscribe("_INBOX_trainer-b.>", "", "", B),
    _subscribe("_INBOX_operator.>", "", "", OPERATOR),
    _subscribe("_INBOX_upstream.>", "", "", UPSTREAM),
    _subscribe("$JS.API.>", GATEWAY, f"{GET}.JOBS"),
    _subscribe(">", GATEWAY, "podium.jobs.a.h"),
)

ASKS = (
    Row(
        operation="request",
        subject="podium.offers",
        users=frozenset({UPSTREAM}),
        publisher=GATEWAY,
        queue="gateway",
    ),
    Row(operation="request", subject="podium.control.a", users=frozenset({GATEWAY}), publisher=A),
    Row(operation="request", subject="podium.control.b", users=frozenset({GATEWAY}), publisher=B),
)

KINDS = (STORES, READS, MANAGES, SUBSCRIBES, ASKS)

# Requests that each user may send, and the subjects that a reply to them must not reach.
REFLECTED = {
    GATEWAY: (f"{GET}.JOBS", f"{GET}.STATE-a.podium.state.a.t", "podium.streams.JOBS"),
    A: (f"{GET}.JOBS.podium.jobs.a.*", f"{GET}.STATE-a.podium.state.a.t", f"{GET}.KV_leases.$KV.leases.a"),
    B: (f"{GET}.STATE-b.podium.state.b.t",),
    OPERATOR: (f"{GET}.JOBS", f"{GET}.STATE-a.podium.state.a.t", "podium.streams.STATE-b"),
    UPSTREAM: ("podium.offers",),
}
_DESTRUCTIVE = (
    "$JS.API.STREAM.PURGE.STATE-a",
    "$JS.API.STREAM.PURGE.STATE-b",
    "$JS.API.STREAM.PURGE.KV_leases",
    "$JS.API.STREAM.DELETE.JOBS",
    "$JS.API.STREAM.DELETE.STATE-a",
    "$JS.API.STREAM.DELETE.STATE-b",
)
_OF_OTHERS = ("podium.jobs.a.evil", "podium.jobs.b.evil", "podium.reservations.a.evil")
REPLIES = {
    GATEWAY: (*_DESTRUCTIVE, "$KV.leases.a"),
    A: (*_DESTRUCTIVE, *_OF_OTHERS, "podium.state.b.evil", "$KV.leases.b"),
    B: (*_DESTRUCTIVE, *_OF_OTHERS, "podium.state.a.evil", "$KV.leases.a"),
    OPERATOR: (*_DESTRUCTIVE, *_OF_OTHERS, "podium.state.a.evil", "$KV.leases.a"),
    UPSTREAM: (*_DESTRUCTIVE, *_OF_OTHERS, "podium.state.a.evil", "$KV.leases.a"),
}

# Allowed publishes with a header that would make JetStream delete records of others.
ROLLUPS = (
    (A, "KV_leases", "$KV.leases.a"),
    (A, "STATE-a", "podium.state.a.t"),
    (GATEWAY, "JOBS", "podium.jobs.a.t"),
)
