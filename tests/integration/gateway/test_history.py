"""What happened before now, over HTTP: runs, decisions, days and alerts, also after a restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from podium.__main__ import main
from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.jobs import Result, ResultStatus
from shared.messages.runs import Metrics, Phase, Progress

MakeOffer = Callable[..., dict[str, Any]]


async def accept(api: Any, offer: dict[str, Any]) -> str:
    status, decision = await api.offer(offer)
    assert (status, decision["accepted"]) == (200, True)
    return str(decision["slot"])


async def train(bus: Bus, task: str, slot: str, steps: int, began: float) -> None:
    base: dict[str, Any] = {"task": task, "slot": slot, "base_loss": 3.0}
    subject = subjects.progress(slot, task)
    loading = Progress(phase=Phase.LOADING, message="plan: fits", at=began, **base)
    await bus.publish(subject, encode(loading))
    for step in range(1, steps + 1):
        dev: dict[str, Any] = {"dev_loss": 3.0 - step / 100} if step % 10 == 0 else {}
        point = Progress(
            phase=Phase.TRAIN, step=step, loss=3.0 - step / 50, lr=1e-4, at=began + step, **base, **dev
        )
        await bus.publish(subject, encode(point))


async def end(bus: Bus, task: str, slot: str, status: ResultStatus, **fields: Any) -> None:
    result = Result(
        record_id=f"r-{task}", task=task, task_id=task, slot=slot, status=status, at=time.time(), **fields
    )
    await bus.append(subjects.state_stream(slot), subjects.state(slot, task), encode(result))


async def test_a_runs_course_is_shown_before_and_after_a_restart(
    bus: Bus, start_gateway: Any, heartbeats: Callable[..., None], make_offer: MakeOffer
) -> None:
    heartbeats("a", "b")
    async with start_gateway() as api:
        await api.until_live("a", "b")
        slot = await accept(api, make_offer("one"))
        await train(bus, "one", slot, 30, time.time())
        seen = await api.until("/v1/tasks/one/progress", lambda view: view.get("points") == 30)
    async with start_gateway() as api:
        await api.until_ready()
        _, after = await api.get("/v1/tasks/one/progress")
        _, short = await api.get("/v1/tasks/one/progress?points=7")
        _, later = await api.get(f"/v1/tasks/one/progress?after={seen['curve']['at'][19]}")
        wrong, _ = await api.get("/v1/tasks/one/progress?after=-1")
        status, _ = await api.get("/v1/tasks/none/progress")
    assert after == seen
    assert [each["step"] for each in after["development"]] == [10, 20, 30]
    assert [each["phase"] for each in after["phases"]] == ["loading", "train"]
    assert after["messages"][0]["text"] == "plan: fits"
    assert later["curve"]["step"] == list(range(21, 31))
    assert ([each["step"] for each in later["development"]], later["phases"]) == ([30], [])
    assert wrong == 400
    assert (short["curve"]["step"][0], short["curve"]["step"][-1], len(short["curve"]["loss"])) == (1, 30, 7)
    assert status == 404


async def test_what_was_published_while_no_gateway_ran_is_there_and_a_lost_time_is_a_gap(
    bus: Bus, start_gateway: Any, heartbeats: Callable[..., None], make_offer: MakeOffer
) -> None:
    heartbeats("a", "b")
    began = time.time() - 300
    async with start_gateway() as api:
        await api.until_live("a", "b")
        slot = await accept(api, make_offer("one"))
        await train(bus, "one", slot, 30, began)
        await api.until("/v1/tasks/one/progress", lambda view: view.get("points") == 30)

    async def more(first: int, last: int) -> None:
        for step in range(first, last + 1):
            point = Progress(
                task="one", slot=slot, phase=Phase.TRAIN, step=step, loss=2.0, at=began + step, base_loss=3.0
            )
            await bus.publish(subjects.progress(slot, "one"), encode(point))

    await more(31, 60)  # to a broker that lives, and no gateway
    async with start_gateway() as api:
        await api.until_ready()
        view = await api.until("/v1/tasks/one/progress", lambda view: view.get("points") == 60)
        assert view["curve"]["step"] == list(range(1, 61))
        assert view["gaps"] == []
        await more(101, 110)  # what was published in between, nobody has
        view = await api.until("/v1/tasks/one/progress", lambda view: view.get("points") == 70)
        assert view["gaps"] == [{"from_at": began + 60, "to_at": began + 101}]
    async with start_gateway("other") as other:  # with an empty data folder
        view = await other.until("/v1/tasks/one/progress", lambda view: view.get("points") == 70)
        assert len(view["gaps"]) == 1


async def test_decisions_are_listed_with_terms_also_rejected_ones(api: Any, make_offer: MakeOffer) -> None:
    await accept(api, make_offer("one"))
    status, refused = await api.offer(make_offer("two", hours_to_complete=97))
    assert (status, refused["accepted"]) == (200, False)
    page = await api.until("/v1/decisions", lambda page: len(page["decisions"]) == 2)
    assert [each["task"] for each in page["decisions"]] == ["two", "one"]
    assert page["decisions"][1]["terms"]["task_success"]["cause"]
    assert page["decisions"][1]["offer"]["model"]
    _, first = await api.get("/v1/decisions?limit=1")
    _, second = await api.get(f"/v1/decisions?limit=1&before={first['next']}")
    assert second["decisions"] == page["decisions"][1:]


async def test_days_and_alerts_follow_from_results_and_scores(
    api: Any, bus: Bus, make_offer: MakeOffer
) -> None:
    assert (await api.get("/v1/alerts"))[1] == {"alerts": []}
    won, lost = await accept(api, make_offer("won")), await accept(api, make_offer("lost"))
    metrics = Metrics(base_loss=3.0, final_loss=2.0)
    await end(bus, "won", won, ResultStatus.SUBMITTED, deadline_margin_s=-3.0, metrics=metrics)
    await end(bus, "lost", lost, ResultStatus.FAILED, reason="no memory")
    async with api.client.post("/v1/scores", json={"task_id": "won", "quality_score": 3}) as response:
        assert response.status == 200
    page = await api.until("/v1/days", lambda page: page["days"] and page["days"][0]["failed"] == 1)
    (day,) = page["days"]
    assert (day["submitted"], day["late"], day["scored"], day["first"]) == (1, 1, 1, 1)
    assert (await api.get("/v1/tasks/won"))[1]["score"]["quality_score"] == 3
    _, found = await api.get("/v1/alerts")
    assert {each["task"]: each["level"] for each in found["alerts"]} == {"lost": "warning", "won": "warning"}


async def test_logs_prints_what_a_run_said(
    bus: Bus, api: Any, make_offer: MakeOffer, capsys: pytest.CaptureFixture[str]
) -> None:
    slot = await accept(api, make_offer("one"))
    url = str(api.client._base_url)
    assert await asyncio.to_thread(main, ["logs", "one", "--url", url]) == 0
    assert "has said nothing" in capsys.readouterr().out
    await train(bus, "one", slot, 10, time.time())
    await api.until("/v1/tasks/one/progress", lambda view: view["points"] == 10)
    following = asyncio.create_task(asyncio.to_thread(main, ["logs", "-f", "one", "--url", url]))
    await asyncio.sleep(0.5)
    assert not following.done()
    await end(bus, "one", slot, ResultStatus.SUBMITTED, artifact="/artifacts/one")
    assert await following == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" UTC  ")[-1].split() for line in lines] == [
        ["loading", "begins"],
        ["loading", "plan:", "fits"],
        ["train", "begins"],
        ["train", "step", "10", "held-out", "loss", "2.9000"],
        ["submitted:", "/artifacts/one"],
    ]
    assert await asyncio.to_thread(main, ["logs", "none", "--url", url]) == 1
    assert "unknown task 'none'" in capsys.readouterr().err
