"""Bad requests to a gateway over real HTTP: odd task ids, bad bodies, methods and paths."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from shared import subjects
from shared.broker.bus import Bus

MakeOffer = Callable[..., dict[str, Any]]
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "task_id", ["../../x", "a.b", "*", ">", "x" * 300, "a b", "a/b?c#d", "\u00e4\u20ac", "%2e", "{x}"]
)
async def test_any_task_id_is_safe_and_found_again(
    api: Any, bus: Bus, make_offer: MakeOffer, task_id: str
) -> None:
    status, decision = await api.offer(make_offer(task_id))
    assert (status, decision["accepted"], decision["task_id"]) == (200, True, task_id)
    token = subjects.task_key(task_id)
    (record,) = await bus.read(subjects.JOBS_STREAM, 0)
    assert record.subject == f"podium.jobs.a.{token}"
    async with api.client.get(URL("/v1/tasks/" + quote(task_id, safe=""), encoded=True)) as response:
        assert response.status == 200
        assert (await response.json())["task_id"] == task_id
    status, view = await api.get(f"/v1/tasks/{token}")
    assert (status, view["task_id"], view["task"]) == (200, task_id, token)


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "truncated"),
    (b"no json", "malformed"),
    (b"[]", "Expected `object`"),
    (b'{"x":' + b"[" * 100_000, "nested too deeply"),
    (b"\xff\xfe", "malformed"),
]
BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("task_id", "", "$.task_id"),
    ("task_id", "x" * 1025, "$.task_id"),
    ("task_id", 7, "$.task_id"),
    ("task_id", None, "$.task_id"),
    ("task_type", "MusicTask", "$.task_type"),
    ("model", 3, "$.model"),
    ("hours_to_complete", 0, "$.hours_to_complete"),
    ("hours_to_complete", -1, "$.hours_to_complete"),
    ("hours_to_complete", "three", "$.hours_to_complete"),
    ("hours_to_complete", True, "$.hours_to_complete"),
    ("hours_to_complete", None, "$.hours_to_complete"),
    ("hours_to_complete", float("nan"), "malformed"),
    ("hours_to_complete", float("inf"), "malformed"),
    ("dataset", [], "$.dataset"),
    ("file_format", "xml", "$.file_format"),
    ("dataset_type", 1, "$.dataset_type"),
    ("model_params_count", 0, "$.model_params_count"),
]


def with_field(make_offer: MakeOffer, field: str, value: Any) -> bytes:
    return json.dumps(make_offer("x") | {field: value}).encode()


async def test_bad_input_is_a_clear_400_and_changes_nothing(
    api: Any, bus: Bus, make_offer: MakeOffer
) -> None:
    bodies = BAD_BODIES + [(with_field(make_offer, field, value), said) for field, value, said in BAD_FIELDS]
    missing = make_offer("x")
    del missing["task_id"]
    bodies.append((json.dumps(missing).encode(), "`task_id`"))
    for body, said in bodies:
        async with api.client.post("/v1/offers", data=body, headers=JSON) as response:
            assert response.status == 400, body[:100]
            assert response.content_type == "application/problem+json"
            problem = await response.json(content_type=None)
            assert said in problem["detail"], problem
            assert problem["status"] == 400
            if said.startswith("$."):
                assert problem["field"] == said.removeprefix("$.")
    assert await bus.read(subjects.JOBS_STREAM, 0) == []


async def test_unknown_fields_are_ignored(api: Any, make_offer: MakeOffer) -> None:
    status, decision = await api.offer(make_offer("x", colour={"a": [1]}, ds_size=100_000))
    assert (status, decision["accepted"]) == (200, True)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_20_mb_body_is_413(api: Any, chunked: bool) -> None:
    sent = 0

    async def stream() -> Any:
        nonlocal sent
        for _ in range(320):
            yield b"x" * 65536
            sent += 65536

    data: Any = stream() if chunked else io.BytesIO(b"x" * (20 << 20))
    try:
        async with api.client.post("/v1/offers", data=data, headers=JSON) as response:
            assert response.status == 413
            assert response.content_type == "application/problem+json"
            assert "1048576 bytes" in (await response.json(content_type=None))["detail"]
    except aiohttp.ClientConnectionError as error:
        pytest.fail(f"the client never saw the answer: {error!r}")
    status, _ = await api.get("/healthz")
    assert status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/offers", 405),
        ("DELETE", "/v1/tasks/x", 405),
        ("GET", "/nothing", 404),
        ("GET", "/v1/tasks/unknown", 404),
        ("GET", "/v1/tasks?limit=0", 400),
        ("GET", "/v1/tasks?limit=many", 400),
        ("GET", "/v1/tasks?after=-1", 400),
        ("GET", "/v1/tasks?limit=1&limit=2", 400),
        ("GET", "/v1/tasks?state=done", 400),
        ("GET", "/v1/tasks?stat=queued", 400),
        ("POST", "/v1/slots", 405),
    ],
)
async def test_wrong_methods_and_paths_are_problems(api: Any, method: str, path: str, status: int) -> None:
    async with api.client.request(method, path) as response:
        assert response.status == status
        assert response.content_type == "application/problem+json"
        problem = await response.json(content_type=None)
        assert set(problem) - {"field"} == {"type", "title", "status", "detail"}
        assert problem["status"] == status


async def test_a_slash_at_the_end_is_answered_directly(api: Any, make_offer: MakeOffer) -> None:
    async with api.client.post("/v1/offers/", json=make_offer("one"), allow_redirects=False) as response:
        assert response.status == 200
    for path in ("/v1/tasks/", "/v1/tasks/one/", "/v1/slots/", "/healthz/", "/readyz/"):
        async with api.client.get(path, allow_redirects=False) as response:
            assert response.status == 200, path
