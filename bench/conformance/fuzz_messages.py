"""Messages of the protocol with a few errors, for every endpoint."""

from __future__ import annotations

import json
import random
import uuid
from typing import Any
from urllib.parse import quote

from msgspec import Struct

from bench.fake_validator import requests
from bench.fake_validator.validator import REPO, SUBMISSION, request_bytes, signed_headers
from bench.harness.signed_fleet import MINER, POOR, UNKNOWN, VALIDATOR

MOST_CHANGES = 4
UNTOUCHED = 0.15  # share of messages that stay valid
UNSIGNED, BROKEN_HEADER = 0.05, 0.10
REMEMBERED = 64
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
STATES = ("queued", "running", "submitted", "failed", "queued,running", "asleep", ",", "")
ODD_IDS = (
    "..",
    "../../etc/passwd",
    "a/b",
    "podium.jobs.>",
    "*",
    ">",
    "%00",
    "%ff%fe",
    "%2e%2e%2f",
    "\u0130\u0131",
    "x" * 65,
    "x" * 1025,
    "x" * 7000,
    "a b",
    "task\r\nid",
    "0",
    "-1",
    "null",
    "{}",
)
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1e308,
    -1e-308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    2**64,
    10**60,
    10**400,
    "",
    " ",
    "\x00",
    "\ud800",
    "\u202e",
    "\U0001f980" * 100,
    "x" * 600,
    "x" * 20_000,
    "../../etc/passwd",
    "podium.state.a.>",
    "file:///etc/passwd",
    "http://127.0.0.1:1/",
    "https://user:secret@[::1]/x",
    "${jndi:ldap://x}",
    "NaN",
    "5",
    "1e3",
    [],
    {},
    [[[[[]]]]],
    {"a": {"a": {"a": {}}}},
    ["x"] * 1000,
)
CONTENT_TYPES = (
    "text/plain",
    "application/x-www-form-urlencoded",
    "application/json; charset=latin-1",
    "",
    "/",
    "json",
)

FOREIGN = (
    ("Origin", "https://evil.example"),
    ("Origin", "null"),
    ("Host", "evil.example"),
    ("X-Forwarded-For", "192.0.2.1, x"),
    ("Forwarded", "for=_gazonk"),
    ("Sec-Fetch-Site", "cross-site"),
    ("Authorization", "Bearer " + "x" * 500),
    ("Authorization", "Basic \u00ff"),
    ("Authorization", ""),
    ("Last-Event-ID", "99999999999999999999"),
)


class Request(Struct, frozen=True):
    """One request as it goes over the wire, and what it was made of."""

    name: str
    data: bytes


