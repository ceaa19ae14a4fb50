"""Requests that a miner must refuse or answer without effect, and the statuses that the protocol requires.

Where the protocol allows several statuses (a path without its slash may redirect, a body that is not JSON is
400 or 422), all are listed. Cases are signed when they are made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

from bench.fake_validator import requests
from bench.fake_validator.validator import (
    MINER as MINER_HEADER,
)
from bench.fake_validator.validator import (
    NONCE,
    OFFER,
    OFFER_IMAGE,
    REPO,
    SIGNATURE,
    START,
    START_GRPO,
    START_IMAGE,
    SUBMISSION,
    Keys,
    new_nonce,
    signed_headers,
)
from bench.fake_validator.validator import VALIDATOR as VALIDATOR_HEADER
from bench.harness.signed_fleet import MINER, POOR, SECOND, UNKNOWN, VALIDATOR

ID = "5b8c0c5e-0000-4000-8000-%012d"
NEVER = ID % 404  # never offered
WINDOW_S = 120
MEGABYTES = 3
Headers = dict[str, str]


class Case(Struct, frozen=True, kw_only=True):
    """One request; `accepted` is what the answer must say if it is an offer's."""

    name: str
    method: str
    path: str
    headers: Headers
    body: bytes | None = None
    expected: tuple[int, ...]
    accepted: bool | None = None


Endpoint = tuple[str, str, bytes | None]  # method, path, a body that would be valid


def endpoints() -> list[Endpoint]:
    """Return all paths of the protocol with a request that would be good."""

    def body(value: dict[str, Any]) -> bytes:
        return json.dumps(value).encode()

    offers = [
        (OFFER, body(requests.offer(requests.INSTRUCT, ID % 1))),
        (OFFER_IMAGE, body(requests.offer(requests.IMAGE, ID % 2))),
    ]
    starts = [
        (path, body(requests.start(kind, NEVER, "a-repo", "data.json")))
        for path, kind in (
            (START, requests.INSTRUCT),
            (START_GRPO, requests.GRPO),
            (START_IMAGE, requests.IMAGE),
        )
    ]
    gets: list[Endpoint] = [("GET", SUBMISSION + NEVER, None), ("GET", REPO + "text", None)]
    return [*(("POST", path, body) for path, body in offers + starts), *gets]


def changed(headers: Headers, **names: str | None) -> Headers:
    """Headers with some replaced (`miner_hotkey` for `miner-hotkey`), or left out if None."""
    new = {name.replace("_", "-"): value for name, value in names.items()}
    return {name: value for name, value in (headers | new).items() if value is not None}


def unauthenticated() -> Iterator[Case]:
    """Yield every way to fail the checks of the headers, on every path."""
    for method, path, body in endpoints():
        for name, status, headers in broken_headers(body):
            yield Case(name=name, method=method, path=path, headers=headers, body=body, expected=(status,))
        if body is not None:
            tampered = body.replace(b"5b8c0c5e", b"5b8c0c5f")
            headers = signed_headers(VALIDATOR, MINER.address, body)
            yield Case(
                name="another body than the signed one",
                method=method,
                path=path,
                headers=headers,
                body=tampered,
                expected=(401,),
            )


