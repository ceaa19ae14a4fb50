"""Upstream's endpoints on a real gateway and broker: who is let in, and what becomes of offers and starts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.jobs import Result, ResultStatus
from tests.integration.gateway.conftest import Api
from tests.integration.gateway.upstream_client import (
    MINER,
    SIGNED,
    VALIDATOR,
    Start,
    accepted,
    offer,
    start,
)


@pytest.mark.parametrize("slash", ["", "/"])
async def test_from_the_offer_to_the_submission(upstream: Api, bus: Bus, slash: str) -> None:
    status, answer = await VALIDATOR.post(upstream, "/task_offer" + slash, offer("t1"))
    assert (status, answer["accepted"]) == (200, True)
    assert answer["message"].startswith("Accepted for ranking #1 optimization")
    _, task = await upstream.get("/v1/tasks/t1")
    assert (task["state"], task["model"], task["deadline_at"]) == ("reserved", offer("t1")["model"], None)

    before = time.time()
    first = await VALIDATOR.post(upstream, "/start_training" + slash, start("t1", hours_to_complete=2.5))
    assert first == (200, {"message": f"Training on slot {task['slot']}", "task_id": "t1"})
    _, story = await upstream.get("/v1/tasks/t1/story")
    job = story["job"]
    assert job["slot"] == task["slot"]
    assert job["deadline_at"] == pytest.approx(before + 2.5 * 3600 - 150, abs=5)
    assert job["offer"]["expected_repo_name"] == "repo-of-t1"
    assert job["offer"]["ds_size"] == 100000

    again = await VALIDATOR.post(upstream, "/start_training/", start("t1", hours_to_complete=9))
    assert again == first
    assert (await upstream.get("/v1/tasks/t1/story"))[1]["job"] == job

    where = "/get_latest_model_submission/t1" + slash
    status, answer = await VALIDATOR.get(upstream, where)
    assert (status, answer["detail"]) == (404, "no submission yet: the task is queued")
    result = Result(
        record_id="r",
        task="t1",
        task_id="t1",
        slot=job["slot"],
        status=ResultStatus.SUBMITTED,
        artifact="hf://miner/repo-of-t1@0123abc",
        model_hash="ab" * 32,
    )
    await bus.append(subjects.state_stream(job["slot"]), subjects.state(job["slot"], "t1"), encode(result))
    await upstream.until("/v1/tasks/t1", lambda body: body["state"] == "submitted")
    assert await VALIDATOR.get(upstream, where) == (200, {"repo": "miner/repo-of-t1", "model_hash": None})


async def test_two_reservations_are_all_and_a_repeated_offer_is_accepted_again(upstream: Api) -> None:
    assert [await accepted(upstream, f"t{number}") for number in range(3)] == [True, True, False]
    assert await accepted(upstream, "t0")
    _, answer = await VALIDATOR.post(upstream, "/task_offer/", offer("t9"))
    assert answer == {"message": "At maximum accuracy capacity (2 jobs for #1)", "accepted": False}


@pytest.mark.parametrize("task_type", ["GrpoTask", "ImageTask"])
async def test_what_the_engine_does_not_train_is_refused_with_why(upstream: Api, task_type: str) -> None:
    path = "/task_offer_image/" if task_type == "ImageTask" else "/task_offer/"
    status, answer = await VALIDATOR.post(upstream, path, offer("t1", task_type=task_type))
    assert (status, answer["accepted"]) == (200, False)
    assert f"task type {task_type} is not supported" in answer["message"]
    image = {"task_id": "t1", "model": "m", "hours_to_complete": 1, "dataset_zip": "https://store.example/z"}
    for path, body in (("/start_training_image/", image), ("/start_training_grpo/", start("t1"))):
        status, answer = await VALIDATOR.post(upstream, path, body)
        assert status == 404
        assert "was not accepted" in answer["detail"]


async def test_a_start_nobody_accepted_is_refused(upstream: Api) -> None:
    status, answer = await VALIDATOR.post(upstream, "/start_training/", start("never"))
    assert (status, answer["detail"]) == (404, "task 'never' was not accepted: offer it first")
    assert (await upstream.get("/v1/tasks"))[1]["tasks"] == []


async def test_a_late_start_is_honoured_while_any_slot_is_free(
    bus: Bus, start_gateway: Start, heartbeats: Callable[..., None]
) -> None:
    heartbeats("a", "b")
    async with start_gateway(**SIGNED, reservation_s=0.4) as api:
        await api.until_live("a", "b")
        assert await accepted(api, "late1")
        assert await accepted(api, "late2")
        assert await accepted(api, "late3") is False
        await asyncio.sleep(0.5)
        assert (await api.get("/v1/tasks/late1"))[1]["state"] == "lapsed"
        assert await accepted(api, "now1")  # takes the first free slot, where late1 was
        assert (await VALIDATOR.post(api, "/start_training/", start("now1")))[0] == 200
        status, answer = await VALIDATOR.post(api, "/start_training/", start("late1"))
        assert (status, answer["message"]) == (200, "Training on slot b")
        status, answer = await VALIDATOR.post(api, "/start_training/", start("late2"))
        assert status == 409
        assert "lapsed" in answer["detail"]
        assert "no slot is free" in answer["detail"]
        assert {task["slot"] for task in (await api.get("/v1/tasks?state=queued"))[1]["tasks"]} == {"a", "b"}


async def test_data_for_a_reserved_task_may_come_over_v1(
    upstream: Api, make_offer: Callable[..., dict[str, Any]]
) -> None:
    assert await accepted(upstream, "t1")
    status, decision = await upstream.offer(make_offer("t1"))
    assert (status, decision["accepted"]) == (200, True)
    assert (await upstream.get("/v1/tasks/t1"))[1]["state"] == "queued"


async def test_data_for_a_task_that_is_only_called_like_a_reserved_one_is_refused(
    upstream: Api, make_offer: Callable[..., dict[str, Any]]
) -> None:
    assert await accepted(upstream, "task one")
    token = subjects.task_key("task one")
    status, decision = await upstream.offer(make_offer(token))
    assert (status, decision["accepted"]) == (200, False)
    assert "same key as another accepted task" in decision["reason"]
    assert (await upstream.get(f"/v1/tasks/{token}"))[1]["state"] == "reserved"


@pytest.mark.parametrize(
    ("changed", "status", "why"),
    [
        ({"validator-hotkey": None}, 422, "validator-hotkey"),
        ({"miner-hotkey": None, "nonce": None}, 422, "miner-hotkey, nonce"),
        ({"signature": None}, 422, "signature"),
        ({"validator-hotkey": MINER}, 403, "not found in metagraph"),
        ({"validator-hotkey": MINER, "nonce": None}, 403, "not found in metagraph"),
        ({"nonce": "1_abc"}, 401, "within 120 s"),
        ({"nonce": "tomorrow"}, 401, "within 120 s"),
        ({"nonce": f"{(int(time.time()) + 100_000) * 10**9}_x"}, 401, "within 120 s"),
        ({"miner": VALIDATOR.address}, 401, "another miner"),
        ({"miner-hotkey": VALIDATOR.address}, 401, "another miner"),
        ({"signature": "0x" + "11" * 64}, 401, "signature"),
        ({"signature": "nonsense"}, 401, "signature"),
    ],
)
async def test_who_is_not_let_in(upstream: Api, changed: dict[str, Any], status: int, why: str) -> None:
    for path, body in (("/task_offer/", offer("t1")), ("/start_training/", start("t1"))):
        got, answer = await VALIDATOR.post(upstream, path, body, **changed)
        assert got == status
        assert why in answer["detail"]
    got, answer = await VALIDATOR.get(upstream, "/get_latest_model_submission/t1", **changed)
    assert got == status
    assert (await upstream.get("/v1/tasks"))[1]["tasks"] == []


async def test_who_was_refused_can_be_seen(upstream: Api) -> None:
    for _ in range(2):
        assert (await VALIDATOR.post(upstream, "/task_offer/", offer("t1"), signature="0x"))[0] == 401
    assert (await VALIDATOR.get(upstream, "/training_repo/text", nonce="1_a"))[0] == 401
    assert (await VALIDATOR.post(upstream, "/task_offer/", {"task_id": "t1"}))[0] == 422  # no matter of who
    _, info = await upstream.get("/v1/gateway")
    assert [(each["validator"], each["reason"], each["requests"]) for each in info["refused"]] == [
        (VALIDATOR.address, "signature", 2),
        (VALIDATOR.address, "nonce_time", 1),
    ]
    async with upstream.client.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    assert 'podium_refused_requests_total{reason="signature"} 2.0' in lines
    assert 'podium_refused_requests_total{reason="unknown_validator"} 0.0' in lines


async def test_a_body_that_was_not_signed_is_refused(upstream: Api) -> None:
    headers = VALIDATOR.headers(json.dumps(offer("t1")).encode())
    async with upstream.client.post("/task_offer/", json=offer("t2"), headers=headers) as response:
        assert response.status == 401


async def test_without_a_hotkey_nobody_is_let_in(api: Api) -> None:
    status, answer = await VALIDATOR.post(api, "/task_offer/", offer("t1"))
    assert status == 403
    assert "PODIUM_HOTKEY" in answer["detail"]


async def test_signatures_can_be_off_on_loopback(
    bus: Bus, start_gateway: Start, heartbeats: Callable[..., None]
) -> None:
    heartbeats("a", "b")
    async with start_gateway(upstream_auth="off") as api:
        await api.until_live("a", "b")
        async with api.client.post("/task_offer", json=offer("t1")) as response:
            assert (response.status, (await response.json())["accepted"]) == (200, True)
        for sent, status in (  # what a web page could have sent through a browser
            ({"data": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
            ({"json": offer("t2"), "headers": {"Host": "evil.example"}}, 403),
        ):
            async with api.client.post("/task_offer", **sent) as response:
                assert response.status == status
                assert "detail" in await response.json()


async def test_what_is_too_large_or_no_message(bus: Bus, start_gateway: Start) -> None:
    async with start_gateway(**SIGNED, max_body_bytes=4096) as api:
        await api.until_ready()
        status, answer = await VALIDATOR.post(api, "/task_offer/", b"x" * 4097)
        assert (status, answer["detail"]) == (413, "the body is larger than 4096 bytes")
        assert (await VALIDATOR.post(api, "/task_offer/", b"not json"))[0] == 422
        status, answer = await VALIDATOR.post(api, "/start_training/", start("t1", dataset_type="none"))
        assert status == 422
        assert "dataset_type" in answer["detail"]
        async with api.client.get("/task_offer/") as response:
            assert response.status == 405


async def test_the_training_repository_is_told_where_it_is_set(
    bus: Bus, start_gateway: Start, upstream: Api
) -> None:
    status, answer = await VALIDATOR.get(upstream, "/training_repo/text")
    assert status == 404
    assert "PODIUM_TRAINING_REPOS_FILE" in answer["detail"]
    own = {"training_repo": "https://git.example/m/t", "training_commit": "0123abcdef" * 4}
    expected = {
        "github_repo": own["training_repo"],
        "commit_hash": own["training_commit"],
        "github_token": None,
        "requested_datasets": None,
    }
    async with start_gateway("other", **SIGNED, **own) as api:
        for path in ("text", "text/"):
            assert await VALIDATOR.get(api, f"/training_repo/{path}") == (200, expected)
        for kind in ("image", "environment/"):  # an answer would enter the text trainer, and cost the fee
            assert (await VALIDATOR.get(api, f"/training_repo/{kind}"))[0] == 404
        assert (await VALIDATOR.get(api, "/training_repo/video"))[0] == 422
