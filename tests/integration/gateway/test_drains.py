"""A slot that an operator drains gets no new job, on any gateway and after any restart; what it has stays."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from podium.__main__ import main
from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.jobs import Job, Result, ResultStatus, decode_drain, decode_job_record
from tests.integration.gateway.conftest import Api
from tests.integration.gateway.upstream_client import SIGNED, VALIDATOR, accepted, start

JOBS = subjects.JOBS_STREAM
TOKEN = "0123456789abcdef0123"


async def post(api: Api, path: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
    arguments = arguments or {"json": {"reason": "new disk"}}
    async with api.client.post(path, **arguments) as response:
        return response.status, await response.json(content_type=None)


async def slot(api: Api, name: str = "a") -> dict[str, Any]:
    slots = (await api.get("/v1/slots"))[1]["slots"]
    return next(view for view in slots if view["slot"] == name)


async def test_a_drained_slot_gets_no_new_job_until_it_is_resumed(api: Api, make_offer: Any) -> None:
    status, view = await post(api, "/v1/slots/a/drain")
    assert (status, view["state"], view["drain"]["reason"]) == (200, "free", "new disk")
    assert (await api.offer(make_offer("one")))[1]["slot"] == "b"
    _, refused = await api.offer(make_offer("two"))
    assert (refused["accepted"], refused["kind"]) == (False, "hardware")
    assert "a: drained by an operator, b: busy" in refused["reason"]
    alerts = (await api.get("/v1/alerts"))[1]["alerts"]
    assert [(each["slot"], "podium resume a" in each["do"]) for each in alerts] == [("a", True)]
    async with api.client.get("/metrics") as response:
        assert 'podium_slot_drained{slot="a"} 1.0' in (await response.text()).splitlines()
    status, view = await post(api, "/v1/slots/a/resume", headers={"Content-Type": "application/json"})
    assert (status, view["drain"]) == (200, None)
    assert (await api.offer(make_offer("two")))[1]["slot"] == "a"


async def test_the_job_of_a_drained_slot_stays_and_can_be_cancelled(
    api: Api, bus: Bus, make_offer: Any
) -> None:
    assert (await api.offer(make_offer("one")))[1]["slot"] == "a"
    status, view = await post(api, "/v1/slots/a/drain")
    assert (status, view["state"], view["task"]) == (200, "busy", "one")
    assert (await api.offer(make_offer("one")))[1]["accepted"], "an accepted task stays accepted"
    assert (await post(api, "/v1/tasks/one/cancel"))[0] == 200
    assert (await slot(api))["state"] == "free"
    assert (await api.offer(make_offer("two")))[1]["slot"] == "b"


async def test_draining_twice_stores_one_record(api: Api, bus: Bus) -> None:
    answers = await asyncio.gather(*(post(api, "/v1/slots/a/drain") for _ in range(10)))
    assert {status for status, _ in answers} == {200}
    records = await bus.read(JOBS, 0)
    assert [decode_drain(record.data).slot for record in records] == ["a"]
    assert (await post(api, "/v1/slots/b/resume"))[0] == 200
    assert len(await bus.read(JOBS, 0)) == 1, "a slot that works needs no record"


async def test_no_acceptance_comes_after_a_drain_of_another_gateway(
    api: Api, bus: Bus, start_gateway: Any, make_offer: Any
) -> None:
    """The log orders both: offers race with the drain on two gateways, many times."""
    async with start_gateway("second") as second:
        await second.until_live("a", "b")
        for turn in range(12):
            offers = [api.offer(make_offer(f"t{turn}-{number}")) for number in range(4)]
            await asyncio.gather(*offers, post(second, "/v1/slots/a/drain"))
            await post(second, "/v1/slots/a/resume")
            for task in (await api.get("/v1/tasks?state=queued,running"))[1]["tasks"]:
                result = Result(
                    record_id="r",
                    task=task["task"],
                    task_id=task["task_id"],
                    slot=task["slot"],
                    status=ResultStatus.CANCELLED,
                )
                await bus.append(
                    subjects.state_stream(task["slot"]),
                    subjects.state(task["slot"], task["task"]),
                    encode(result),
                )
    drained, jobs = False, 0
    for record in await bus.read(JOBS, 0):
        if subjects.is_drain(record.subject):
            drained = decode_drain(record.data).drained
            continue
        job = decode_job_record(record.data)
        assert isinstance(job, Job)
        jobs += 1
        assert not (drained and job.slot == "a"), f"{job.task} was stored for a drained slot"
    assert jobs >= 12


async def test_every_gateway_knows_and_a_restarted_one_too(
    api: Api, start_gateway: Any, make_offer: Any
) -> None:
    assert (await post(api, "/v1/slots/a/drain"))[0] == 200
    async with start_gateway("second") as second:
        await second.until_live("a", "b")
        assert (await slot(second))["drain"]["reason"] == "new disk"
        assert (await second.offer(make_offer("one")))[1]["slot"] == "b"
        assert (await post(second, "/v1/slots/a/resume"))[0] == 200
    await api.until("/v1/slots", lambda body: body["slots"][0]["drain"] is None)


async def test_a_reservation_on_a_drained_slot_is_kept_elsewhere_if_possible(
    bus: Bus, upstream: Api, make_offer: Any
) -> None:
    assert await accepted(upstream, "t1")
    assert (await slot(upstream))["state"] == "reserved"
    assert (await post(upstream, "/v1/slots/a/drain"))[0] == 200
    status, answer = await VALIDATOR.post(upstream, "/start_training/", start("t1"))
    assert (status, answer["message"]) == (200, "Training on slot b")


async def test_a_reservation_is_honoured_even_if_only_its_drained_slot_is_left(
    bus: Bus, upstream: Api, make_offer: Any
) -> None:
    assert await accepted(upstream, "t1")
    assert (await upstream.offer(make_offer("other")))[1]["slot"] == "b"
    assert (await post(upstream, "/v1/slots/a/drain"))[0] == 200
    status, answer = await VALIDATOR.post(upstream, "/start_training/", start("t1"))
    assert (status, answer["message"]) == (200, "Training on slot a")


async def test_a_job_that_no_node_claims_does_not_move_to_a_drained_slot(
    bus: Bus, start_gateway: Any, heartbeats: Any, one_heartbeat: Any, make_offer: Any
) -> None:
    heartbeats("b")
    async with start_gateway(**SIGNED, unclaimed_s=0.4, heartbeat_missing_s=0.6) as api:
        await api.until_live("b")
        assert (await post(api, "/v1/slots/b/drain"))[0] == 200
        await bus.publish(subjects.heartbeat("a"), one_heartbeat("a"))
        await api.until_live("a")
        assert (await api.offer(make_offer("one")))[1]["slot"] == "a"
        await asyncio.sleep(1.5)
        assert (await api.get("/v1/tasks/one"))[1]["slot"] == "a"
        assert (await post(api, "/v1/slots/b/resume"))[0] == 200
        await api.until("/v1/tasks/one", lambda body: body["slot"] == "b")


@pytest.mark.parametrize("operation", ["drain", "resume"])
async def test_an_unknown_slot_and_a_bad_body_are_problems(operation: str, api: Api, bus: Bus) -> None:
    status, problem = await post(api, f"/v1/slots/A/{operation}")
    assert (status, problem["type"]) == (404, "urn:podium:problem:unknown-slot")
    assert "the slots are a, b" in problem["detail"]
    status, problem = await post(api, f"/v1/slots/a/{operation}", json={"reason": 7})
    assert (status, problem["type"], problem["field"]) == (400, "urn:podium:problem:malformed-body", "reason")
    status, problem = await post(api, f"/v1/slots/a/{operation}", data="x")
    assert (status, problem["type"]) == (415, "urn:podium:problem:wrong-media-type")
    assert await bus.read(JOBS, 0) == []


async def test_draining_needs_the_token(start_gateway: Any, heartbeats: Any, tmp_path: Any, bus: Bus) -> None:
    (tmp_path / "api.token").write_text(f"operator: {TOKEN}\n")
    async with start_gateway(api_token_file=str(tmp_path / "api.token")) as api:
        await api.until_ready()
        assert (await post(api, "/v1/slots/a/drain"))[0] == 401
        assert await bus.read(JOBS, 0) == []
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert (await post(api, "/v1/slots/a/drain", json={}, headers=headers))[0] == 200


async def test_a_drain_is_an_event(api: Api) -> None:
    async with api.client.get("/v1/events?types=slot") as response:
        assert b"hello" in await response.content.readuntil(b"\n\n")
        await post(api, "/v1/slots/b/drain")
        async with asyncio.timeout(10):
            frame = (await response.content.readuntil(b"\n\n")).decode()
    data = json.loads(next(line for line in frame.splitlines() if line.startswith("data: "))[6:])
    assert "event: slot" in frame
    assert (data["slot"], data["drain"]["reason"]) == ("b", "new disk")


async def test_the_commands(
    api: Api,
    bus: Bus,
    make_offer: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    url = str(api.client._base_url)

    async def podium(*arguments: str) -> tuple[int, str]:
        code = await asyncio.to_thread(main, [*arguments, "--url", url])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    assert (await api.offer(make_offer("one")))[1]["slot"] == "a"
    code, said = await podium("drain", "A", "--reason", "new disk")
    assert code == 0
    assert "slot a is drained: it gets no new job, and sees one (busy) through" in said
    assert "busy, draining" in (await podium("status"))[1]
    wait = [sys.executable, "-m", "podium", "drain", "a", "--wait", "--json", "--url", url]
    waiting = await asyncio.create_subprocess_exec(
        *wait,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert waiting.stdout is not None
    assert waiting.stderr is not None
    async with asyncio.timeout(30):
        assert await waiting.stderr.readline() == b"waiting: slot a has one (busy)\n"
        assert "\none is cancelled" in (await podium("cancel", "one", "--reason", "no"))[1]
        assert await waiting.wait() == 0
        assert json.loads(await waiting.stdout.read())["state"] == "free"
    assert "drained" in (await podium("status"))[1]
    assert (await podium("resume", "a"))[1].endswith("slot a may get jobs\n")
    code, said = await podium("drain", "c")
    assert code == 1
    assert "unknown slot 'c'; the slots are a, b" in said
    code, said = await podium("requeue", "one")
    assert code == 1
    assert "ended as cancelled" in said