class Mutator:
    """Makes requests from chance; remembers ids, so that later requests are about tasks that exist."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.ids: list[str] = []

    def next(self) -> Request:
        """Return a request of any kind."""
        kind = self.chance.random()
        if kind < 0.70:
            return self.upstream()
        if kind < 0.85:
            return self.offer_v1()
        return self.query_v1()

    def upstream(self) -> Request:
        """Return a request to one of upstream's own paths."""
        kind = self.chance.choice(tuple(requests.TASK_TYPES))
        task = self.task_id()
        place = self.chance.random()
        if place < 0.5:
            return self.post(requests.OFFER_PATHS[kind], requests.offer(kind, task))
        if place < 0.8:
            start = requests.start(kind, task, str(uuid.UUID(int=self.chance.getrandbits(128))), "data.json")
            return self.post(requests.START_PATHS[kind], start)
        path = (
            SUBMISSION + self.in_path(task)
            if place < 0.95
            else REPO + self.in_path(self.chance.choice(ODD_IDS))
        )
        return self.finished("GET", path, None)

    def offer_v1(self) -> Request:
        """Return an offer with its data for `/v1/offers`."""
        kind = self.chance.choice(requests.TEXT_KINDS)
        task = self.task_id()
        message = requests.start(kind, task, "a-repo", "data.json") | requests.offer(kind, task)
        return self.post("/v1/offers", message)

    def query_v1(self) -> Request:
        """Questions and an operator's wishes."""
        task = self.in_path(self.task_id())
        number = self.chance.choice(("1", "500", "501", "-1", "x", "9" * 30, "", "1.5", "%00"))
        path = self.chance.choice(
            (
                f"/v1/tasks/{task}",
                f"/v1/tasks/{task}/story",
                f"/v1/tasks/{task}/progress?points={number}&after={number}",
                f"/v1/tasks?limit={number}&after={number}",
                f"/v1/tasks?state={quote(self.chance.choice(STATES))}&slot={task}",
                f"/v1/tables?{number}={number}",
                "/v1/slots",
                "/v1/gateway",
                "/v1/openapi.json",
                "/v1/docs",
                "/metrics",
                "/healthz",
                "/readyz",
                f"/{task}",
            )
        )
        if self.chance.random() < 0.15:
            return self.score()
        if self.chance.random() < 0.2:
            wish = self.chance.choice(("cancel", "requeue"))
            return self.post(f"/v1/tasks/{task}/{wish}", {"reason": "fuzz"})
        return self.finished("GET", path, None)

    def score(self) -> Request:
        """Return a post of a score of a submission."""
        score = {
            "task_id": self.task_id(),
            "quality_score": self.chance.choice((3.0, 0.0, -1.0, 1e300)),
            "test_loss": self.chance.choice((0.7, 1000.0, None)),
            "synth_loss": 0.8,
            "scored_at": 1.7e9,
            "task_type": "ChatTask",
            "model": requests.MODEL,
        }
        return self.post("/v1/scores", score)

    def task_id(self) -> str:
        """Return a new id, a used one, or a strange one."""
        kind = self.chance.random()
        if kind < 0.45 and self.ids:
            return self.chance.choice(self.ids)
        if kind < 0.55:
            return self.chance.choice(ODD_IDS)
        new = str(uuid.UUID(int=self.chance.getrandbits(128), version=4))
        self.ids.append(new)
        del self.ids[:-REMEMBERED]
        return new

    def in_path(self, text: str) -> str:
        """Return an id for a path, in most cases quoted correctly."""
        if self.chance.random() < 0.8:
            return quote(text, safe="", errors="replace")
        return text.encode("ascii", "ignore").decode().translate({13: None, 10: None, 32: None}) or "-"

    def post(self, path: str, message: dict[str, Any]) -> Request:
        """Return a message with some changes, as JSON that may be malformed."""
        if self.chance.random() < UNTOUCHED:
            return self.finished("POST", path, json.dumps(message).encode())
        changed: Any = json.loads(json.dumps(message))
        for _ in range(self.chance.randint(1, MOST_CHANGES)):
            changed = self.change(changed)
        return self.finished("POST", path, self.spoilt(json.dumps(changed).encode()))

    def change(self, value: Any) -> Any:
        """Change one thing somewhere in a message."""
        chance = self.chance
        if isinstance(value, dict) and value and chance.random() < 0.9:
            key = chance.choice(list(value))
            kind = chance.random()
            if kind < 0.25 and isinstance(value[key], dict | list):
                return value | {key: self.change(value[key])}
            if kind < 0.60:
                return value | {key: chance.choice(ODD_VALUES)}
            if kind < 0.75:
                return {name: item for name, item in value.items() if name != key}
            if kind < 0.85:
                return {name if name != key else name + "_": item for name, item in value.items()}
            return value | {chance.choice(("", "extra", "__class__", "kind", key.upper())): value[key]}
        if isinstance(value, list) and value and chance.random() < 0.7:
            return [self.change(value[0]), *value[1:]]
        return chance.choice(ODD_VALUES)

    def spoilt(self, body: bytes) -> bytes:
        """Mostly as it is; else no JSON, or JSON in a form that few expect."""
        kind = self.chance.random()
        if kind < 0.80:
            return body
        if kind < 0.84:
            return body[: self.chance.randrange(len(body) + 1)]
        if kind < 0.88:
            place = self.chance.randrange(len(body) + 1)
            return body[:place] + self.chance.randbytes(self.chance.randint(1, 8)) + body[place:]
        if kind < 0.92:
            return body[:-1] + b"," + body[1:]  # every key twice
        if kind < 0.94:
            return b"\xef\xbb\xbf" + body
        if kind < 0.96:
            return body.decode().encode("utf-16")
        if kind < 0.98:
            return b"[" * self.chance.choice((10, 1000, 60_000)) + body
        return self.chance.choice((b"", b"null", b"0", b'""', b"[]", b"{}", b"\x00" * 100))

    def finished(self, method: str, path: str, body: bytes | None) -> Request:
        """With headers: signed, mostly; a wrong method now and then."""
        chance = self.chance
        name = f"{method} {path[:60]}"
        if chance.random() < 0.03:
            method = chance.choice(METHODS)
        headers = {"Content-Type": "application/json"}
        if chance.random() >= UNSIGNED:
            keys = VALIDATOR if chance.random() < 0.95 else chance.choice((POOR, UNKNOWN))
            headers = signed_headers(keys, MINER.address, body if method != "GET" else None)
        if chance.random() < BROKEN_HEADER:
            headers = self.broken(headers)
        content = (body or b"") if method != "GET" else b""
        data = request_bytes(method, path, headers, content)
        if method not in ("GET", "POST") and content:
            data = data.replace(b"\r\n\r\n", b"\r\nContent-Length: %d\r\n\r\n" % len(content), 1)
        return Request(name, data)

    def broken(self, headers: dict[str, str]) -> dict[str, str]:
        """Return the headers with one removed, changed or added."""
        chance = self.chance
        name = chance.choice(list(headers))
        kind = chance.random()
        if kind < 0.3:
            return {key: value for key, value in headers.items() if key != name}
        if kind < 0.5:
            return headers | {"Content-Type": chance.choice(CONTENT_TYPES)}
        if kind < 0.6:
            return headers | {"Content-Encoding": chance.choice(("gzip", "deflate", "br", "zstd", "x"))}
        if kind < 0.7:
            return headers | {chance.choice(("X-A", "Cookie", "Range", "If-Match")): "\t" * 50 + "v" * 3000}
        if kind < 0.8:
            return headers | dict((chance.choice(FOREIGN),))
        value = headers[name]
        place = chance.randrange(len(value) + 1)
        return headers | {
            name: value[:place] + chance.choice(("", "0", "x", "\u00ff", "_", "-")) + value[place + 1 :]
        }