def broken_headers(body: bytes | None) -> Iterator[tuple[str, int, Headers]]:
    """Yield requests with bad headers: name, expected status, headers."""
    address = MINER.address

    def good(keys: Any = VALIDATOR, miner: str = address, nonce: str | None = None) -> Headers:
        return signed_headers(keys, miner, body, nonce)

    def at(seconds: float) -> str:
        return new_nonce(time.time_ns() + int(seconds * 1e9))

    yield "no signature headers", 422, {"Content-Type": "application/json"}
    for header in (VALIDATOR_HEADER, MINER_HEADER, NONCE, SIGNATURE):
        yield f"without {header}", 422, changed(good(), **{header.replace("-", "_"): None})
    yield "signed by a stranger", 403, good(UNKNOWN)
    yield "signed by a validator with too little stake", 403, good(POOR)
    yield "validator-hotkey is no address", 403, changed(good(), validator_hotkey="5" + "x" * 46)
    yield "nonce too old", 401, good(nonce=at(-WINDOW_S - 10))
    yield "nonce of the future", 401, good(nonce=at(WINDOW_S + 10))
    yield "nonce without a time", 401, good(nonce="now_abcdefghij")
    yield "nonce beyond any time", 401, good(nonce=new_nonce(10**21))
    signature = good()[SIGNATURE]
    last = "0" if signature[-1] != "0" else "1"
    yield "one digit of the signature changed", 401, changed(good(), signature=signature[:-1] + last)
    one = good()
    yield "signature without 0x", 401, changed(one, signature=one[SIGNATURE][2:])
    yield "signature is no hex", 401, changed(good(), signature="0x" + "zz" * 64)
    yield "signature too short", 401, changed(good(), signature="0x00")
    yield "signed by another than it says", 401, changed(good(UNKNOWN), validator_hotkey=VALIDATOR.address)
    yield "signed for another miner", 401, good(miner=UNKNOWN.address)
    yield (
        "signed for another miner, sent as for us",
        401,
        changed(good(miner=UNKNOWN.address), miner_hotkey=address),
    )


def malformed() -> Iterator[Case]:
    """Signed by the right validator, but no message of the protocol."""
    posts = [(path, body) for _, path, body in endpoints() if body is not None]
    for path, body in posts:
        value = json.loads(body)
        raw: dict[str, tuple[bytes, tuple[int, ...]]] = {
            "empty body": (b"", (422,)),
            "body is no JSON": (b"task_id=1", (400, 422)),
            "body cut off": (body[:-5], (400, 422)),
            "body is a list": (b"[" + body + b"]", (422,)),
            "body is a string": (json.dumps(body.decode()).encode(), (422,)),
            "body is null": (b"null", (422,)),
            "body is not UTF-8": (body.replace(b"model", b"mod\xffl", 1), (400, 422)),
            "body nested too deep": (b"[" * 100_000, (400, 422)),
            "body far too large": (body[:-1] + b" " * (MEGABYTES << 20) + b"}", (413,)),
        }
        for name, (content, expected) in raw.items():
            yield signed(name, path, content, expected)
        for name, fields in wrong_fields(value):
            yield signed(name, path, json.dumps(fields).encode(), (422,))


