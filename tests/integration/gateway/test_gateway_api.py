"""The gateway over real HTTP on a real nats-server: decisions, tasks and slots."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.hardware import Hardware
from shared.messages.jobs import Claimed, Result, ResultStatus, Submitting, decode_job_record
from shared.messages.runs import Phase, Progress
from shared.messages.slots import Lease

MakeOffer = Callable[..., dict[str, Any]]


async def result_of(bus: Bus, slot: str, task: str, last: int = 0) -> None:
    result = Result(
        record_id="r", task=task, task_id=task, slot=slot, status=ResultStatus.SUBMITTED, at=time.time()
    )
    await bus.append(
        subjects.state_stream(slot), subjects.state(slot, task), encode(result), last_on_subject=last
    )


async def test_an_offer_becomes_a_stored_job(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    before = time.time()
    status, decision = await api.offer(make_offer("one"))
    assert status == 200
    assert decision["accepted"] is True
    assert decision["reason"] == "Accepted for ranking #1 optimization - priority 1.000"
    assert (decision["slot"], decision["task"], decision["policy"]) == ("a", "one", "maximum_accuracy")
    assert {name: (term["value"], term["weight"]) for name, term in decision["terms"].items()} == {
        "task_weight": (0.25, 0.15),
        "model_performance": (0.75, 0.15),
        "task_success": (0.90, 0.15),
        "maximum_accuracy_bonus": (1.0, 0.40),
        "h100_maximum_bonus": (1.0, 0.35),
    }
    (record,) = await bus.read(subjects.JOBS_STREAM, 0)
    job = decode_job_record(record.data)
    assert record.subject == "podium.jobs.a.one"
    assert job.offer.dataset == "rows.jsonl"
    assert before <= job.received_at <= time.time()
    assert job.deadline_at == pytest.approx(job.received_at + 2 * 3600 - 150)


async def test_the_four_refusals_of_a_demo_each_with_its_reason(api: Any, make_offer: MakeOffer) -> None:
    status, body = await api.offer({"task_id": "bad"})
    assert (status, body["title"]) == (400, "Bad Request")
    assert "task_type" in body["detail"]
    _, image = await api.offer(make_offer("image", task_type="ImageTask"))
    assert image["accepted"] is False
    assert image["reason"].startswith("Priority 0.635 below #1 threshold; task type ImageTask")
    _, long = await api.offer(make_offer("long", hours_to_complete=97))
    assert (long["accepted"], long["reason"]) == (False, "Job duration too long (>96 hours)")
    assert [(await api.offer(make_offer(name)))[1]["slot"] for name in ("one", "two")] == ["a", "b"]
    _, full = await api.offer(make_offer("three"))
    assert (full["accepted"], full["reason"]) == (False, "At maximum accuracy capacity (2 jobs for #1)")
    _, tasks = await api.get("/v1/tasks")
    assert [task["task_id"] for task in tasks["tasks"]] == ["two", "one"]


async def test_without_live_slots_nothing_is_accepted(
    bus: Bus, start_gateway: Any, make_offer: MakeOffer
) -> None:
    async with start_gateway() as api:
        await api.until_ready()
        _, decision = await api.offer(make_offer("one"))
    assert decision["accepted"] is False
    assert decision["reason"] == (
        "Priority 0.685 below #1 threshold; no free and live slot shows cpu (a: not live, b: not live)"
    )


async def test_other_hardware_than_expected_is_refused(
    bus: Bus, start_gateway: Any, heartbeats: Callable[..., None], make_offer: MakeOffer
) -> None:
    heartbeats("a", "b", hardware=Hardware(device="A100", count=4, memory_bytes=80 << 30))
    async with start_gateway() as api:
        await api.until_live("a", "b")
        await api.until_ready()
        _, decision = await api.offer(make_offer("one"))
    assert decision["accepted"] is False
    assert "(a: 4xA100-80GB, b: 4xA100-80GB)" in decision["reason"]


async def test_accepted_again_before_any_other_check(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    _, first = await api.offer(make_offer("one"))
    await api.offer(make_offer("two"))
    _, again = await api.offer(make_offer("one", hours_to_complete=97, task_type="ImageTask"))
    assert again == first
    assert len(await bus.read(subjects.JOBS_STREAM, 0)) == 2


async def test_a_result_frees_the_slot(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    for name in ("one", "two"):
        await api.offer(make_offer(name))
    await result_of(bus, "b", "two")
    _, decision = await api.offer(make_offer("three"))
    assert (decision["accepted"], decision["slot"]) == (True, "b")
    _, again = await api.offer(make_offer("two"))
    assert again["accepted"] is True


async def test_a_task_is_followed_through_its_states(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    await api.offer(make_offer("one"))
    assert (await api.get("/v1/tasks/one"))[1]["state"] == "queued"
    own: dict[str, Any] = {"record_id": "r", "task": "one", "slot": "a", "node": "n", "epoch": 7}
    subject = subjects.state("a", "one")
    last = await bus.append(
        subjects.state_stream("a"), subject, encode(Claimed(**own, attempt=2)), last_on_subject=0
    )
    await bus.publish(
        subjects.progress("a", "one"),
        encode(Progress(task="one", slot="a", phase=Phase.TRAIN, step=12, loss=1.5)),
    )
    view = await api.until("/v1/tasks/one", lambda body: body["state"] == "running" and body["progress"])
    for slot in ("a", "b"):  # with the other slot's key: it can publish on that slot's subjects only
        spoofed = Progress(task="one", slot=slot, phase=Phase.DONE, step=99)
        await bus.publish(subjects.progress("b", "one"), encode(spoofed))
    await api.until("/v1/gateway", lambda body: body["malformed_messages"] == 2)
    view = (await api.get("/v1/tasks/one"))[1]
    assert (view["node"], view["epoch"], view["attempts"], view["progress"]["step"]) == ("n", 7, 2, 12)
    slots = (await api.get("/v1/slots"))[1]["slots"]
    assert [(slot["slot"], slot["state"], slot["live"]) for slot in slots] == [
        ("a", "busy", True),
        ("b", "free", True),
    ]
    assert (slots[0]["task"], slots[0]["phase"], slots[0]["step"]) == ("one", "train", 12)
    assert slots[0]["last_heartbeat_age_s"] < 2
    last = await bus.append(
        subjects.state_stream("a"), subject, encode(Submitting(**own, digest="d")), last_on_subject=last
    )
    await api.until("/v1/tasks/one", lambda body: body["state"] == "submitting")
    await result_of(bus, "a", "one", last)
    view = await api.until("/v1/tasks/one", lambda body: body["state"] == "submitted")
    assert view["result"]["status"] == "submitted"


async def test_a_lease_shows_a_slot_before_its_first_heartbeat(
    bus: Bus, start_gateway: Any, make_offer: MakeOffer
) -> None:
    for slot, hardware in (("a", Hardware(device="cpu", count=2, memory_bytes=64 << 30)), ("b", None)):
        data = encode(Lease(slot=slot, node="n", epoch=0, hardware=hardware)) if hardware else b"not a lease"
        await bus.append(subjects.LEASES_STREAM, subjects.lease(slot), data, ttl_s=10)
    async with start_gateway() as api:
        await api.until_ready()
        await api.until_live("a")
        assert (await api.offer(make_offer("one")))[1]["slot"] == "a"
        slots = (await api.get("/v1/slots"))[1]["slots"]
        assert [(slot["node"], slot["live"]) for slot in slots] == [("n", True), (None, False)]


async def test_tasks_come_in_pages(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    for number in range(5):
        _, decision = await api.offer(make_offer(f"t{number}"))
        await result_of(bus, decision["slot"], f"t{number}")
    seen: list[str] = []
    after = ""
    while True:
        _, page = await api.get(f"/v1/tasks?limit=2{after}")
        seen += [task["task"] for task in page["tasks"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert seen == ["t4", "t3", "t2", "t1", "t0"]


async def test_a_job_too_short_to_start_is_refused_with_why(api: Any, make_offer: MakeOffer) -> None:
    _, decision = await api.offer(make_offer("x", hours_to_complete=0.03))
    assert decision["accepted"] is False
    assert "0.03 hours leave no time: " in decision["reason"]


async def test_offers_over_nats_get_the_same_answers(api: Any, bus: Bus, make_offer: MakeOffer) -> None:
    body = json.dumps(make_offer("one")).encode()
    replies = await asyncio.gather(*(bus.request(subjects.OFFERS, body) for _ in range(5)))
    decisions = [json.loads(reply.data) for reply in replies]
    assert all(decision == decisions[0] for decision in decisions)
    assert decisions[0]["accepted"] is True
    assert (await api.offer(make_offer("one")))[1] == decisions[0]
    error = json.loads((await bus.request(subjects.OFFERS, b"{}")).data)
    assert error["retry"] is False
    assert "task_id" in error["error"]


async def test_every_answer_is_in_the_file_and_on_the_subject(
    api: Any, bus: Bus, make_offer: MakeOffer, tmp_path: Path
) -> None:
    said = asyncio.Queue[bytes]()

    async def hear(message: Any) -> None:
        said.put_nowait(message.data)

    await bus.subscribe(subjects.ANY_DECISION, hear)
    await api.offer(make_offer("one"))
    await api.offer(make_offer("two", hours_to_complete=97))
    received = [json.loads(await asyncio.wait_for(said.get(), 60)) for _ in range(2)]
    assert [(decision["task"], decision["accepted"]) for decision in received] == [
        ("one", True),
        ("two", False),
    ]
    lines = (tmp_path / "gateway" / "decisions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == received