def wrong_fields(value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a message with one field missing, or of a wrong kind."""
    optional = {"ds_size", "model_params_count", "expected_repo_name", "model_type"}
    for field in value:
        if field not in optional:
            yield f"without {field}", {name: item for name, item in value.items() if name != field}
    wrong = {
        "task_id": 5,
        "model": None,
        "hours_to_complete": "a while",
        "task_type": "PoemTask",
        "model_params_count": "many",
        "ds_size": [1],
        "dataset": "",
        "dataset_zip": "",
        "file_format": "xml",
        "dataset_type": "instruct",
        "model_type": 7,
        "expected_repo_name": 8,
    }
    for field, item in wrong.items():
        if field in value:
            yield f"{field} is {item!r}", value | {field: item}


def signed(
    name: str,
    path: str,
    body: bytes | None,
    expected: tuple[int, ...],
    *,
    method: str | None = None,
    accepted: bool | None = None,
    by: Keys = VALIDATOR,
) -> Case:
    """Return a case whose headers are right."""
    return Case(
        name=name,
        method=method or ("GET" if body is None else "POST"),
        path=path,
        headers=signed_headers(by, MINER.address, body),
        body=body,
        expected=expected,
        accepted=accepted,
    )


def misplaced() -> Iterator[Case]:
    """Wrong methods, wrong paths, wrong order; offers that are refused though their form is good."""
    for method, path, body in endpoints():
        wrong = ("GET", "PUT", "DELETE") if method == "POST" else ("POST", "PUT", "DELETE")
        for other in wrong:
            content = None if other in ("GET", "DELETE") else body or b"{}"
            yield signed("wrong method", path, content, (405,), method=other)
        if method == "POST" and path.startswith("/start"):
            yield signed("start before any offer", path, body, (404,))
    yield signed("submission of an unknown task", SUBMISSION + NEVER, None, (404,))
    yield signed("submission of no task", SUBMISSION, None, (404,))
    yield signed("repository of an unknown kind", REPO + "audio", None, (404, 422))
    yield signed("repository of the trainer", REPO + "text", None, (200,))
    yield signed("unknown path", "/task_offer_poem/", b"{}", (404,))
    refused: list[tuple[str, str, dict[str, Any]]] = [
        ("an offer of 97 hours", requests.INSTRUCT, {"hours_to_complete": 97}),
        ("a GRPO offer", requests.GRPO, {}),
        ("an image offer", requests.IMAGE, {}),
        ("an offer of a model of 71 billion", requests.CHAT, {"model_params_count": 71_000_000_000}),
    ]
    for number, (name, kind, fields) in enumerate(refused):
        body = json.dumps(requests.offer(kind, ID % (100 + number), **fields)).encode()
        yield signed(name, requests.OFFER_PATHS[kind], body, (200,), accepted=False)


def of_running(task_id: str, start: dict[str, Any]) -> Iterator[Case]:
    """About a task that runs: everything is an answer from what is stored."""
    offer = json.dumps(requests.offer(requests.INSTRUCT, task_id)).encode()
    yield signed("an accepted task offered again", OFFER, offer, (200,), accepted=True)
    yield signed("start twice", START, json.dumps(start).encode(), (200,))
    yield signed("submission before the result", SUBMISSION + task_id, None, (404,))
    yield signed("a path without its slash", OFFER.rstrip("/"), offer, (200, 307))


def of_reserved(task_id: str, start: dict[str, Any]) -> Iterator[Case]:
    """About a reserved task, while another validator asks: nothing but its own start may begin it."""

    def begin(name: str, by: Keys = VALIDATOR, **fields: Any) -> Case:
        return signed(name, START, json.dumps(start | fields).encode(), (409,), by=by)

    def ask(name: str, task: str, by: Keys = VALIDATOR, **fields: Any) -> Case:
        body = json.dumps(requests.offer(requests.INSTRUCT, task, **fields)).encode()
        return signed(name, OFFER, body, (200,), accepted=False, by=by)

    yield begin("start of another model than was offered", model="org/another")
    yield begin("start of another type", dataset_type=requests.DATASET_TYPES[requests.DPO])
    yield begin("start of another type, chat", dataset_type=requests.DATASET_TYPES[requests.CHAT])
    yield begin("start of more hours than were offered", hours_to_complete=start["hours_to_complete"] + 1)
    yield begin("start above the limit of hours", hours_to_complete=97)
    yield begin("start by another validator", SECOND)
    yield ask("the same task offered by another validator", task_id, SECOND)
    yield ask("another validator asks for too much", ID % 500, SECOND, hours_to_complete=97)
    yield ask("a second reservation while another asks", ID % 501)


def replayed() -> Iterator[tuple[Case, Callable[[], Case]]]:
    """Yield a request that is good, and one that uses its nonce again."""
    path = SUBMISSION + NEVER
    first = signed("a nonce, used", path, None, (404,))
    yield (
        first,
        lambda: Case(
            name="the same request again", method="GET", path=path, headers=first.headers, expected=(401,)
        ),
    )
    again = signed("a nonce, used", path, None, (404,))
    body = json.dumps(requests.offer(requests.INSTRUCT, ID % 3)).encode()
    headers = signed_headers(VALIDATOR, MINER.address, body, again.headers[NONCE])
    yield (
        again,
        lambda: Case(
            name="a used nonce, signed again",
            method="POST",
            path=OFFER,
            headers=headers,
            body=body,
            expected=(401,),
        ),
    )
    other = signed("a signed GET, used", path, None, (404,))
    yield (
        other,
        lambda: Case(
            name="a signed GET on another path",
            method="GET",
            path=REPO + "text",
            headers=other.headers,
            expected=(401,),
        ),
    )


def all_cases() -> list[Case]:
    """Return everything that needs no task of its own, and no order."""
    return [*unauthenticated(), *malformed(), *misplaced()]
